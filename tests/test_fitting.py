"""Learned tables: what fits promise, on a teacher known exactly, and on a bundle."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fields, network
from numpy.typing import NDArray

from fewstep.export import write_bundle
from fewstep.runtime import Bundle, Engine, Request, Tableau
from fewstep.runtime.bundle import add_tables, write_manifest
from fewstep.runtime.prediction import Prediction
from fewstep.runtime.schedules import Level, Levels, flow, karras, vp_linear
from fewstep.runtime.solvers import SOLVERS, ddim
from fewstep.training.evaluate import frechet
from fewstep.training.exact import Mixture
from fewstep.training.fitting import (
    METHODS,
    Fit,
    FitError,
    Network,
    Samples,
    Settings,
    Teacher,
    fit,
    fit_bundle,
    follow,
    levels_of,
    targets,
)
from fewstep.training.fitting.end_to_end import EndToEnd
from fewstep.training.student_bundle import Guided

Array = NDArray[np.float64]

MIXTURE = Mixture.random(dimensions=16, components=5, scale=0.2, seed=0)
BASES = ("ddim", "euler", "pndm", "ipndm_4", "dpm_solver_1", "dpm_solver_2", "dpm_solver_3", "deis_3", "heun")


def noise(seed: int, count: int) -> Samples:
    return Samples(np.random.default_rng(seed).standard_normal((count, 16)))


FIT_ON, FRESH = noise(1, 100), noise(2, 500)


def told_level(x: Array, level: Level, _: Samples) -> Array:
    return MIXTURE.x0(x, level.alpha, level.sigma)


def told_time(x: Array, level: Level, _: Samples) -> Array:
    """The mixture as a network that knows of the level what it is told, EDM's ln(sigma) / 4, and nothing else."""
    return MIXTURE.x0(x, 1.0, float(np.exp(4 * level.t)))


EXACT, TOLD = Network(Prediction("x0"), told_level), Network(Prediction("x0"), told_time)


def levels_for(solver: str, calls: int) -> Levels | None:
    """The levels on which a solver calls so often."""
    for count in range(2, calls + 1):
        if SOLVERS[solver](karras(count)).num_steps == calls:
            return karras(count)
    return None


@cache
def fitted(method: Any, solver: str, calls: int) -> Fit | None:
    levels = levels_for(solver, calls)
    return None if levels is None else fit(EXACT, levels, solver, method, FIT_ON, FRESH, pieces=5)


# --- what a fit gains


@pytest.mark.parametrize("solver", BASES)
def test_dode_cuts_the_error_of_every_base_solver(solver: str) -> None:
    """On fresh noise, at 4 to 8 network calls."""
    fits = [made for calls in range(4, 9) if (made := fitted("dode", solver, calls))]
    assert len(fits) >= 2
    for made in fits:
        assert made.after < made.before


@pytest.mark.parametrize("calls", range(4, 9))
def test_dode_takes_a_third_off_ddim(calls: int) -> None:
    made = fitted("dode", "ddim", calls)
    assert made is not None
    assert made.after <= 0.7 * made.before


@pytest.mark.parametrize("calls", range(4, 9))
def test_rows_are_better_than_dode(calls: int) -> None:
    """Every coefficient is free, so more of the error can go."""
    one, all_ = fitted("dode", "ddim", calls), fitted("rows", "ddim", calls)
    assert one is not None
    assert all_ is not None
    assert all_.after < one.after


@pytest.mark.parametrize("calls", range(4, 9))
def test_dode_of_ddim_is_dode_of_dpmpp_2m(calls: int) -> None:
    """DPM-Solver++(2M) is DDIM with a multiple of the last difference added: the free multiple is the same."""
    one, other = fitted("dode", "ddim", calls), fitted("dode", "dpmpp_2m", calls)
    assert one is not None
    assert other is not None
    assert f"{one.after:.3f}" == f"{other.after:.3f}"
    assert np.allclose(one.table.a, other.table.a, rtol=0, atol=1e-12)


