"""Solvers that look at one prediction: DDIM and its kin, and the samplers of consistency students.

All say what the next latent holds of the predicted data, the predicted noise and fresh noise:

    x' = alpha' * x0 + sqrt(sigma'^2 - s^2) * eps + s * noise                                     (1)

DDIM has ``s = 0``, the posterior the ``s`` of Bayes' rule, renoising ``s = sigma'``.
"""

import math
from collections.abc import Mapping

import numpy as np

from ..prediction import Form
from ..schedules import Level, Levels
from ..tableau import Tableau
from ..tracer import Linear, Trace, trace


def ddim(levels: Levels, eta: float = 0.0, form: Form = "x0") -> Tableau:
    """DDIM: Euler's method on x / alpha, or that with noise. Song et al. 2020 (arXiv:2010.02502), eq. 12 and 16.

    Args:
        levels: the levels to visit.
        eta: fraction of the posterior's noise; 0 is deterministic, 1 is `ancestral`.
        form: what the history keeps. The sampler is the same; what a fit makes of it is not.
    """
    return _ddim("ddim", levels, eta, form, {"eta": eta} if eta else {})


def ancestral(levels: Levels) -> Tableau:
    """The posterior q(x[i+1] | x[i], x0), sampled: DDIM with eta = 1.

    Ho et al. 2020 (arXiv:2006.11239), eq. 6 and 7; the sampler of moment-matching students, Salimans et al.
    2024 (arXiv:2406.04103), algorithm 1.
    """
    return _ddim("ancestral", levels, 1.0, "x0")


def ddpm(levels: Levels) -> Tableau:
    """DDPM's sampler with the smaller of its two variances: `ancestral`. Ho et al. 2020, algorithm 2."""
    return _ddim("ddpm", levels, 1.0, "x0")


def euler(levels: Levels) -> Tableau:
    """Euler's method on x / alpha with clock sigma / alpha, in which the slope is eps: `ddim`, kept as eps.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 1 without correction; Song et al. 2020, eq. 13.
    """
    return _ddim("euler", levels, 0.0, "eps")


def euler_ancestral(levels: Levels, eta: float = 1.0) -> Tableau:
    """k-diffusion's sample_euler_ancestral: on every path the same as DDIM with that eta."""
    return _ddim("euler_ancestral", levels, eta, "x0", {"eta": eta} if eta != 1 else {})


def _ddim(name: str, levels: Levels, eta: float, form: Form, options: Mapping[str, object] | None = None) -> Tableau:
    if not 0 <= eta <= 1:
        raise ValueError(f"{name}: eta {eta:g}, must be 0 to 1")

    def solve(net: Trace) -> Linear:
        x = net.start()
        for here, there in levels.steps():
            x0, eps = net(x, here)
            s = eta * posterior_sigma(here, there)
            x = there.alpha * x0 + math.sqrt(there.sigma**2 - s**2) * eps
            if s:
                x = x + s * net.noise()
        return x

    return trace(name, form, levels, solve, options=options)


def flow_euler(levels: Levels) -> Tableau:
    """Euler's method on the straight path, ``x' = x + (t' - t) (eps - x0)``: `ddim`, kept as the velocity.

    Liu et al. 2022 (arXiv:2209.03003), section 2.

    Raises:
        ValueError: the levels are not on the straight path.
    """
    refuse_bent("flow_euler", levels)

    def solve(net: Trace) -> Linear:
        x = net.start()
        for here, there in levels.steps():
            x0, eps = net(x, here)
            x = x + (there.sigma - here.sigma) * (eps - x0)
        return x

    return trace("flow_euler", "flow", levels, solve)


