"""Fitting to a bundle: the network that is served is the network that is fitted to.

The network runs in ONNX Runtime, so any bundle can be fitted, and without torch. The levels are those of the bundle's
own tables, and the noise is the noise of requests, so a fit is repeated by its seed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...kernels import normals
from ...runtime.backends import OnnxBackend
from ...runtime.bundle import Bundle
from ...runtime.schedules import (
    COSINE,
    EDM,
    Level,
    Levels,
    Schedule,
    discrete_betas,
    linear_betas,
    straight,
    trained,
)
from ...runtime.solvers import SOLVERS
from ...runtime.tableau import MAX_HISTORY, MAX_ROWS, Tableau
from .closed_form import Direction
from .end_to_end import EndToEnd
from .fit import Fit, Method, fit, refuse_unknown
from .targets import RHO, Array, FitError, Network, Samples, Target

ROWS = 32  # of one network call
_FIT, _FRESH = 1 << 63, (1 << 63) | (1 << 62)  # request seeds of fits: far from those that people choose


@dataclass(frozen=True)
class Settings:
    """How a table is fitted to a bundle."""

    method: Method = "dode"
    solver: str = "ddim"
    num_steps: int = 8
    guidance: float | None = None  # the bundle's default
    num_samples: int = 48
    num_fresh: int = 32
    pieces: int = 10
    target: Target = "global"
    teacher: str = "dpmpp_2m"
    direction: Direction | None = None
    history: int = 4
    ridge: float | None = None
    seed: int = 0
    sigma_range: tuple[float, float] | None = None  # of the levels, last and first; else as in the bundle's tables
    iterations: int = 6  # end-to-end
    learn_levels: bool = True

    def __post_init__(self) -> None:
        counts = {
            "steps": self.num_steps, "samples": self.num_samples, "fresh": self.num_fresh, "substeps": self.pieces,
            "history": self.history, "iterations": self.iterations,
        }  # fmt: skip
        for name, count in counts.items():
            if count < 1:
                raise FitError(f"{name}: {count}, must be at least 1")
        if self.num_steps * self.pieces > MAX_ROWS:
            steps = f"{self.num_steps} of {self.pieces} substeps each"
            raise FitError(f"steps: {steps} are more than the {MAX_ROWS} that a teacher takes")
        if self.history > MAX_HISTORY:
            raise FitError(f"history: {self.history}, a table may read at most {MAX_HISTORY} predictions")
        if self.ridge is not None and not 0 <= self.ridge < math.inf:
            raise FitError(f"ridge: {self.ridge:g}, must be at least 0")
        if not 0 <= self.seed < 1 << 30:
            raise FitError(f"seed: {self.seed}, must be 0 to 2**30 - 1")


def fit_bundle(
    bundle: Bundle,
    settings: Settings,
    *,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fit:
    """Fit a table to a bundle's network.

    Args:
        bundle: the bundle.
        settings: what to fit, and how.
        threads: CPU threads; the machine's cores when left out.
        on_progress: told how many network rows were run, of how many.

    Raises:
        FitError: it cannot be made; one line says why.
    """
    levels = levels_of(bundle, settings.solver, settings.num_steps, settings.sigma_range)
    guidance = _guidance(bundle, settings.guidance)
    done, total = 0, _rows_to_run(settings, levels)

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        on_progress(min(done, total), total)

    cores = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    network = network_of(bundle, guidance, cores, count)
    samples = _samples(bundle, _FIT, settings.seed, settings.num_samples)
    fresh = _samples(bundle, _FRESH, settings.seed, settings.num_fresh)
    made = fit(
        network, levels, settings.solver, settings.method, samples, fresh,
        pieces=settings.pieces, target=settings.target, teacher=settings.teacher, direction=settings.direction,
        history=settings.history, ridge=settings.ridge,
        end_to_end=_end_to_end(settings),
    )  # fmt: skip
    table = replace(
        made.table, weights_sha256=bundle.weights_sha256, provenance=_provenance(bundle, settings, guidance, made)
    )
    on_progress(total, total)
    bundle.refuse_misfit(table)
    return replace(made, table=table)


def levels_of(bundle: Bundle, solver: str, num_steps: int, sigma_range: tuple[float, float] | None = None) -> Levels:
    """The levels on which a solver makes a table of ``num_steps`` rows for a bundle.

    They are those of the bundle's own table with as many levels, if it has one; else they are spaced as Karras et al.
    do between the outermost levels of its nearest.

    Raises:
        FitError: the solver makes no table with so many rows.
    """
    refuse_unknown(solver)
    schedule = schedule_of(bundle)
    found, reason = set[int](), ""
    for count in range(num_steps + 1, 0, -1):
        levels = _levels(bundle, schedule, count, sigma_range)
        try:
            rows = SOLVERS[solver](levels).num_steps
        except ValueError as error:
            reason = reason or str(error)
            continue
        if rows == num_steps:
            return levels
        found.add(rows)
    near = sorted(found, key=lambda rows: abs(rows - num_steps))[:2]
    if not near:
        raise FitError(reason)
    raise FitError(f"steps: {solver} makes no table of {num_steps} rows; {' or '.join(map(str, sorted(near)))} it can")


def schedule_of(bundle: Bundle) -> Schedule:
    """The schedule that a bundle's tables were made on: the known one that tells the network the same times.

    Where none does, times are interpolated in log-SNR between those of the tables.
    """
    tables = list(bundle.tableaus.values())
    made = [table for table in tables if table.weights_sha256 == "any"] or tables  # fitted ones tell times of their own
    alpha, sigma, t = (
        np.concatenate([getattr(table, name)[: table.num_steps] for table in made]) for name in ("alpha", "sigma", "t")
    )
    with np.errstate(divide="ignore"):
        ratio = sigma / alpha
    for schedule in _known(bundle):
        with np.errstate(all="ignore"):
            told = schedule.time(ratio)
        if np.allclose(told, t, rtol=1e-6, atol=1e-9):
            return schedule
    finite = np.isfinite(ratio)
    knots, places = np.unique(np.log(ratio[finite]), return_index=True)
    times = t[finite][places]
    if (np.diff(times) <= 0).any():
        raise FitError(f"{bundle.name}: its tables tell the network different times at one level")
    path = bundle.manifest.path

    def time(at: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.interp(np.log(at), knots, times))

    return Schedule(path, lambda at: np.asarray(np.exp(np.interp(at, times, knots))), time)


def _known(bundle: Bundle) -> list[Schedule]:
    path = bundle.manifest.path
    if path == "ve":
        return [EDM]
    if path == "flow":
        return [straight(1.0), straight(1000.0)]
    betas = [trained(discrete_betas(name, 1000)) for name in ("linear", "scaled_linear", "cosine")]
    return [COSINE, linear_betas(0.1, 20.0), *betas]


def _levels(bundle: Bundle, schedule: Schedule, count: int, sigma_range: tuple[float, float] | None) -> Levels:
    """``count`` levels and clean data."""
    default = bundle.manifest.default_tableau.solver
    tables = sorted(bundle.tableaus.values(), key=lambda table: (table.name != default, table.name))
    plain = [table for table in tables if _is_plain(table)] or tables
    table = min(plain, key=lambda table: abs(table.num_steps - count))
    start = table.start
    if table.num_steps == count and sigma_range is None and _is_plain(table):
        return Levels(table.alpha, table.sigma, table.t, start, schedule)
    if sigma_range is None:
        first, last = Level(table.alpha[0], table.sigma[0], 0).ratio, table.sigma[-2] / table.alpha[-2]
    else:
        last, first = sigma_range
    if not 0 < last <= first:
        raise FitError(f"levels: from {first:g} to {last:g}, must fall and stay above 0")
    ramp = np.linspace(0, 1, count)
    if np.isinf(first):
        share = 1 + ramp * (last / (1 + last) - 1)
        with np.errstate(divide="ignore"):
            ratios = share / (1 - share)
    else:
        ratios = (first ** (1 / RHO) + ramp * (last ** (1 / RHO) - first ** (1 / RHO))) ** RHO
    made = [schedule.at_ratio(float(ratio)) for ratio in ratios]
    alpha, sigma = [*(level.alpha for level in made), 1.0], [*(level.sigma for level in made), 0.0]
    return Levels(np.array(alpha), np.array(sigma), np.array([level.t for level in made]), start, schedule)


def _is_plain(table: Tableau) -> bool:
    """Whether a table was made for its levels and by no fit, and visits each once."""
    falls = (table.sigma[:-1] * table.alpha[1:] > table.sigma[1:] * table.alpha[:-1]).all()
    return bool(falls) and table.weights_sha256 == "any"


def network_of(bundle: Bundle, guidance: float | None, threads: int, count: Callable[[int], None]) -> Network:
    """A bundle's network in ONNX Runtime, as the fits see it.

    Args:
        bundle: the bundle.
        guidance: the scale that all predictions are guided with.
        threads: CPU threads.
        count: told how many rows were run, after each call.
    """
    manifest = bundle.manifest
    is_double = manifest.guidance.mode == "classifier-free" and guidance != 1
    null = manifest.labels.null if manifest.labels and manifest.labels.null is not None else 0
    backend = OnnxBackend(bundle.network, ROWS * (2 if is_double else 1), manifest.sample_shape, threads)

    def raw(x: Array, level: Level, samples: Samples) -> Array:
        out = np.empty_like(x)
        for k in range(0, len(x), ROWS):
            rows = min(ROWS, len(x) - k)
            inputs, calls = backend.inputs, rows * (2 if is_double else 1)
            inputs["t"][:calls] = level.t
            if "label" in inputs:
                inputs["label"][:calls] = null
                if samples.label is not None:
                    inputs["label"][:rows] = samples.label[k : k + rows]
            if "guidance" in inputs:
                inputs["guidance"][:calls] = guidance
            inputs["x"][:rows] = x[k : k + rows]
            if is_double:
                inputs["x"][rows:calls] = x[k : k + rows]
            said = backend(calls)
            out[k : k + rows] = said[:rows]
            if is_double:
                out[k : k + rows] = said[rows:] + guidance * (said[:rows] - said[rows:])
            count(rows)
        return out

    return Network(manifest.output.prediction(), raw)


def _samples(bundle: Bundle, first: int, seed: int, num: int) -> Samples:
    """The starting noise of requests with the seeds ``first + seed * 2**31 + i``, and every class in turn."""
    shape = bundle.manifest.sample_shape
    seeds = np.array([first + (seed << 31) + i for i in range(num)], np.uint64)
    noise = normals(seeds, np.zeros(num, np.uint32), int(np.prod(shape))).reshape(num, *shape)
    labels = bundle.manifest.labels
    return Samples(noise, np.arange(num) % len(labels.names) if labels else None)


def _guidance(bundle: Bundle, asked: float | None) -> float | None:
    offered = bundle.manifest.guidance
    scale = offered.default if asked is None else asked
    if not offered.minimum <= scale <= offered.maximum:
        raise FitError(f"guidance: {scale:g}, {bundle.name} takes {offered.minimum:g} to {offered.maximum:g}")
    return scale


def _rows_to_run(settings: Settings, levels: Levels) -> int:
    cells, steps, fitted = len(levels.t), settings.num_steps, settings.num_samples
    teacher = cells * settings.pieces
    rows = settings.num_fresh * (teacher + 2 * steps) + fitted * (teacher + steps)
    if settings.method == "end-to-end":
        rows += fitted * _end_to_end(settings).rows_to_run(steps, settings.history)
    return rows


def _end_to_end(settings: Settings) -> EndToEnd:
    return EndToEnd(settings.iterations, settings.learn_levels)


def _provenance(bundle: Bundle, settings: Settings, guidance: float | None, made: Fit) -> dict[str, str]:
    labels = bundle.manifest.labels
    facts = {
        "method": settings.method,
        "base": settings.solver,
        "fitted_to": f"{bundle.name} version {bundle.manifest.version}",
        "teacher": f"{settings.teacher} with {made.teacher.num_steps} steps, {settings.pieces} in each of the table's",
        "target": "the teacher's end" if settings.method == "end-to-end" else settings.target,
        "data": f"{settings.num_samples} trajectories from noise" + (", every class in turn" if labels else ""),
        "seed": str(settings.seed),
        "guidance": "none" if guidance is None else f"{guidance:g}",
        "rmse_base": f"{made.before:.6g}",
        "rmse": f"{made.after:.6g}",
        "rmse_on": f"{settings.num_fresh} other noises, against the teacher's end",
        "row_residuals": " ".join(f"{value:.4g}" for value in made.row_residuals),
    }
    if settings.method == "dode":
        facts["lambda"] = " ".join(f"{value:.6g}" for value in made.changes)
        facts["paper"] = "D-ODE, Kim, Tang, Yu 2024, arXiv:2309.16421"
    if settings.method == "end-to-end":
        facts["optimiser"] = f"Levenberg-Marquardt from rows, {settings.iterations} iterations, " + (
            "coefficients and times" if settings.learn_levels else "coefficients"
        )
    facts["ridge"] = "default" if settings.ridge is None else f"{settings.ridge:g}"
    return facts
