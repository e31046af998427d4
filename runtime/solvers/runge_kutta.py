"""Two-stage solvers: go to the next level, look at the slope there, go again with the mean of both slopes.

The step goes back to where it began, yet no latent is kept for it: see `tracer`.
"""

import math

from ..schedules import Level, Levels
from ..tableau import Tableau
from ..tracer import Linear, Trace, trace
from .one_step import refuse_bent


def heun(
    levels: Levels,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
) -> Tableau:
    """Heun's second-order method, two rows a step and one for the last: Karras et al. 2022 (arXiv:2206.00364).

    Algorithm 1, and with churn algorithm 2: before a step, noise is added until its level has grown by
    ``gamma = min(churn / steps, sqrt(2) - 1)``.

    Args:
        levels: the levels to visit. With churn they must know their schedule.
        churn: S_churn.
        churn_range: S_tmin and S_tmax, sigma / alpha between which noise is added.
        churn_noise: S_noise; other than 1, rows miss the variance of their levels, and the table says so.

    Raises:
        ValueError: the first level is pure noise (alpha = 0), where sigma / alpha has no value, or churn has no
            schedule to take its levels from.
    """
    if levels.alpha[0] == 0:
        raise ValueError("heun: the first level must hold some signal, alpha > 0")
    schedule = levels.schedule
    for what, value in {"churn": churn, "churn_noise": churn_noise}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"heun: {what} {value:g}, must be at least 0")
    if churn and schedule is None:
        raise ValueError("heun: for churn the levels must know their schedule; make them with a function of schedules")
    gamma = min(churn / len(levels.t), math.sqrt(2) - 1)

    def churned(net: Trace, x: Linear, here: Level) -> tuple[Linear, Level]:
        if not gamma or schedule is None or not churn_range[0] <= here.ratio <= churn_range[1]:
            return x, here
        up = schedule.at_ratio(here.ratio * (1 + gamma))
        fresh = math.sqrt(up.ratio**2 - here.ratio**2) * churn_noise
        return up.alpha * (x / here.alpha + fresh * net.noise()), up

    def solve(net: Trace) -> Linear:
        x = net.start()
        for level, there in levels.steps():
            x, here = churned(net, x, level)
            h = there.ratio - here.ratio
            x0, slope = net(x, here)
            guess = there.alpha * x0 + there.sigma * slope
            if there.sigma == 0:
                return guess
            x = guess + there.alpha * h / 2 * (net(guess, there).eps - slope)
        raise AssertionError("levels end clean")

    options = {"churn": churn, "churn_range": churn_range, "churn_noise": churn_noise} if churn else {}
    return trace("heun", "x0", levels, solve, inexact=bool(churn) and churn_noise != 1, options=options)


def flow_heun(levels: Levels) -> Tableau:
    """Heun's method on the straight path with the velocity ``eps - x0``, two rows a step and one for the last.

    Not `heun`, whose clock is sigma / alpha and not t; this one starts from pure noise. Raises what `flow_euler`
    raises.
    """
    refuse_bent("flow_heun", levels)

    def solve(net: Trace) -> Linear:
        x = net.start()
        for here, there in levels.steps():
            h = there.sigma - here.sigma
            x0, eps = net(x, here)
            guess = x + h * (eps - x0)
            if there.sigma == 0:
                return guess
            x0_there, eps_there = net(guess, there)
            x = guess + h / 2 * ((eps_there - x0_there) - (eps - x0))
        raise AssertionError("levels end clean")

    return trace("flow_heun", "flow", levels, solve)
