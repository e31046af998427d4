"""Predictor-corrector solvers at one call a step: the call made at the predicted point also corrects it.

The corrected latent is never shown to the network, so it takes no row of its own: the tracer folds each
correction and the prediction that follows into one.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..schedules import Level, Levels, refuse_unknown
from ..tableau import Tableau
from ..tracer import Linear, Trace, trace
from .exponential import Kept, first_order, phi, usable

Array = NDArray[np.float64]
Known = Sequence[tuple[Level, Linear]]  # predictions, newest first


def unipc(
    levels: Levels,
    order: int = 3,
    *,
    b: Literal["bh1", "bh2"] = "bh2",
    kept: Kept = "x0",
    corrector: bool = True,
    lower_order_final: bool = True,
) -> Tableau:
    """UniPC: Zhao et al. 2023 (arXiv:2302.04867), algorithms 5 to 8; without corrector UniP.

    Args:
        levels: the levels to visit.
        order: of the predictor; the corrector has one more. 1 to 4.
        b: the function B(h) of section 3.3: ``bh1`` is h, ``bh2`` is exp(h) - 1.
        kept: whether slopes are of x0 or of eps.
        corrector: whether to correct.
        lower_order_final: whether the last rows come down to order 1 one by one. The step to clean data is of order
            1 always.

    Raises:
        ValueError: the order is not 1 to 4, or eps is kept and the first level is pure noise.
    """
    name = f"unipc_{order}"
    if not 1 <= order <= 4:
        raise ValueError(f"{name}: order {order}, must be 1 to 4")
    refuse_unknown(f"{name}: b", b, ("bh1", "bh2"))
    refuse_unknown(f"{name}: kept", kept, ("x0", "eps"))
    if kept == "eps" and levels.alpha[0] == 0:
        raise ValueError(f"{name}: the first level must hold some signal, alpha > 0")
    rows = len(levels.t)

    def solve(net: Trace) -> Linear:
        predicted = base = net.start()
        known: Known = []  # before the newest
        last = levels[0]
        used = 0  # order of the last predictor
        for i, (here, there) in enumerate(levels.steps()):
            m = getattr(net(predicted, here), kept)
            at_here = predicted
            if i and corrector and last.alpha > 0:
                at_here = _unified(base, known[:used], (here, m), last, here, b, kept)
            known = usable([(here, m), *known])[:order]
            left = rows - i if lower_order_final or i == rows - 1 else order
            used = min(order, left, len(known))
            base, last = at_here, here
            if used > 1:
                predicted = _unified(base, known[:used], None, here, there, b, kept)
            else:
                predicted = first_order(base, m, here, there, kept)
        return predicted

    options = {key: value for key, value in {"b": b, "kept": kept}.items() if value not in ("bh2", "x0")}
    if not corrector:
        name = f"unip_{order}"
    return trace(name, kept, levels, solve, options=options)


def _unified(
    x: Linear, known: Known, new: tuple[Level, Linear] | None, here: Level, there: Level, b: str, kept: Kept
) -> Linear:
    """UniP, or with the prediction at ``there`` UniC: Zhao et al. 2023, eq. 3 and 5."""
    h = there.log_snr - here.log_snr
    z = -h if kept == "x0" else h
    scale = z if b == "bh1" else math.expm1(z)
    (_, m0), *others = known
    if new is not None:
        others = [*others, new]
    ratios = [(level.log_snr - here.log_snr) / h for level, _ in others]
    n = len(others)
    if n == 1:  # their choice: any value near 1/2 keeps the order
        weights = np.array([0.5])
    else:
        powers = np.vander(ratios, n, increasing=True).T
        moments = [z * phi(k + 1, z) * math.factorial(k) / scale for k in range(1, n + 1)]
        weights = np.linalg.solve(powers, moments)
    outer = -(there.alpha if kept == "x0" else there.sigma) * scale
    x = first_order(x, m0, here, there, kept)
    for weight, ratio, (_, m) in zip(weights, ratios, others, strict=True):
        x = x + outer * weight / ratio * (m - m0)
    return x


def sa_solver(
    levels: Levels,
    predictor: int = 3,
    corrector: int = 3,
    tau: float | Callable[[float], float] = 1.0,
    *,
    modified: bool = True,
    lower_order_final: bool = True,
) -> Tableau:
    """SA-Solver: stochastic Adams in log-SNR. Xue et al. 2023 (arXiv:2309.05019), algorithm 1, eq. 14 and 17.

    Args:
        levels: the levels to visit.
        predictor: predictions the predictor looks at, 1 to 4.
        corrector: predictions the corrector looks at, the new one included, 1 to 4; 0 for no correction.
        tau: how much noise is injected, or that as a function of the level's ``t``; 0 is deterministic.
        modified: change the two-point weights by a term of higher order, as the authors' code does.
        lower_order_final: whether the last rows come down to one prediction one by one. The step to clean data looks
            at one always.

    Raises:
        ValueError: a number of predictions is out of range.
    """
    if not 1 <= predictor <= 4 or not 0 <= corrector <= 4:
        raise ValueError(f"sa_solver: predictor {predictor} must be 1 to 4, corrector {corrector} 0 to 4")
    rows = len(levels.t)

    def solve(net: Trace) -> Linear:
        predicted = net.start()
        redo: Callable[[Known], Linear] | None = None  # the last step again, from the same point with the same noise
        known: Known = []
        for i, (here, there) in enumerate(levels.steps()):
            known = [(here, net(predicted, here).x0), *usable(known)][:4]
            left = rows - i if lower_order_final else 4
            x = predicted
            if redo is not None and corrector:
                x = redo(known[: min(corrector, left + 2)])
            tau_here = tau(here.t) if callable(tau) else tau
            noise = net.noise() if there.sigma and tau_here else None
            step = partial(_stochastic_adams, x, noise=noise, here=here, there=there, tau=tau_here, modified=modified)
            predicted = step(known[: 1 if i == rows - 1 else min(predictor, left)])
            redo = step if here.alpha > 0 else None  # no slope can be taken from pure noise
        return predicted

    options: dict[str, object] = {"predictor": predictor, "corrector": corrector}
    if not callable(tau):
        options["tau"] = tau
    return trace("sa_solver", "x0", levels, solve, options=options)


def _stochastic_adams(
    x: Linear, known: Known, *, noise: Linear | None, here: Level, there: Level, tau: float, modified: bool
) -> Linear:
    """One step from ``here`` to ``there``, by the polynomial in log-SNR through ``known``."""
    h = there.log_snr - here.log_snr
    stretch = 1 + tau**2
    decay = there.sigma / here.sigma * (math.exp(-(tau**2) * h) if tau else 1.0)
    if len(known) == 1:
        weights = np.array([-math.expm1(-stretch * h)])
    else:
        weights = _exponential_integrals(h, stretch, [level.log_snr - here.log_snr for level, _ in known])
        if modified and len(known) == 2:
            change = stretch * (h**2 / 2 - h**2 * phi(2, -stretch * h))
            gap = known[0][0].log_snr - known[1][0].log_snr
            weights += np.array([change, -change]) / gap
    total = decay * x
    for weight, (_, x0) in zip(weights, known, strict=True):
        total = total + there.alpha * weight * x0
    if noise is not None:
        total = total + there.sigma * math.sqrt(-math.expm1(-2 * tau**2 * h)) * noise
    return total


def _exponential_integrals(h: float, stretch: float, knots: list[float]) -> Array:
    """``stretch * integral_0^h exp(-stretch (h - u)) l_j(u) du`` of each Lagrange polynomial over the knots."""
    n = len(knots)
    moments = [stretch * h * h**k * math.factorial(k) * phi(k + 1, -stretch * h) for k in range(n)]
    return np.asarray(np.linalg.solve(np.vander(knots, n, increasing=True).T, moments), np.float64)
