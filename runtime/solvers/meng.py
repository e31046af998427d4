"""The stochastic sampler of guided distillation: two steps ahead, one step of noise back."""

import math

from ..schedules import Levels
from ..tableau import Tableau
from ..tracer import Linear, Trace, trace


def meng_stochastic(levels: Levels) -> Tableau:
    """DDIM to the level after next, then noise back up to the next. Meng et al. 2022 (arXiv:2210.03142), section 3.3.

    The last step goes straight to clean data. The student must have been distilled for steps of two cells from
    every level; see `training.guided`.
    """

    def solve(net: Trace) -> Linear:
        x = net.start()
        for i, (here, there) in enumerate(levels.steps()):
            x0, eps = net(x, here)
            if there.sigma == 0:
                return there.alpha * x0
            past = levels[i + 2]
            up = there.alpha / past.alpha
            x = up * (past.alpha * x0 + past.sigma * eps)
            x = x + math.sqrt(there.sigma**2 - (up * past.sigma) ** 2) * net.noise()
        raise AssertionError("levels end clean")

    return trace("meng_stochastic", "x0", levels, solve)
