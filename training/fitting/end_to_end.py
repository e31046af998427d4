"""All rows together: coefficients, levels and times, by damped least squares through the whole table.

    u[i+1] = u[i] - u[0] * softmax(gaps)[i]               levels, u = (sigma / alpha) ** (1 / 7): stick-breaking
    a[i]   = theory * stretch[i]                          theory: DDIM's row between these levels
    b[i,j] = theory * weight[i,j]
    t[i]   = time(ratio[i] * exp(told[i])) + offset[i]    what the network is told, apart from where it is

Theory moves with the levels while they are learned, and what is learned beside it is near one and near zero: with
free coefficients in its place the same loss ends far worse (Wang et al. 2025, GAS). Stick-breaking keeps the levels
in order, and clean data last, whatever the numbers are. Minimised is the distance of the end to the teacher's end,
from the same noise.

A table holds a few dozen numbers, and a few dozen samples say thousands of things about them. That is the case for
Levenberg and Marquardt: the table is run once more for each number with that number moved a little, from the row on
that first reads it, and the ends, taken as linear in the numbers, are fitted in closed form. Neither gradients nor a
learning rate are needed, so the network is the one that is served. Two predictions in a row are almost the same;
damping by the diagonal bears that, where steps along the gradient do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...runtime.schedules import Levels, Schedule
from ...runtime.tableau import MAX_HISTORY, Tableau, TableauError
from .closed_form import Fitted, declared, trimmed
from .targets import RHO, Array, FitError, Network, Samples, combine, level_of

Float64 = NDArray[np.float64]
MOVE = 3e-3  # of each number, to see what it does: far above float32's noise, far below what bends the end
TRIALS = 8  # steps that are tried, each shorter than the last, before nothing more is to be gained


@dataclass(frozen=True)
class EndToEnd:
    """How to fit end to end."""

    iterations: int = 6
    learn_levels: bool = True

    def fit(
        self, base: Tableau, levels: Levels, network: Network, samples: Samples, ends: Array, history: int
    ) -> Fitted:
        """Fit a table to the teacher's ends.

        Args:
            base: the table to start from; one call a level.
            levels: the levels it was given.
            network: the network.
            samples: what to fit on.
            ends: where the teacher ends, ``[samples, ...]``.
            history: predictions that a row may read, if the base does not read more.

        Raises:
            FitError: see `refuse`.
        """
        self.refuse(base, levels)
        numbers = _Numbers(
            base, levels, min(max(history, base.history), base.num_steps, MAX_HISTORY), self.learn_levels
        )
        values, damping = numbers.first, 1e-2
        table = numbers.table(values)
        walk = _Walk(table, network, samples)
        before = error = _rms(ends - walk.end)
        for _ in range(self.iterations):
            slopes = np.stack([
                ((_Walk(numbers.table(moved), network, samples, walk, row, is_told).end - walk.end) / MOVE).ravel()
                for moved, row, is_told in numbers.moved(values)
            ])  # fmt: skip
            gram, slope = _gram(slopes, (ends - walk.end).ravel())
            for _ in range(TRIALS):
                with np.errstate(all="ignore"):
                    try:
                        trial = values + _step(gram, slope, damping)
                        table_there = numbers.table(trial)
                        there = _Walk(table_there, network, samples)
                        error_there = _rms(ends - there.end)
                    except (TableauError, OverflowError):  # so far that nothing is finite
                        error_there = np.inf
                if error_there < error:
                    break
                damping *= 8
            else:
                break
            values, walk, error, table = trial, there, error_there, table_there
            damping = max(damping / 3, 1e-5)
        return Fitted(declared(replace(table, b=trimmed(table.b))), (before,), (error,), ())

    def refuse(self, base: Tableau, levels: Levels) -> None:
        """Check that a table can be started from.

        Raises:
            FitError: it visits a level twice.
        """
        if base.num_steps != len(levels.t):
            raise FitError(f"{base.name}: end-to-end fits solvers with one call a level")

    def rows_to_run(self, steps: int, history: int) -> int:
        """Network calls for each sample, if no step has to be tried twice."""
        calls = sum((steps - 1 - i) * (1 + min(i + 1, history, MAX_HISTORY)) for i in range(steps))
        if self.learn_levels:
            calls += steps * (steps - 1) + steps * (steps + 1) // 2
        return steps + self.iterations * (calls + steps)


class _Walk:
    """A table that is run: where it was before each row, what the network said there, and where it ended.

    Args:
        table: the table.
        network: the network.
        samples: where to start.
        known: another walk that is the same up to a row.
        row: that row.
        is_told: whether the network is told something else there, and so has to be asked again.
    """

    def __init__(
        self, table: Tableau, network: Network, samples: Samples,
        known: _Walk | None = None, row: int = 0, is_told: bool = True,
    ) -> None:  # fmt: skip
        self.points: list[Array] = known.points[:row] if known else []
        self.said: list[Array] = known.said[:row] if known else []
        x = known.points[row] if known else table.initial_scale * samples.noise
        for i in range(row, table.num_steps):
            is_known = known is not None and i == row and not is_told
            m = known.said[i] if known and is_known else network.predict(x, level_of(table, i), table.form, samples)
            self.points.append(x)
            self.said.append(m)
            x = combine(float(table.a[i]), table.b[i], x, self.said[::-1])
        self.end = x


class _Numbers:
    """The learned numbers, and the table they make."""

    def __init__(self, base: Tableau, levels: Levels, depth: int, learn_levels: bool) -> None:
        if levels.schedule is None:
            raise FitError("the levels do not know their schedule, so they cannot move")
        self._schedule: Schedule = levels.schedule
        self._base, self._learn_levels = base, learn_levels
        self._is_pure = bool(base.alpha[0] == 0)
        ratio = base.sigma[self._is_pure :] / base.alpha[self._is_pure :]
        clock = base.sigma / (base.alpha + base.sigma) if self._is_pure else ratio ** (1 / RHO)
        self._first_clock = float(clock[0])
        self._gaps = np.log(-np.diff(clock))
        steps = base.num_steps
        self._offset = np.zeros(steps)
        alpha, sigma, t = self._levels(self._gaps, np.zeros(steps))
        self._offset = base.t - t
        theory_a, theory_b = _theory(base.form, alpha, sigma)
        self._reads = np.tril(np.ones((steps, depth), bool))
        weight = np.zeros((steps, depth))
        weight[:, : base.history] = base.b / theory_b[:, None]
        learned = [base.a / _unless_zero(theory_a), weight[self._reads]]
        rows = [np.arange(steps), np.nonzero(self._reads)[0]]
        if learn_levels:
            learned += [self._gaps, np.zeros(steps)]
            rows += [np.zeros(steps, int), np.arange(steps)]
        self.first: Float64 = np.concatenate(learned)
        self._rows = np.concatenate(rows)  # the first that reads each number

    def moved(self, values: Float64) -> Iterator[tuple[Float64, int, bool]]:
        """Each number moved: all of them, the row that changes first, and whether the network is told of it there."""
        told = len(values) - self._base.num_steps if self._learn_levels else len(values)
        for k, row in enumerate(self._rows):
            moved = values.copy()
            moved[k] += MOVE
            yield moved, int(row), k >= told

    def table(self, values: Float64) -> Tableau:
        """The table that the numbers make.

        Raises:
            TableauError: they are no numbers, or too large.
        """
        steps, count = self._base.num_steps, int(self._reads.sum())
        weight = np.zeros(self._reads.shape)
        weight[self._reads] = values[steps : steps + count]
        rest = values[steps + count :]
        alpha, sigma, t = self._levels(*(np.split(rest, 2) if self._learn_levels else (self._gaps, np.zeros(steps))))
        theory_a, theory_b = _theory(self._base.form, alpha, sigma)
        a, b = _unless_zero(theory_a) * values[:steps], theory_b[:, None] * weight
        return replace(self._base, alpha=alpha, sigma=sigma, t=t, a=a, b=b, residual=1e5)

    def _levels(self, gaps: Float64, told: Float64) -> tuple[Float64, Float64, Float64]:
        share = np.exp(gaps - gaps.max())
        clock = self._first_clock * (1 - np.cumsum(share / share.sum())[:-1])
        base, path = self._base, self._schedule.path
        signal, noise = (1 - clock, clock) if self._is_pure else (np.ones_like(clock), clock**RHO)
        total = {"ve": signal, "vp": np.hypot(signal, noise), "flow": signal + noise}[path]
        alpha = np.concatenate([base.alpha[:1], signal / total, [1.0]])
        sigma = np.concatenate([base.sigma[:1], noise / total, [0.0]])
        with np.errstate(divide="ignore"):
            ratio = sigma[:-1] / alpha[:-1]
        return alpha, sigma, self._schedule.time(ratio * np.exp(told)) + self._offset


def _theory(form: str, alpha: Float64, sigma: Float64) -> tuple[Float64, Float64]:
    """DDIM's row between each level and the next in a form: weight of the latent, weight of the prediction."""
    here, there, noise, noise_there = alpha[:-1], alpha[1:], sigma[:-1], sigma[1:]
    if form == "eps":
        grow = there / here
        return grow, noise_there - grow * noise
    if form == "x0":
        decay = noise_there / noise
        return decay, there - decay * here
    # x = alpha x0 + sigma eps and m = p x0 + q eps; the next latent is a mixture of the two.
    p, q = (-noise, here) if form == "v" else (-np.ones_like(here), np.ones_like(here))
    determinant = here * q - noise * p
    return (there * q - noise_there * p) / determinant, (here * noise_there - noise * there) / determinant


def _unless_zero(theory: Float64) -> Float64:
    """Theory as a unit: one where it is zero, as the last weight of the latent is in a table that keeps x0."""
    return np.where(theory == 0, 1.0, theory)


def _gram(slopes: Array, miss: Array) -> tuple[Float64, Float64]:
    """Products of the slopes with each other and with what is missing, summed in float64 a part at a time."""
    gram, slope = np.zeros((len(slopes), len(slopes))), np.zeros(len(slopes))
    for k in range(0, slopes.shape[1], 1 << 14):
        part = slopes[:, k : k + (1 << 14)].astype(np.float64)
        gram += part @ part.T
        slope += part @ miss[k : k + (1 << 14)].astype(np.float64)
    return gram, slope


def _step(gram: Float64, slope: Float64, damping: float) -> Float64:
    """Marquardt's step; what moves nothing, as the common size of all gaps, stays where it is."""
    own = np.diag(gram)
    left = gram + np.diag(damping * own + 1e-9 * own.mean() + np.finfo(np.float64).tiny)
    return np.asarray(np.linalg.solve(left, slope))


def _rms(x: Array) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))
