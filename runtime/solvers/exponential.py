"""What exponential integrators share: the linear part of the step exactly, and the phi functions for the rest.

With ``lambda`` the log-SNR, ``h`` its distance and D0, D1, D2 the prediction and its first two differences
scaled to the step (``D_k`` is about ``h^k`` times the k-th derivative over lambda):

    x' = sigma'/sigma * x + alpha' * (hphi_1(-h) D0 + hphi_2(-h) D1 + hphi_3(-h) D2)       D of x0   (1)
    x' = alpha'/alpha * x - sigma' * (hphi_1(h)  D0 + hphi_2(h)  D1 + hphi_3(h)  D2)       D of eps  (2)

Lu et al. 2022 (arXiv:2211.01095), eq. 9, and (arXiv:2206.00927), eq. 3.4 to 3.6. On the reverse SDE, with any share
``eta`` of its noise, the same integrals have other exponents, here with D0 alone:

    x' = sigma'/sigma exp(-eta h) x + alpha' hphi_1(-(1 + eta) h) D0 + sigma' sqrt(1 - exp(-2 eta h)) noise  (3)
    x' = alpha'/alpha x - (1 + eta) sigma' hphi_1(h) D0 + sigma' sqrt(eta (exp(2 h) - 1)) noise              (4)
"""

import math
from collections.abc import Sequence
from typing import Literal

from ..schedules import Level
from ..tracer import Linear

Kept = Literal["x0", "eps"]


def phi(k: int, z: float) -> float:
    """``sum_n z^n / (n + k)!``: (exp(z) - 1) / z for k = 1, and ``phi_{k+1} = (phi_k - 1/k!) / z``."""
    if abs(z) < 1:  # where the recurrence cancels
        return sum(z**n / math.factorial(n + k) for n in range(18))
    value = math.expm1(z) / z
    for i in range(1, k):
        value = (value - 1 / math.factorial(i)) / z
    return value


def hphi(k: int, z: float) -> float:
    """``abs(z) * phi_k(z)``, finite for ``z = -inf``, ``k = 1``."""
    return abs(math.expm1(z)) if k == 1 else abs(z) * phi(k, z)


def first_order(x: Linear, d0: Linear, here: Level, there: Level, kept: Kept) -> Linear:
    """Equations (1) and (2) with D0 alone: DDIM from ``x``, which need not be where ``d0`` was predicted."""
    if kept == "x0":
        decay = there.sigma / here.sigma
        return decay * x + (there.alpha - decay * here.alpha) * d0
    grow = there.alpha / here.alpha
    return grow * x + (there.sigma - grow * here.sigma) * d0


def correction(k: int, here: Level, there: Level, kept: Kept, eta: float = 0.0) -> float:
    """The weight of ``D_{k-1}`` in equations (1) and (2); with a share ``eta`` of the SDE's noise in (3) and (4)."""
    h = there.log_snr - here.log_snr
    if kept == "x0":
        return there.alpha * hphi(k, -(1 + eta) * h)
    return -(1 + eta) * there.sigma * hphi(k, h)


def usable(history: Sequence[tuple[Level, Linear]]) -> list[tuple[Level, Linear]]:
    """The predictions that a slope over log-SNR can be taken from, newest first: those not made in pure noise."""
    return [(level, m) for level, m in history if level.alpha > 0]
