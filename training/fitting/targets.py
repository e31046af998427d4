"""What a fit aims at: where the teacher is when the student has made a step.

The teacher is the same network with every cell of the student's grid cut into pieces, so it visits the student's
levels on its way, and at each of them it is asked where it is:

    student      0 ----------------- 1 ----------------- 2            the levels it was given
    teacher      0 -- . -- . -- . -- 1 -- . -- . -- . -- 2            the same, and some between

Targets at other levels than the student's, as in the code released with D-ODE, cost most of what a fit gains;
here levels are compared before anything is run. A global target is the teacher's own trajectory from the same
noise. A local one starts anew at each level from where the student is: the literal D-ODE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...runtime.prediction import Form, Prediction
from ...runtime.schedules import Level, Levels
from ...runtime.solvers import SOLVERS
from ...runtime.tableau import Tableau

Array = NDArray[Any]  # latents keep the dtype of the noise; sums over samples are float64
Target = Literal["global", "local"]
RHO = 7.0  # cells are cut evenly in ratio ** (1 / RHO), which reaches clean data: Karras et al. 2022, eq. 5


class FitError(ValueError):
    """A fit that cannot be made. One line that says what is in the way."""


@dataclass(frozen=True)
class Samples:
    """What trajectories start from."""

    noise: Array  # [samples, ...] standard normal
    label: NDArray[np.int64] | None = None  # [samples]

    def __len__(self) -> int:
        return len(self.noise)


@dataclass(frozen=True)
class Network:
    """A network as the fits see it."""

    prediction: Prediction
    raw: Callable[[Array, Level, Samples], Array]  # from its scaled input [samples, ...]; guidance is inside

    def predict(self, x: Array, level: Level, form: Form, samples: Samples) -> Array:
        """The prediction at ``x [samples, ...]`` in a table's form."""
        k_x, k_m = self.prediction.to_form(form, level.alpha, level.sigma)
        m = k_m * self.raw(self.prediction.c_in(level.alpha, level.sigma) * x, level, samples)
        return m + k_x * x if k_x else m


def follow(
    table: Tableau, network: Network, samples: Samples, x: Array | None = None, stop: int | None = None
) -> list[Array]:
    """Run a deterministic table.

    Args:
        table: the table.
        network: the network.
        samples: where to start.
        x: the first latent, if not ``initial_scale`` times the noise.
        stop: rows to run; all when left out.

    Returns:
        The latent before each row, and the one after the last.
    """
    x = table.initial_scale * samples.noise if x is None else x
    points, history = [x], list[Array]()
    for i in range(table.num_steps if stop is None else stop):
        history = [network.predict(x, level_of(table, i), table.form, samples), *history][: table.history]
        x = combine(float(table.a[i]), table.b[i], x, history)
        points.append(x)
    return points


def combine(a: float, b: Array, x: Array, history: list[Array]) -> Array:
    """``a * x + sum_j b[j] * history[j]``; what has no weight is not read."""
    y = a * x if a else np.zeros_like(x)
    for weight, m in zip(b, history, strict=False):
        if weight:
            y = y + float(weight) * m
    return y


def level_of(table: Tableau, i: int) -> Level:
    """Where row ``i`` calls the network."""
    return Level(float(table.alpha[i]), float(table.sigma[i]), float(table.t[i]))


def subdivide(levels: Levels, pieces: int) -> Levels:
    """The levels, and ``pieces - 1`` more inside each cell."""
    schedule = levels.schedule
    if schedule is None:
        raise FitError("the levels do not know their schedule, so nothing is known of the levels between them")
    if pieces < 1:
        raise FitError(f"substeps: {pieces}, must be at least 1")
    fine: list[Level] = []
    for here, there in levels.steps():
        fine.append(here)
        for k in range(1, pieces):
            if here.alpha:
                root = here.ratio ** (1 / RHO) * (1 - k / pieces) + there.ratio ** (1 / RHO) * (k / pieces)
                ratio = root**RHO
            else:  # from pure noise, evenly in noise / (signal + noise)
                share = 1 - k / pieces * (1 - there.sigma / (there.alpha + there.sigma))
                ratio = share / (1 - share)
            fine.append(schedule.at_ratio(ratio))
    fine.append(levels[len(levels) - 1])
    alpha, sigma = np.array([level.alpha for level in fine]), np.array([level.sigma for level in fine])
    told = np.array([level.t for level in fine[:-1]])
    return Levels(alpha, sigma, told, levels.start, schedule)


class Teacher:
    """The targets of a fit.

    Args:
        levels: the levels of the student, each once.
        network: the network, the student's own.
        solver: what the teacher runs; it must call the network once a level.
        pieces: into how many each cell is cut.

    Raises:
        FitError: the solver cannot be a teacher, or the levels cannot be cut.
    """

    def __init__(self, levels: Levels, network: Network, solver: str, pieces: int) -> None:
        self.levels, self.pieces = levels, pieces
        self._network, self._solver = network, solver
        self._fine = subdivide(levels, pieces)
        self._known: list[tuple[Samples, list[Array]]] = []
        for name in ("alpha", "sigma"):
            off = np.abs(getattr(self._fine, name)[::pieces] - getattr(levels, name))
            assert not off.any(), f"the teacher is not at the student's levels: {name} is off by {off.max():.3g}"
        self.table = self._table(self._fine)

    def _table(self, levels: Levels) -> Tableau:
        if self._solver not in SOLVERS:
            raise FitError(f"teacher: there is no solver {self._solver}; there are {', '.join(SOLVERS)}")
        try:
            table = SOLVERS[self._solver](levels)
        except ValueError as error:
            raise FitError(f"teacher: {error}") from None
        if table.is_stochastic or table.num_steps != len(levels.t):
            raise FitError(f"teacher: {self._solver} is no deterministic solver with one call a level")
        return table

    def trajectory(self, samples: Samples) -> list[Array]:
        """Where the teacher is at each of the student's levels, from the samples' noise; it goes there once."""
        for known, points in self._known:
            if known is samples:
                return points
        points = follow(self.table, self._network, samples)[:: self.pieces]
        self._known.append((samples, points))
        return points

    def onward(self, x: Array, first: int, last: int, samples: Samples) -> Array:
        """Where the teacher goes from ``x`` at the student's level ``first``, at its level ``last``."""
        start, stop = first * self.pieces, last * self.pieces
        fine, end = self._fine, len(self._fine) - 1
        keep = [*range(start, stop + 1), *([end] if stop != end else [])]  # a table ends at clean data
        cut = Levels(fine.alpha[keep], fine.sigma[keep], fine.t[keep[:-1]], None, fine.schedule)
        return follow(self._table(cut), self._network, samples, x, stop - start)[-1]

    def place(self, table: Tableau, i: int) -> int:
        """Which of the student's levels level ``i`` of its table is."""
        same = (np.abs(self.levels.alpha - table.alpha[i]) < 1e-12) & (
            np.abs(self.levels.sigma - table.sigma[i]) <= 1e-12 * table.sigma[0]
        )
        if not same.any():
            raise FitError(f"{table.name}: level {i} is none of the levels it was given, so it has no target")
        return int(same.argmax())
