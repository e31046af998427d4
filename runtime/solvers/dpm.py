"""DPM-Solver and DPM-Solver++, single-step and multistep, and their SDE forms.

Single-step methods spend their inner calls on levels of the grid, as diffusers does, so the number of network
calls is the number of levels and any number will do. On levels uniform in log-SNR the inner points are those
of the papers.
"""

import math
from itertools import pairwise

from ..schedules import Level, Levels
from ..tableau import Tableau
from ..tracer import Linear, Predicted, Trace, trace
from .exponential import Kept, correction, first_order, usable


def dpm_solver(levels: Levels, order: int = 2) -> Tableau:
    """DPM-Solver-1, -2 and -3, single-step, kept as eps: Lu et al. 2022 (arXiv:2206.00927), algorithms 1, 4, 5.

    Args:
        levels: the levels to visit.
        order: 1 (which is `ddim`), 2 or 3.
    """
    return _singlestep(f"dpm_solver_{order}", levels, order, "eps")


def dpmpp_2s(levels: Levels) -> Tableau:
    """DPM-Solver++(2S), single-step: Lu et al. 2022 (arXiv:2211.01095), algorithm 1."""
    return _singlestep("dpmpp_2s", levels, 2, "x0")


def dpmpp_3s(levels: Levels) -> Tableau:
    """DPM-Solver++ of third order, single-step: as `dpm_solver` with order 3, kept as x0."""
    return _singlestep("dpmpp_3s", levels, 3, "x0")


def dpmpp_2m(levels: Levels) -> Tableau:
    """DPM-Solver++(2M), multistep, first and last step of first order.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 2 and eq. 12, with h[i] the log-SNR distance of step i and
    r = h[i-1] / h[i]: x0 is extrapolated by ``(m[i] - m[i-1]) / (2 r)``.
    """
    return _multistep("dpmpp_2m", levels, 2, "x0")


def dpmpp_3m(levels: Levels, lower_order_final: bool | None = None) -> Tableau:
    """DPM-Solver++ of third order, multistep: the Taylor step with two differences, Lu et al. 2022, appendix B.

    Args:
        levels: the levels to visit.
        lower_order_final: whether the last step but one is of second order; left out, below 15 steps, as in the
            authors' code. The last is of first order always.
    """
    return _multistep("dpmpp_3m", levels, 3, "x0", lower_order_final=lower_order_final)


def dpmpp_2m_sde(levels: Levels, eta: float = 1.0) -> Tableau:
    """SDE-DPM-Solver++(2M): Lu et al. 2022 (arXiv:2211.01095), eq. 18, with any share of its noise.

    Args:
        levels: the levels to visit.
        eta: 1 is the paper's SDE, 0 is `dpmpp_2m`.
    """
    return _multistep("dpmpp_2m_sde", levels, 2, "x0", eta)


def dpmpp_3m_sde(levels: Levels, eta: float = 1.0, lower_order_final: bool | None = None) -> Tableau:
    """The third-order SDE form, k-diffusion's sample_dpmpp_3m_sde. Arguments as in `dpmpp_2m_sde` and `dpmpp_3m`."""
    return _multistep("dpmpp_3m_sde", levels, 3, "x0", eta, lower_order_final)


def dpm_solver_2m(levels: Levels) -> Tableau:
    """DPM-Solver of second order, multistep, kept as eps; first and last step of first order.

    Lu et al. 2022 (arXiv:2206.00927), eq. 3.6, with the slope from the call before, as `dpmpp_2m` takes it.
    """
    return _multistep("dpm_solver_2m", levels, 2, "eps")


def dpm_solver_3m(levels: Levels, lower_order_final: bool | None = None) -> Tableau:
    """DPM-Solver of third order, multistep: as `dpm_solver_2m`, with two differences. Argument as in `dpmpp_3m`."""
    return _multistep("dpm_solver_3m", levels, 3, "eps", lower_order_final=lower_order_final)


def dpm_solver_2m_sde(levels: Levels, eta: float = 1.0) -> Tableau:
    """SDE-DPM-Solver(2M), kept as eps: Lu et al. 2022 (arXiv:2211.01095), beside eq. 18.

    A step does not know how the noise it adds will change eps, so its rows miss the variance of their levels, by the
    square of the step at first, and the table says by how much. The step to clean data would add noise; it adds none.

    Args:
        levels: the levels to visit.
        eta: 1 is the paper's SDE, 0 is `dpm_solver_2m`.

    Raises:
        ValueError: the first level is pure noise, or a row misses the variance by more than a table may.
    """
    return _multistep("dpm_solver_2m_sde", levels, 2, "eps", eta)


