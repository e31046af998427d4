"""From the raw network to a data prediction: EDM's preconditioning, and guidance.

    x0 = c_skip * x + c_out * F(c_in * x, c_noise)                                                (1)
    x0 = x0(no class) + (1 + w) * (x0(class) - x0(no class))                                      (2)

(1) is Karras et al. 2022 (arXiv:2206.00364), eq. 7 and table 1. (2) is classifier-free guidance with
w = 0 unguided, the convention of Meng et al. 2022 (arXiv:2210.03142). At serving time both are numbers
in the table row; this file is for training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # (c_in * x, t, label) -> raw


def precondition(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``c_skip, c_out, c_in, c_noise`` of equation (1), each the shape of ``sigma``."""
    total = torch.sqrt(sigma**2 + sigma_data**2)
    return (sigma_data / total) ** 2, sigma * sigma_data / total, 1 / total, torch.log(sigma) / 4


@dataclass(frozen=True, slots=True)
class Denoiser:
    """A network that predicts the data, guided if ``guidance`` is not zero (and then run twice)."""

    network: Network
    sigma_data: float  # standard deviation of the data
    no_class: int  # the label that means "no class"
    guidance: float = 0.0  # w of equation (2)

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """Predict the data.

        Args:
            x: latents ``[B, C, H, W]`` float32 with ``x = data + sigma * noise``.
            sigma: noise level of each row, ``[B]`` float32, above zero.
            label: class of each row, ``[B]`` int64.

        Returns:
            ``x0``, shape of ``x``.
        """
        c_skip, c_out, c_in, t = precondition(sigma, self.sigma_data)
        scaled = per_row(c_in) * x
        if self.guidance == 0:
            raw = self.network(scaled, t, label)
        else:
            labels = torch.cat([label, torch.full_like(label, self.no_class)])
            both = self.network(torch.cat([scaled, scaled]), torch.cat([t, t]), labels)
            conditional, unconditional = both.chunk(2)
            raw = unconditional + (1 + self.guidance) * (conditional - unconditional)
        return per_row(c_skip) * x + per_row(c_out) * raw


def per_row(value: Tensor) -> Tensor:
    """View ``[B]`` as ``[B, 1, 1, 1]``."""
    return value[:, None, None, None]


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss weight ``1 / c_out ** 2``, under which the raw network's error counts alike at each level."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
