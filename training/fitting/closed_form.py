"""Row by row, in closed form: D-ODE, and least squares over a whole table row.

A step is linear in its coefficients, so the best change of some of them is a small least-squares problem:

    x' = Z c,   Z = [x, m[i], m[i-1], ...],   c = base + V d
    d  = argmin |Z c - target|^2 + ridge * |diag(|z_1|, |z_2|, ...) V d|^2                          (1)

over all samples and their elements. ``V`` says what may change. D-ODE (Kim, Tang, Yu 2024, arXiv:2309.16421)
puts ``m + lambda (m - m_before)`` for the denoising output ``m`` of a step: one column, adding up to zero, so
that right predictions still give right steps. All columns at once is row least squares. The student walks on
what was fitted before the next row is, so later rows see its own trajectory.

The ridge counts each coefficient by how much of the latent it moves, and so needs no units; it matters where
two predictions in a row are almost the same, and a huge multiple of their difference would fit the samples' noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...runtime.tableau import MAX_HISTORY, Tableau
from .targets import Array, FitError, Network, Samples, Target, Teacher, combine, level_of

Float64 = NDArray[np.float64]
Direction = Literal["newest", "combined"]
# Solvers whose denoising output is the combination of several: table 6 of D-ODE, which has PNDM as iPNDM. After PNDM's
# doubled start the combinations leave out the second call, and their difference with it most of what can be corrected.
COMBINED = ("deis", "ipndm")


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted table, and how far its rows were and are from their targets: rms over the samples fitted on."""

    table: Tableau
    before: tuple[float, ...]
    after: tuple[float, ...]
    changes: tuple[float, ...]  # the numbers found: D-ODE's lambda of each row


def fit_rows(
    base: Tableau,
    network: Network,
    samples: Samples,
    teacher: Teacher,
    *,
    target: Target = "global",
    direction: Direction | None = None,
    history: int | None = None,
    ridge: float = 1e-6,
) -> Fitted:
    """Fit a table's rows, one after the other.

    Args:
        base: the solver to start from.
        network: the network.
        samples: what to fit on.
        teacher: what to aim at.
        target: see `targets`.
        direction: D-ODE along the difference of the last two predictions, or of the last two combinations that the
            solver makes of them; left out, every coefficient is free.
        history: predictions that a row may read, if every coefficient is free.
        ridge: see equation (1).

    Raises:
        FitError: the solver adds noise, or visits levels it was not given.
    """
    if base.is_stochastic:
        raise FitError(f"{base.name}: adds noise, so there is no one end to aim at; fit a deterministic solver")
    depths = {"newest": max(2, base.history), "combined": base.history + 1, None: max(base.history, history or 4)}
    depth = min(depths[direction], base.num_steps, MAX_HISTORY)
    places = [teacher.place(base, i) for i in range(base.num_steps + 1)]
    aims = teacher.trajectory(samples) if target == "global" else []
    x = base.initial_scale * samples.noise
    a, b = np.zeros(base.num_steps), np.zeros((base.num_steps, depth))
    seen: list[Array] = []  # predictions, newest first
    before, after, changes = [], [], list[float]()
    aim = x
    for i in range(base.num_steps):
        seen = [network.predict(x, level_of(base, i), base.form, samples), *seen][:depth]
        if aims:
            aim = aims[places[i + 1]]
        elif places[i + 1] != places[i]:  # the second stage of a step aims where the first did
            aim = teacher.onward(x, places[i], places[i + 1], samples)
        columns = [x, *seen]
        coefficients = np.zeros(len(columns))
        coefficients[0] = base.a[i]
        coefficients[1 : 1 + base.history] = base.b[i, : len(seen)]
        free = _directions(base, i, len(columns), direction)
        gram, moments, total = _gram(columns, aim)
        before.append(_rms(coefficients, gram, moments, total, int(x.size)))
        change = _solve(gram, moments, coefficients, free, ridge)
        coefficients += free @ change
        after.append(_rms(coefficients, gram, moments, total, int(x.size)))
        changes.append(float(change[0]) if len(change) else 0.0)
        a[i], b[i, : len(seen)] = coefficients[0], coefficients[1:]
        x = combine(a[i], b[i], x, seen)
    table = declared(replace(base, a=a, b=trimmed(b), residual=1e5))
    return Fitted(table, tuple(before), tuple(after), tuple(changes))


def trimmed(b: Float64) -> Float64:
    """Weights without the oldest predictions that no row reads."""
    return b[:, : 1 + int(np.flatnonzero(b.any(axis=0)).max(initial=0))]


def declared(table: Tableau) -> Tableau:
    """A table that says by how much its rows miss their levels."""
    return replace(table, residual=float(max(np.abs(miss).max() for miss in table.misses())))


def direction_of(solver: str) -> Direction:
    """The direction that D-ODE takes for a solver."""
    return "combined" if solver.startswith(COMBINED) else "newest"


def _directions(base: Tableau, i: int, columns: int, direction: Direction | None) -> Float64:
    """``V`` of equation (1) for row ``i``: ``[columns, free numbers]``."""
    if direction is None:
        return np.eye(columns)
    now = np.zeros(columns)
    weight, weight_before = float(np.sum(base.b[i])), float(np.sum(base.b[i - 1]))
    if direction == "combined" and weight:
        now[1 : 1 + base.history] = base.b[i, : columns - 1] / weight
    else:
        now[1] = 1
    if i == 0:
        if base.form != "eps":  # nothing was predicted before
            return np.zeros((columns, 0))
        now[0] = -1 / base.initial_scale  # in noise, the latent itself is almost eps
        return now[:, None]
    before = np.zeros(columns)
    if direction == "combined" and weight_before:
        known = min(base.history, columns - 2)
        before[2 : 2 + known] = base.b[i - 1, :known] / weight_before
    else:
        before[2] = 1
    return (now - before)[:, None]


def _gram(columns: list[Array], aim: Array) -> tuple[Float64, Float64, float]:
    """``Z' Z``, ``Z' target`` and ``|target|^2``, summed in float64 a few samples at a time; Z is never stored."""
    gram, moments, total = np.zeros((len(columns), len(columns))), np.zeros(len(columns)), 0.0
    for k in range(0, len(aim), 32):
        z = np.stack([column[k : k + 32].ravel() for column in columns]).astype(np.float64, copy=False)
        wanted = aim[k : k + 32].ravel().astype(np.float64, copy=False)
        gram += z @ z.T
        moments += z @ wanted
        total += float(wanted @ wanted)
    return gram, moments, total


def _solve(gram: Float64, moments: Float64, base: Float64, free: Float64, ridge: float) -> Float64:
    if not free.shape[1]:
        return np.zeros(0)
    left = free.T @ gram @ free + ridge * (free.T * np.diag(gram)) @ free
    scale = np.sqrt(np.maximum(np.diag(left), np.finfo(np.float64).tiny))  # predictions and latents differ in size
    right = free.T @ (moments - gram @ base)
    solved = np.linalg.lstsq(left / np.outer(scale, scale), right / scale, rcond=1e-14)[0]
    return np.asarray(solved / scale, np.float64)


def _rms(c: Float64, gram: Float64, moments: Float64, total: float, count: int) -> float:
    squares = float(c @ gram @ c) - 2 * float(c @ moments) + total
    return math.sqrt(max(0.0, squares) / count)
