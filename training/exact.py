"""An exact teacher: data from a Gaussian mixture, whose best denoiser is known in closed form.

    E[x0 | x] = sum_k r_k (mu_k + alpha s_k^2 / v_k (x - alpha mu_k)),   v_k = alpha^2 s_k^2 + sigma^2          (1)

with ``r_k`` the posterior weight of component ``k``. Solvers, tables and fits are judged on it without any
error of learning. Float64 numpy; no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.prediction import Prediction, form_weights
from ..runtime.tableau import Tableau

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Mixture:
    """Isotropic components; a single one of scale zero is a point mass."""

    means: Array  # [components, dimensions]
    scales: Array  # [components]  standard deviation of each
    weights: Array  # [components]  adding up to 1

    @classmethod
    def random(cls, dimensions: int = 16, components: int = 5, scale: float = 0.2, seed: int = 0) -> Mixture:
        """Means drawn from the standard normal, so that the data have about unit variance."""
        means = np.random.default_rng(seed).standard_normal((components, dimensions))
        return cls(means, np.full(components, scale), np.full(components, 1 / components))

    def x0(self, x: Array, alpha: float, sigma: float) -> Array:
        """Equation (1): the best prediction of the data, for ``x [..., dimensions]`` at a noise level."""
        variance = (alpha * self.scales) ** 2 + sigma**2
        off = x[..., None, :] - alpha * self.means
        log_weight = np.log(self.weights) - ((off**2).sum(-1) / variance + x.shape[-1] * np.log(variance)) / 2
        posterior = np.exp(log_weight - log_weight.max(-1, keepdims=True))
        posterior /= posterior.sum(-1, keepdims=True)
        shrink = (alpha * self.scales**2 / variance)[:, None]
        return np.asarray((posterior[..., None] * (self.means + shrink * off)).sum(-2))

    def output(self, prediction: Prediction, x: Array, alpha: float, sigma: float) -> Array:
        """What a network of that prediction type says: its raw output, scaled input and all."""
        p, q = prediction.weights(alpha, sigma)
        x0 = self.x0(x, alpha, sigma)
        return p * x0 + q * (x - alpha * x0) / sigma

    def sample(self, num: int, generator: np.random.Generator) -> Array:
        """Draw data, ``[num, dimensions]``."""
        which = generator.choice(len(self.weights), num, p=self.weights)
        noise = generator.standard_normal((num, self.means.shape[1]))
        return np.asarray(self.means[which] + self.scales[which, None] * noise)


def run(
    tableau: Tableau, x0_of: Callable[[Array, float, float], Array], x: Array, noise: Callable[[int], Array]
) -> list[Array]:
    """Follow a table in float64.

    Args:
        tableau: the table.
        x0_of: predicts the data from ``(x, alpha, sigma)``.
        x: the initial latent, its scale included.
        noise: the noise that row ``i`` adds, in the shape of ``x``; asked where the row has any.

    Returns:
        The latent before each network call, and the sample last.
    """
    points = [x]
    history: list[Array] = []  # newest first
    for i in range(tableau.num_steps):
        alpha, sigma = float(tableau.alpha[i]), float(tableau.sigma[i])
        x0 = x0_of(x, alpha, sigma)
        on_x0, on_eps = form_weights(tableau.form, alpha, sigma)
        m = on_x0 * x0
        if on_eps:
            m = m + on_eps * (x - alpha * x0) / sigma
        history = [m, *history][: tableau.history]
        x = tableau.a[i] * x
        for weight, said in zip(tableau.b[i], history, strict=False):
            if weight:
                x = x + weight * said
        if tableau.c[i]:
            x = x + tableau.c[i] * noise(i)
        points.append(x)
    return points