def consistency(levels: Levels, sigma_min: float = 0.0) -> Tableau:
    """Predict the data, noise it to the next level, again: Song et al. 2023 (arXiv:2303.01469), algorithm 1.

    The sampler of consistency models, sCM and distribution-matching students; nothing of ``x`` is kept.

    Args:
        levels: the levels to visit.
        sigma_min: the level the network takes for clean data; its noise is not added twice.

    Raises:
        ValueError: ``sigma_min`` is negative.
    """
    if not 0 <= sigma_min < math.inf:
        raise ValueError(f"consistency: sigma_min {sigma_min:g}, must be at least 0")

    def solve(net: Trace) -> Linear:
        x = net.start()
        for here, there in levels.steps():
            x = there.alpha * net(x, here).x0
            if there.sigma > sigma_min:
                x = x + math.sqrt(there.sigma**2 - sigma_min**2) * net.noise()
        return x

    return trace("consistency", "x0", levels, solve, inexact=sigma_min > 0)


def lcm(levels: Levels, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> Tableau:
    """Latent consistency: `consistency` behind a skip connection. Luo et al. 2023 (arXiv:2310.04378), eq. 9.

    The skip makes the function the identity at ``t = 0``; at the times in use it is all but closed, and the table
    states by how much it misses its levels for it.

    Args:
        levels: the levels to visit; their ``t`` counts to 1000.
        timestep_scaling: sharpness of the skip in ``t``.
        sigma_data: width of the skip.

    Raises:
        ValueError: the network is told negative times, as EDM's is.
    """
    if levels.t.min() < 0:
        raise ValueError("lcm: times must count down to 0 at clean data")

    def solve(net: Trace) -> Linear:
        x = net.start()
        for here, there in levels.steps():
            scaled = here.t * timestep_scaling
            c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
            c_out = scaled / math.hypot(scaled, sigma_data)
            x = there.alpha * (c_skip * x + c_out * net(x, here).x0)
            if there.sigma:
                x = x + there.sigma * net.noise()
        return x

    return trace("lcm", "x0", levels, solve, inexact=True)


def tcd(levels: Levels, gamma: float = 0.3) -> Tableau:
    """Trajectory consistency: denoise past the next level, noise back up to it. Zheng et al. 2024 (arXiv:2402.19159).

    Algorithm 4, strategic stochastic sampling: from ``t`` to ``s = (1 - gamma) t'``, then to ``t'``.

    Args:
        levels: the levels to visit, made by a function of `schedules`.
        gamma: how much of the way is denoised and noised again; 0 is DDIM, 1 `consistency`.

    Raises:
        ValueError: the levels do not know their schedule, its time is not 0 at clean data (as EDM's is not), or
            ``gamma`` is not within 0 to 1.
    """  # fmt: skip
    schedule = levels.schedule
    if schedule is None:
        raise ValueError("tcd: the levels must know their schedule; make them with a function of fewstep's schedules")
    if schedule.time(np.zeros(1))[0] != 0:
        raise ValueError("tcd: times must count down to 0 at clean data")
    if not 0 <= gamma <= 1:
        raise ValueError(f"tcd: gamma {gamma:g} must be 0 to 1")

    def solve(net: Trace) -> Linear:
        x = net.start()
        for here, there in levels.steps():
            x0, eps = net(x, here)
            if there.sigma == 0:
                return there.alpha * x0
            time = (1 - gamma) * there.t
            time = math.floor(time) if schedule.whole_times else time
            past = there if time == there.t else schedule.at_time(time)
            up = there.alpha / past.alpha
            x = up * (past.alpha * x0 + past.sigma * eps)
            fresh = there.sigma**2 - (up * past.sigma) ** 2
            if fresh > 0:
                x = x + math.sqrt(fresh) * net.noise()
        raise AssertionError("levels end clean")

    return trace("tcd", "x0", levels, solve, options={"gamma": gamma})


def posterior_sigma(here: Level, there: Level) -> float:
    """Standard deviation of q(x' | x, x0): DDIM's eq. 16 with eta = 1, on any path."""
    fresh = here.sigma**2 - (here.alpha / there.alpha * there.sigma) ** 2
    return there.sigma * math.sqrt(fresh) / here.sigma


def refuse_bent(name: str, levels: Levels) -> None:
    """Refuse levels that are not on the straight path."""
    off = abs(levels.alpha + levels.sigma - 1)
    if off.max() > 1e-9:
        raise ValueError(f"{name}: level {int(off.argmax())} is not on the straight path, alpha + sigma = 1")
