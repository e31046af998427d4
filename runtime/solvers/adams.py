"""Adams-Bashforth solvers: the slope of the coming step is extrapolated from the last few.

On every path ``d(x / alpha) = eps d(sigma / alpha)``, so they keep eps and step as

    x' = alpha' * (x / alpha + sum_j w[j] * eps[i-j])                                             (1)

and differ only in the weights: of equal steps (PNDM, iPNDM), or of the steps really taken (DEIS).
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..schedules import Level, Levels, Schedule, refuse_unknown
from ..tableau import Tableau
from ..tracer import Linear, Trace, trace

Array = NDArray[np.float64]

# Extrapolation from equal steps, by how many slopes there are: Liu et al. 2022 (arXiv:2202.09778), eq. 9 and 12.
ADAMS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def pndm(levels: Levels, runge_kutta: bool = False) -> Tableau:
    """PNDM, and as everyone runs it (PLMS, "skip_prk"): the first step twice, then up to four slopes.

    Liu et al. 2022 (arXiv:2202.09778), eq. 9 and 12. Their start is three steps of Runge-Kutta's method (algorithm 2),
    four rows each. The start with one corrected step is Stable Diffusion's (Rombach et al. 2022, ``plms.py``): one row
    more than levels; the first slope at the second level is used for that correction only and not extrapolated from.

    Args:
        levels: the levels to visit. With Runge-Kutta steps they must know their schedule, for the times between them.
        runge_kutta: whether to start as in the paper.

    Raises:
        ValueError: the first level is pure noise, or the schedule is missing.
    """
    name = "pndm_rk" if runge_kutta else "pndm"
    _refuse_no_signal(name, levels)
    schedule = levels.schedule
    if runge_kutta and schedule is None:
        raise ValueError(f"{name}: the levels must know their schedule; make them with a function of schedules")

    def half_way(here: Level, there: Level) -> Level:
        assert schedule is not None
        t = (here.t + there.t) / 2
        return schedule.at_time(math.floor(t) if schedule.whole_times else t)

    def solve(net: Trace) -> Linear:
        x = net.start()
        slopes: list[Linear] = []
        for i, (here, there) in enumerate(levels.steps()):
            first = net(x, here).eps
            slopes = [first, *slopes][:4]
            h = there.ratio - here.ratio
            if runge_kutta and i < 3 and there.sigma:
                middle = half_way(here, there)
                second = net(_move(x, here, middle, (middle.ratio - here.ratio) * first), middle).eps
                third = net(_move(x, here, middle, (middle.ratio - here.ratio) * second), middle).eps
                fourth = net(_move(x, here, there, h * third), there).eps
                x = _move(x, here, there, h / 6 * (first + 2 * second + 2 * third + fourth))
            elif not runge_kutta and i == 0 and there.sigma:
                again = net(_move(x, here, there, h * first), there).eps
                x = _move(x, here, there, h / 2 * (first + again))
            else:
                x = _adams_step(x, here, there, slopes)
        return x

    return trace(name, "eps", levels, solve)


def ipndm(levels: Levels, order: int = 4) -> Tableau:
    """iPNDM: Adams-Bashforth weights of equal steps, building up from one slope.

    Zhang & Chen 2022 (arXiv:2204.13902), section 4.2 and appendix H.2. The weights are those of equal steps in
    sigma / alpha whatever the levels, so on usual levels it converges with order 2 at most.

    Args:
        levels: the levels to visit.
        order: slopes looked at, 1 to 4.
    """
    _refuse_no_signal("ipndm", levels)
    _refuse_order("ipndm", order, 1, 4)

    def solve(net: Trace) -> Linear:
        x = net.start()
        slopes: list[Linear] = []
        for here, there in levels.steps():
            slopes = [net(x, here).eps, *slopes][:order]
            x = _adams_step(x, here, there, slopes)
        return x

    return trace(f"ipndm_{order}", "eps", levels, solve)


def deis(
    levels: Levels,
    order: int = 3,
    variable: Literal["t", "rho", "log_rho"] = "t",
    lower_order_final: bool = False,
) -> Tableau:
    """DEIS: the slope is a polynomial through the last ``order + 1``, integrated over the step exactly.

    Zhang & Chen 2022 (arXiv:2204.13902), eq. 15 (tAB) and section 3.4 (rhoAB), with ``rho = sigma / alpha``.
    In ``log_rho`` it is what diffusers ships; clean data has none, so the last step is then of first order (and
    in ``t`` on EDM's levels, whose time is the logarithm too). In ``rho`` it is also k-diffusion's "LMS".

    Args:
        levels: the levels to visit. In ``t`` they must know their schedule.
        order: degree of the polynomial, 0 to 3; 0 is `ddim`.
        variable: what it is a polynomial in.
        lower_order_final: whether the last rows come down to degree 0 one by one.

    Raises:
        ValueError: the schedule is missing, the degree is not 0 to 3, or the first level is pure noise.
    """
    refuse_unknown("deis: variable", variable, ("t", "rho", "log_rho"))
    name = {"t": "deis", "rho": "deis_rho", "log_rho": "deis_log_rho"}[variable] + f"_{order}"
    _refuse_no_signal(name, levels)
    _refuse_order(name, order, 0, 3)
    if variable == "t" and levels.schedule is None:
        raise ValueError(f"{name}: the levels must know their schedule; make them with a function of schedules")
    clock = _clock(variable, levels.schedule)
    rows = len(levels.t)
    with np.errstate(divide="ignore"):
        reaches_clean = bool(np.isfinite(clock(np.zeros(1))[0]))

    def solve(net: Trace) -> Linear:
        x = net.start()
        slopes: list[Linear] = []
        ratios: list[float] = []
        for i, (here, there) in enumerate(levels.steps()):
            slopes, ratios = [net(x, here).eps, *slopes], [here.ratio, *ratios]
            degree = min(order, i, rows - 1 - i if lower_order_final else order)
            if there.sigma == 0 and not reaches_clean:
                degree = 0
            weights = _integrals(np.array(ratios[: degree + 1]), there.ratio, clock)
            x = _move(x, here, there, _weighted(weights, slopes))
        return x

    return trace(name, "eps", levels, solve)


def _move(x: Linear, here: Level, there: Level, change: Linear) -> Linear:
    return there.alpha * (x / here.alpha + change)


def _adams_step(x: Linear, here: Level, there: Level, slopes: list[Linear]) -> Linear:
    return _move(x, here, there, (there.ratio - here.ratio) * _weighted(ADAMS[len(slopes)], slopes))


def _weighted(weights: tuple[float, ...] | Array, forms: list[Linear]) -> Linear:
    total = weights[0] * forms[0]
    for weight, form in zip(weights[1:], forms[1:], strict=False):
        total = total + weight * form
    return total


def _clock(variable: str, schedule: Schedule | None) -> Callable[[Array], Array]:
    if variable == "t" and schedule is not None:
        return schedule.time
    return np.log if variable == "log_rho" else lambda ratio: ratio


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def _integrals(ratios: Array, end: float, clock: Callable[[Array], Array]) -> Array:
    """Integrals over sigma / alpha, from ``ratios[0]`` to ``end``, of each Lagrange polynomial in the clock.

    Gauss-Legendre in ``asinh(sigma / alpha)``, in which every schedule is smooth: log-SNR where there is noise,
    and linear at clean data.
    """
    if len(ratios) == 1:
        return np.array([end - ratios[0]])
    first, last = np.arcsinh(ratios[0]), np.arcsinh(end)
    u = (first + last) / 2 + (last - first) / 2 * _NODES
    at, knots = clock(np.sinh(u)), clock(ratios)
    measure = (last - first) / 2 * _WEIGHTS * np.cosh(u)
    integrals = np.empty(len(ratios))
    for j in range(len(ratios)):
        others = np.delete(knots, j)
        lagrange = np.prod((at[:, None] - others) / (knots[j] - others), axis=1)
        integrals[j] = measure @ lagrange
    return integrals


def _refuse_no_signal(name: str, levels: Levels) -> None:
    if levels.alpha[0] == 0:
        raise ValueError(f"{name}: the first level must hold some signal, alpha > 0")


def _refuse_order(name: str, order: int, low: int, high: int) -> None:
    if not low <= order <= high:
        raise ValueError(f"{name}: order {order}, must be {low} to {high}")
