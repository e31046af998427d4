"""Noise schedules: the levels a solver visits and what the network is told at each.

A level is one ``(alpha, sigma)``: there ``x = alpha * x0 + sigma * eps``. A schedule is a function that
returns `Levels`, noisiest first and clean last. Solvers are tables over levels and know no schedule.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Levels:
    """The noise levels of one trajectory."""

    alpha: Array  # [rows + 1]  signal scale
    sigma: Array  # [rows + 1]  noise scale, in units of the data
    t: Array  #     [rows]      what the network is told at level i

    def __post_init__(self) -> None:
        rows = len(self.t)
        if rows < 1 or self.alpha.shape != (rows + 1,) or self.sigma.shape != (rows + 1,):
            raise ValueError(f"levels: {rows} times need {rows + 1} alphas and sigmas, got {len(self.alpha)}")


def karras(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Levels:
    """EDM's levels, ``alpha = 1``: Karras et al. 2022 (arXiv:2206.00364), eq. 5, and zero last.

    Args:
        num_steps: network calls of a one-call-a-step solver.
        sigma_min: last level before zero; not reached when ``num_steps`` is 1.
        sigma_max: first level.
        rho: crowds the levels toward ``sigma_min``.

    Returns:
        Levels with ``t = ln(sigma) / 4``, EDM's c_noise.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: {num_steps}, must be at least 1")
    if not 0 < sigma_min <= sigma_max:
        raise ValueError(f"sigma_min {sigma_min:g} and sigma_max {sigma_max:g} must satisfy 0 < sigma_min <= sigma_max")
    ramp = np.linspace(0, 1, num_steps)
    sigma = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return Levels(np.ones(num_steps + 1), np.append(sigma, 0.0), np.log(sigma) / 4)


def vp_cosine(num_steps: int) -> Levels:
    """Variance preserving, ``alpha = cos(pi t / 2)``, ``t`` uniform from 1 to 0: Salimans & Ho 2022, section 2.

    The log-SNR is bounded at the noisy end as in their code, ``alpha >= exp(-10)``.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: {num_steps}, must be at least 1")
    t = np.linspace(1, 0, num_steps + 1)
    alpha = np.maximum(np.cos(np.pi * t / 2), np.exp(-10.0))
    sigma = np.sqrt(1 - alpha**2)
    alpha[-1], sigma[-1] = 1.0, 0.0
    return Levels(alpha, sigma, t[:-1])


def flow(num_steps: int, shift: float = 1.0) -> Levels:
    """The straight path, ``alpha = 1 - t``, ``sigma = t``, with the timestep shift of SD3.

    Esser et al. 2024 (arXiv:2403.03206), eq. 23: ``t = shift * u / (1 + (shift - 1) * u)``, ``u`` from 1 to 0.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: {num_steps}, must be at least 1")
    u = np.linspace(1, 0, num_steps + 1)
    t = shift * u / (1 + (shift - 1) * u)
    return Levels(1 - t, t, t[:-1])
