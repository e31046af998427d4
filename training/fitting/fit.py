"""One fit, whatever the method: base solver in, fitted table and its measured gain out."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ...runtime.schedules import Levels
from ...runtime.solvers import SOLVERS, why_no_table
from ...runtime.tableau import Tableau
from .closed_form import Direction, direction_of, fit_rows
from .end_to_end import EndToEnd
from .targets import Array, FitError, Network, Samples, Target, Teacher, follow

__all__ = ["METHODS", "Fit", "FitError", "Method", "fit", "table_of"]

Method = Literal["dode", "rows", "end-to-end"]
METHODS: tuple[Method, ...] = ("dode", "rows", "end-to-end")
RIDGES = {"dode": 1e-6, "rows": 1e-4}  # five free numbers overfit a hundred small samples where one does not


@dataclass(frozen=True, slots=True)
class Fit:
    """What came of a fit. Errors are rms over elements, against the teacher from the same noise."""

    table: Tableau
    base: Tableau
    teacher: Tableau
    before: float  # at the end, on fresh noise: the base solver
    after: float  # and the fitted table
    row_residuals: tuple[float, ...]  # of each row, on the samples fitted on; of the end alone for end-to-end
    changes: tuple[float, ...]  # D-ODE's lambda of each row
    seconds: float


def fit(
    network: Network,
    levels: Levels,
    solver: str,
    method: Method,
    samples: Samples,
    fresh: Samples,
    *,
    pieces: int = 10,
    target: Target = "global",
    teacher: str = "dpmpp_2m",
    direction: Direction | None = None,
    history: int = 4,
    ridge: float | None = None,
    end_to_end: EndToEnd = EndToEnd(),  # noqa: B008, it is frozen
) -> Fit:
    """Fit a table.

    Args:
        network: the network, guidance inside.
        levels: the levels that the solver is given; they must know their schedule.
        solver: the base solver, by its name in `SOLVERS`.
        method: what to fit; see the package.
        samples: what to fit on.
        fresh: what to measure on; other noise.
        pieces: teacher steps in a step of the student.
        target: the teacher's own trajectory, or the teacher anew from each of the student's latents.
        teacher: the teacher's solver.
        direction: for ``dode``; left out, the one that D-ODE has for the solver.
        history: for ``rows`` and ``end-to-end``: predictions that a row may read, if the base does not read more.
        ridge: of the rows' least squares; left out, `RIDGES`.
        end_to_end: for ``end-to-end``: how; it begins where ``rows`` ends.

    Raises:
        FitError: it cannot be made; one line says why.
    """
    start_s = time.perf_counter()
    base = table_of(solver, levels)
    aim = Teacher(levels, network, teacher, pieces)
    if base.is_stochastic:
        raise FitError(f"{base.name}: adds noise, so there is no one end to aim at; fit a deterministic solver")
    if method == "end-to-end":
        if target == "local":
            raise FitError("end-to-end aims at the teacher's end; a local target is for dode and rows")
        end_to_end.refuse(base, levels)
    row_by_row: Method = "dode" if method == "dode" else "rows"  # which is where end-to-end begins
    fitted = fit_rows(
        base, network, samples, aim, target=target, history=history,
        direction=(direction or direction_of(solver)) if method == "dode" else None,
        ridge=RIDGES[row_by_row] if ridge is None else ridge,
    )  # fmt: skip
    if method == "end-to-end":
        fitted = end_to_end.fit(fitted.table, levels, network, samples, aim.trajectory(samples)[-1], history)
    table = replace(fitted.table, name=f"{method}-{base.name}")
    wanted = aim.trajectory(fresh)[-1]
    before, after = (rms(follow(t, network, fresh)[-1] - wanted) for t in (base, table))
    return Fit(table, base, aim.table, before, after, fitted.after, fitted.changes, time.perf_counter() - start_s)


def table_of(solver: str, levels: Levels) -> Tableau:
    """A solver's table, by the solver's name."""
    refuse_unknown(solver)
    try:
        return SOLVERS[solver](levels)
    except ValueError as error:
        raise FitError(str(error)) from None


def refuse_unknown(solver: str) -> None:
    """Check a solver's name; what cannot be a table is told why.

    Raises:
        FitError: there is no such solver.
    """
    if reason := why_no_table(solver):
        raise FitError(f"solver: {solver} is no table: it {reason}")
    if solver not in SOLVERS:
        raise FitError(f"solver: there is no {solver}; there are {', '.join(SOLVERS)}")


def rms(x: Array) -> float:
    """Root of the mean square of all elements."""
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))