def test_local_fits_of_one_step_are_the_global_one() -> None:
    """The first step starts at the noise for both, so they differ after it only."""
    ways = [fit(EXACT, karras(4), "euler", "dode", FIT_ON, FRESH, pieces=5, target=target).changes
            for target in ("global", "local")]  # fmt: skip
    assert ways[0][0] == pytest.approx(ways[1][0], rel=1e-3)
    assert ways[0] != ways[1]


def test_end_to_end_at_four_calls_is_at_the_noise_floor() -> None:
    """Frechet distance to the data within 1.5 times that of two exact sets; both over four pairs of sets."""
    made = fit(TOLD, karras(4), "ddim", "end-to-end", noise(3, 512), noise(4, 200), end_to_end=EndToEnd(15))
    assert made.after < 0.3 * made.before

    def moments(x: Array) -> tuple[Array, Array]:
        return x.mean(0), np.cov(x, rowvar=False)

    floors, ours = [], []
    for seed in range(50, 54):
        rng = np.random.default_rng(seed)
        data = moments(MIXTURE.sample(4000, rng))
        floors.append(frechet(*moments(MIXTURE.sample(4000, rng)), *data))
        ours.append(frechet(*moments(follow(made.table, TOLD, noise(10 + seed, 4000))[-1]), *data))
    assert np.mean(ours) < 1.5 * np.mean(floors)


@pytest.mark.parametrize("calls", range(4, 9))
def test_end_to_end_is_better_than_rows(calls: int) -> None:
    """It begins where rows end, and keeps no step that makes the end worse."""
    rows, all_ = (fit(TOLD, karras(calls), "ddim", method, noise(3, 512), FRESH, pieces=5) for method in METHODS[1:])
    assert all_.row_residuals[0] < 0.6 * rows.row_residuals[-1]
    assert all_.after < rows.after


@pytest.mark.parametrize(
    ("solver", "levels"),
    [("ddim", karras(4)), ("euler", vp_linear(4)), ("flow_euler", flow(4)), ("dpmpp_2m", flow(4))],
    ids=["x0", "eps", "flow", "pure"],
)
def test_end_to_end_fits_every_form_and_path(solver: str, levels: Levels) -> None:
    """From noise without any signal too, where the first level stays where it is."""
    base = SOLVERS[solver](levels)
    made = fit(EXACT, levels, solver, "end-to-end", noise(3, 100), FRESH, pieces=5, end_to_end=EndToEnd(3)).table
    ends = [follow(table, EXACT, FRESH)[-1] for table in (made, base)]
    aim = Teacher(levels, EXACT, "dpmpp_2m", 5).trajectory(FRESH)[-1]
    assert np.square(ends[0] - aim).mean() < 0.7 * np.square(ends[1] - aim).mean()
    assert made.form == base.form
    assert (made.sigma[0], made.alpha[0]) == (base.sigma[0], base.alpha[0])
    assert (np.diff(made.sigma / np.maximum(made.alpha, 1e-9)) < 0).all()


# --- what holds of every fit


@pytest.mark.parametrize("levels", [karras(5), vp_linear(5), flow(5)], ids=["ve", "vp", "flow"])
@pytest.mark.parametrize("pieces", [1, 3, 10])
def test_the_teacher_stops_at_every_level_of_the_student(levels: Levels, pieces: int) -> None:
    fine = targets.subdivide(levels, pieces)
    assert len(fine) == 5 * pieces + 1
    for name in ("alpha", "sigma"):
        assert np.array_equal(getattr(fine, name)[::pieces], getattr(levels, name))
    assert np.array_equal(fine.t[::pieces], levels.t)


