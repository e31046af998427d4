"""Prediction types: what a network's output says about the data and the noise.

Every output in use is a fixed combination of the two, ``output = p * x0 + q * eps``, and the latent is
another, ``x = alpha * x0 + sigma * eps``. So any form can be had from the latent and any output,

    m = k_x * x + k_m * output                                                                    (1)

with two numbers per noise level, which stand in the table row. Nothing else in fewstep knows what a
network predicts: epsilon, v and EDM networks run any solver, in whichever form it keeps its history.
"""

import math
from dataclasses import dataclass
from typing import Literal

Form = Literal["x0", "eps", "v", "flow"]
FORMS: tuple[Form, ...] = ("x0", "eps", "v", "flow")


def form_weights(form: Form, alpha: float, sigma: float) -> tuple[float, float]:
    """``(p, q)`` of ``form = p * x0 + q * eps`` at one noise level."""
    if form == "x0":
        return 1.0, 0.0
    if form == "eps":
        return 0.0, 1.0
    if form == "v":  # Salimans & Ho 2022 (arXiv:2202.00512), appendix D
        return -sigma, alpha
    return -1.0, 1.0  # flow: the velocity of the straight path, eps - x0


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one network predicts, and how its input is scaled.

    ``edm`` is the raw network F of EDM's preconditioning, Karras et al. 2022 (arXiv:2206.00364), eq. 7 and
    table 1: ``x0 = c_skip * x + c_out * F(c_in * x, t)`` on the path ``alpha = 1``.
    """

    type: Literal["x0", "eps", "v", "flow", "edm"]
    sigma_data: float = 0.5  # standard deviation of the data; read by edm only

    def c_in(self, alpha: float, sigma: float) -> float:
        """Scale of the network's input at one noise level."""
        return 1 / math.hypot(sigma, self.sigma_data) if self.type == "edm" else 1.0

    def weights(self, alpha: float, sigma: float) -> tuple[float, float]:
        """``(p, q)`` of ``output = p * x0 + q * eps`` at one noise level."""
        if self.type != "edm":
            return form_weights(self.type, alpha, sigma)
        if alpha != 1:
            raise ValueError(f"an edm network is defined for alpha = 1, not {alpha:g}")
        total = math.hypot(sigma, self.sigma_data)
        c_skip, c_out = (self.sigma_data / total) ** 2, sigma * self.sigma_data / total
        return (1 - c_skip) / c_out, -c_skip * sigma / c_out

    def to_form(self, form: Form, alpha: float, sigma: float) -> tuple[float, float]:
        """``(k_x, k_m)`` of equation (1) at one noise level.

        Raises:
            ValueError: the output and the latent are parallel there, as epsilon is at ``alpha = 0``.
        """
        if form == self.type:
            return 0.0, 1.0
        (p, q), (want_x0, want_eps) = self.weights(alpha, sigma), form_weights(form, alpha, sigma)
        determinant = alpha * q - sigma * p
        if abs(determinant) < 1e-9:
            raise ValueError(f"{form} cannot be had from {self.type} at alpha = {alpha:g}, sigma = {sigma:g}")
        return (want_x0 * q - want_eps * p) / determinant, (alpha * want_eps - sigma * want_x0) / determinant