def _singlestep(name: str, levels: Levels, order: int, kept: Kept) -> Tableau:
    if not 1 <= order <= 3:
        raise ValueError(f"{name}: order {order}, must be 1 to 3")
    _refuse_no_signal(name, levels, kept)

    def solve(net: Trace) -> Linear:
        x = net.start()
        first = 0
        for calls in _groups(len(levels.t), order):
            x = _group(net, x, [levels[i] for i in range(first, first + calls + 1)], kept)
            first += calls
        return x

    return trace(name, kept, levels, solve)


def _groups(rows: int, order: int) -> list[int]:
    """Calls of each step: as many steps of full order as fit, what remains, and one call to clean data."""
    full, rest = divmod(rows - 1, order)
    return [order] * full + [rest] * bool(rest) + [1]


def _group(net: Trace, base: Linear, levels: list[Level], kept: Kept) -> Linear:
    """One step over all the levels; every call is made at the next of them."""
    start = levels[0]
    x, d0 = base, base
    seen: tuple[Level, Linear] | None = None  # the newest call after the first
    for i, (here, there) in enumerate(pairwise(levels)):
        m = getattr(net(x, here), kept)
        if i == 0:
            d0 = m
        elif start.alpha > 0:  # no slope can be taken from pure noise
            seen = here, m
        x = first_order(base, d0, start, there, kept)
        if seen is not None:
            whole = there.log_snr - start.log_snr
            d1 = whole / (seen[0].log_snr - start.log_snr) * (seen[1] - d0)
            last_of_two = i == 1 and len(levels) == 3
            x = x + (correction(1, start, there, kept) / 2 if last_of_two else correction(2, start, there, kept)) * d1
    return x


def _multistep(
    name: str, levels: Levels, order: int, kept: Kept, eta: float = 0.0, lower_order_final: bool | None = None
) -> Tableau:
    _refuse_no_signal(name, levels, kept)
    if not 0 <= eta < math.inf:
        raise ValueError(f"{name}: eta {eta:g}, must be at least 0")
    rows = len(levels.t)
    lowers = rows < 15 if lower_order_final is None else lower_order_final

    def solve(net: Trace) -> Linear:
        x = net.start()
        history: list[tuple[Level, Linear]] = []
        for i, (here, there) in enumerate(levels.steps()):
            said = net(x, here)
            history = [(here, getattr(said, kept)), *history][:order]
            known = usable(history) if here.alpha > 0 else []
            terms = min(len(known), rows - i if lowers or i == rows - 1 else order)
            x = _step(net, said, here, there, known[:terms], kept, eta if there.sigma else 0.0)
        return x

    options = {"eta": eta} if eta not in (0.0, 1.0) else {}
    return trace(name, kept, levels, solve, inexact=bool(eta) and kept == "eps", options=options)


def _step(
    net: Trace, said: Predicted, here: Level, there: Level, known: list[tuple[Level, Linear]], kept: Kept, eta: float
) -> Linear:
    """Equations (1) to (4) of `exponential`, with the slopes from the calls before."""
    h = there.log_snr - here.log_snr
    left, fresh = 1.0, 0.0  # of eps, and the variance of the noise
    if eta and kept == "x0":
        left, fresh = math.exp(-eta * h), -math.expm1(-2 * eta * h)
    elif eta:
        left, fresh = 1 - eta * math.expm1(h), eta * math.expm1(2 * h)
    x = there.alpha * said.x0 + there.sigma * left * said.eps
    if len(known) >= 2:
        (_, m0), (level1, m1) = known[:2]
        d1 = h / (here.log_snr - level1.log_snr) * (m0 - m1)
        if len(known) == 2:
            x = x + correction(1, here, there, kept, eta) / 2 * d1
        else:
            level2, m2 = known[2]
            older = h / (level1.log_snr - level2.log_snr) * (m1 - m2)
            r0, r1 = (here.log_snr - level1.log_snr) / h, (level1.log_snr - level2.log_snr) / h
            d2 = 1 / (r0 + r1) * (d1 - older)
            x = x + correction(2, here, there, kept, eta) * (d1 + r0 * d2) + correction(3, here, there, kept, eta) * d2
    if fresh:
        x = x + there.sigma * math.sqrt(fresh) * net.noise()
    return x


def _refuse_no_signal(name: str, levels: Levels, kept: Kept) -> None:
    if kept == "eps" and levels.alpha[0] == 0:
        raise ValueError(f"{name}: the first level must hold some signal, alpha > 0")