def test_a_teacher_beside_the_levels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid that was released with D-ODE is the one of karras(50) for karras(5): its nodes are elsewhere."""
    monkeypatch.setattr(targets, "subdivide", lambda levels, pieces: karras(len(levels.t) * pieces))
    with pytest.raises(AssertionError, match="not at the student's levels"):
        Teacher(karras(5), EXACT, "ddim", 10)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_dode_on_x0_keeps_the_invariants(solver: str) -> None:
    """What is added is a difference of two predictions, and nothing when they agree."""
    made = fitted("dode", solver, 5)
    assert made is not None
    assert made.table.residual < 1e-12
    assert made.changes[0] == 0


def test_rows_that_miss_their_levels_say_by_how_much() -> None:
    made = fitted("rows", "ddim", 5)
    assert made is not None
    worst = max(np.abs(miss).max() for miss in made.table.misses())
    assert made.table.residual == pytest.approx(worst)
    assert worst > 1e-6
    with pytest.raises(ValueError, match="misses the"):
        replace(made.table, residual=0.5 * worst)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"solver": "ancestral"}, "adds noise"),
        ({"solver": "nothing"}, "there is no nothing"),
        ({"solver": "RK45"}, "solver: RK45 is no table: it chooses its steps by the error it sees on each sample"),
        ({"teacher": "ancestral"}, "no deterministic solver"),
        ({"teacher": "heun"}, "one call a level"),
        ({"method": "end-to-end", "solver": "heun"}, "one call a level"),
        ({"method": "end-to-end", "target": "local"}, "aims at the teacher's end"),
        ({"pieces": 0}, "substeps: 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change: dict[str, Any], match: str) -> None:
    asked: dict[str, Any] = {"solver": "ddim", "method": "dode", **change}
    with pytest.raises(FitError, match=match):
        fit(EXACT, karras(3), asked.pop("solver"), asked.pop("method"), FIT_ON, FRESH, **asked)


# --- bundles


OFFERED = {"default": 2.0, "minimum": 1.0, "maximum": 6.0}
FEW = [ddim(karras(steps, 0.05, 20.0)) for steps in (4, 8)]


@pytest.fixture(scope="module")
def guided_teacher(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of random weights that takes its guidance as an input."""
    torch.set_num_threads(1)
    about = fields(is_guided=True) | {
        "name": "teacher", "guidance": {"mode": "embedded", **OFFERED},
        "default_tableau": {"solver": "ddim", "num_steps": 4},
    }  # fmt: skip
    return write_bundle(tmp_path_factory.mktemp("bundles") / "inside", Guided(network(0), 10), FEW, about)[0]


