"""The solvers: each is a function from noise levels to a `Tableau`, citing its paper and equation.

    x[i+1] = a[i] * x[i] + sum_j b[i, j] * m[i-j] + c[i] * noise                                  (1)

All four keep their history as x0, and all end in the same row: at ``sigma = 0`` the answer is ``x0`` itself.
"""

from collections.abc import Callable

import numpy as np

from .schedules import Levels
from .tableau import Tableau


def ddim(levels: Levels) -> Tableau:
    """DDIM with eta = 0: Euler's method on x / alpha. Song et al. 2020 (arXiv:2010.02502), eq. 12."""
    alpha, sigma = levels.alpha, levels.sigma
    a = sigma[1:] / sigma[:-1]
    b = alpha[1:] - a * alpha[:-1]
    return Tableau("ddim", "x0", alpha, sigma, levels.t, a, b[:, None], np.zeros_like(a))


def ancestral(levels: Levels) -> Tableau:
    """The posterior q(x[i+1] | x[i], x0), sampled: DDIM with eta = 1.

    Ho et al. 2020 (arXiv:2006.11239), eq. 6 and 7; the sampler of moment-matching students, Salimans et al.
    2024 (arXiv:2406.04103), algorithm 1.
    """
    alpha, sigma, alpha_, sigma_ = levels.alpha[:-1], levels.sigma[:-1], levels.alpha[1:], levels.sigma[1:]
    ratio = alpha / alpha_
    fresh = sigma**2 - ratio**2 * sigma_**2  # variance of x[i] given x[i+1]
    a = ratio * sigma_**2 / sigma**2
    b = alpha_ * fresh / sigma**2
    c = sigma_ * np.sqrt(fresh) / sigma
    return Tableau("ancestral", "x0", levels.alpha, levels.sigma, levels.t, a, b[:, None], c)


def dpmpp_2m(levels: Levels) -> Tableau:
    """DPM-Solver++(2M), multistep, first and last step of first order.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 2 and eq. 12, with h[i] the log-SNR distance of step i and
    r = h[i-1] / h[i]: x0 is extrapolated by ``(m[i] - m[i-1]) / (2 r)``.
    """
    alpha, sigma = levels.alpha, levels.sigma
    rows = len(levels.t)
    a = sigma[1:] / sigma[:-1]
    phi = alpha[1:] - a * alpha[:-1]  # -alpha' (exp(-h) - 1)
    b = np.zeros((rows, 2))
    b[:, 0] = phi
    if rows > 2:
        with np.errstate(divide="ignore"):  # pure noise has log-SNR -inf: no slope can be taken from it
            h = np.diff(np.log(alpha[:-1] / sigma[:-1]))  # of rows 0 to rows - 2; the last step has infinite h
        extra = phi[1:-1] * h[1:] / (2 * h[:-1])
        b[1:-1, 0] += extra
        b[1:-1, 1] -= extra
    return Tableau("dpmpp_2m", "x0", alpha, sigma, levels.t, a, b, np.zeros(rows))


def heun(levels: Levels) -> Tableau:
    """Heun's second-order method, two rows a step and one for the last: Karras et al. 2022, algorithm 1.

    Written from the predicted point, the corrector is ``x + h / (2 s) * (m[i-1] - m[i])``, with ``s`` the
    level reached and ``h = s - level left``, both as sigma / alpha. So no base point has to be saved.

    Raises:
        ValueError: the first level is pure noise (alpha = 0), where sigma / alpha has no value.
    """
    if levels.alpha[0] == 0:
        raise ValueError("heun: the first level must hold some signal, alpha > 0")
    steps = len(levels.t)
    at = np.repeat(np.arange(steps + 1), 2)[1:-2]  # the levels visited: 0, 1, 1, 2, 2, ..., last
    visited = np.append(at, steps)
    alpha, sigma, t = levels.alpha[visited], levels.sigma[visited], levels.t[at]
    rows = len(at)
    a, b = np.ones(rows), np.zeros((rows, 2))
    a[::2] = sigma[1::2] / sigma[:-1:2]
    b[::2, 0] = alpha[1::2] - a[::2] * alpha[:-1:2]
    clock = sigma / alpha
    left, reached = clock[0 : rows - 1 : 2], clock[1:rows:2]
    correction = alpha[1:rows:2] * (reached - left) / (2 * reached)
    b[1::2, 0], b[1::2, 1] = -correction, correction
    return Tableau("heun", "x0", alpha, sigma, t, a, b, np.zeros(rows))


SOLVERS: dict[str, Callable[[Levels], Tableau]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "heun": heun,
}