@pytest.fixture(scope="module")
def guided_by_calls(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same network, guided by a second call."""
    out = Path(shutil.copytree(make_bundle(is_guided=True), tmp_path_factory.mktemp("bundles") / "calls"))
    for file in (out / "tableaus").iterdir():
        file.unlink()
    for table in FEW:
        table.save(out / "tableaus" / f"{table.name}-{table.num_steps}.safetensors")
    write_manifest(out, fields(is_guided=True) | {"default_tableau": {"solver": "ddim", "num_steps": 4}})
    return Bundle.load(out)


SMALL = Settings(num_steps=4, num_samples=8, num_fresh=4, pieces=3, iterations=2)


@cache
def bundle_fit(path: Path, settings: Settings) -> Fit:
    return fit_bundle(Bundle.load(path), settings, threads=1)


@pytest.mark.parametrize("method", ["dode", "rows", "end-to-end"])
def test_a_fit_says_where_it_comes_from(guided_teacher: Bundle, method: Any) -> None:
    made = bundle_fit(guided_teacher.path, replace(SMALL, method=method))
    table, facts = made.table, made.table.provenance
    assert table.name == f"{method}-ddim"
    assert table.weights_sha256 == guided_teacher.weights_sha256
    known = {"method", "base", "teacher", "target", "data", "seed", "guidance", "rmse", "rmse_base", "row_residuals"}
    assert known <= set(facts)
    assert facts["guidance"] == "2"
    assert "12 steps" in facts["teacher"]
    again = Tableau.from_bytes(table.to_bytes())
    assert again.sha256 == table.sha256
    guided_teacher.refuse_misfit(again)


def test_the_same_seed_gives_the_same_table(guided_teacher: Bundle) -> None:
    first = bundle_fit(guided_teacher.path, SMALL).table
    assert fit_bundle(guided_teacher, SMALL, threads=1).table.sha256 == first.sha256
    assert fit_bundle(guided_teacher, replace(SMALL, seed=1), threads=1).table.sha256 != first.sha256


def test_progress_ends_where_it_said(guided_teacher: Bundle) -> None:
    told: list[tuple[int, int]] = []
    fit_bundle(guided_teacher, SMALL, threads=1, on_progress=lambda done, total: told.append((done, total)))
    assert all(total == told[0][1] for _, total in told)
    assert told[-2][0] == told[-1][0] == told[-1][1]


@pytest.mark.parametrize("method", ["dode", "end-to-end"])
def test_both_kinds_of_guidance_fit_alike(guided_teacher: Bundle, guided_by_calls: Bundle, method: Any) -> None:
    """One call with guidance inside, and two that are combined: the same network, so the same fit."""
    settings = replace(SMALL, guidance=3.0, method=method)
    inside, combined = (fit_bundle(bundle, settings, threads=1) for bundle in (guided_teacher, guided_by_calls))
    assert inside.after == pytest.approx(combined.after, rel=1e-4)
    assert np.allclose(inside.table.b, combined.table.b, rtol=1e-3, atol=1e-5)


def test_learned_times_in_a_bundle_do_not_mislead_the_next_fit(guided_teacher: Bundle, tmp_path: Path) -> None:
    """A table fitted end to end tells the network times of its own."""
    learned = bundle_fit(guided_teacher.path, replace(SMALL, method="end-to-end")).table
    with_it = add_tables(Path(shutil.copytree(guided_teacher.path, tmp_path / "teacher")), [learned])
    assert fit_bundle(with_it, SMALL, threads=1).table.sha256 == bundle_fit(guided_teacher.path, SMALL).table.sha256


def test_levels_are_those_of_the_bundles_own_tables(guided_teacher: Bundle) -> None:
    own = guided_teacher.tableaus["ddim", 4]
    levels = levels_of(guided_teacher, "dpmpp_2m", 4)
    assert np.array_equal(levels.sigma, own.sigma)
    between = levels_of(guided_teacher, "ddim", 6)
    assert between.sigma[0] == pytest.approx(20)
    assert between.sigma[-2] == pytest.approx(0.05)
    assert SOLVERS["heun"](levels_of(guided_teacher, "heun", 7)).num_steps == 7
    with pytest.raises(FitError, match="5 or 7 it can"):
        levels_of(guided_teacher, "heun", 6)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"guidance": 9.0}, "takes 1 to 6"), ({"sigma_range": (2.0, 1.0)}, "must fall"), ({"num_samples": 0}, "least 1")],
)
def test_a_bundle_that_cannot_be_fitted_says_why(guided_teacher: Bundle, change: Any, match: str) -> None:
    with pytest.raises(FitError, match=match):
        fit_bundle(guided_teacher, replace(SMALL, **change), threads=1)


# --- serving


def test_fitted_tables_in_one_batch_are_each_as_alone(guided_teacher: Bundle) -> None:
    """Learned and plain tables of several lengths and guidances share every step, and not a bit changes."""
    tables = [bundle_fit(guided_teacher.path, replace(SMALL, method=method)).table
              for method in ("dode", "rows", "end-to-end")]  # fmt: skip
    tables += [*guided_teacher.tableaus.values(), SOLVERS["heun"](karras(3, 0.05, 20.0))]
    make: Callable[..., Engine] = partial(Engine, guided_teacher, threads=1)
    requests = [Request(i, table, i % 10, 1.0 + i % 3) for i, table in enumerate(tables * 2)]
    together = make(max_rows=16).generate(requests)
    for request, sample in zip(requests, together, strict=True):
        (alone,) = make(max_rows=1).generate([request])
        assert np.array_equal(alone.pixels, sample.pixels), request.tableau.name


def test_the_embedded_defaults_are_the_best_that_were_measured() -> None:
    """For each number of steps, of the tables that are in the bundle; see ``benchmarks/fit_tables.py served``."""
    results = json.loads((Path(__file__).parents[1] / "docs" / "results" / "fitting.json").read_text("utf-8"))["served"]
    bundle = Bundle.load("fashion-mnist-teacher")
    assert results["weights_sha256"] == bundle.weights_sha256
    for steps in range(3, 9):
        rows = [row for row in results["rows"] if row["steps"] == steps]
        held = {solver: table.sha256 for (solver, its), table in bundle.tableaus.items() if its == steps}
        assert {row["solver"]: row["table_sha256"] for row in rows} == held
        best = min(rows, key=lambda row: row["rmse"]["mean"])
        assert bundle.tableau(num_steps=steps).sha256 == best["table_sha256"]
