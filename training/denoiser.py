"""From the raw network to a data prediction: preconditioning, and guidance.

    x0 = c_skip * x + c_out * F(c_in * x, c_noise)                                                (1)
    x0 = x0(no class) + (1 + w) * (x0(class) - x0(no class))                                      (2)

(1) is Karras et al. 2022 (arXiv:2206.00364), eq. 7 and table 1. (2) is classifier-free guidance with
w = 0 unguided, the convention of Meng et al. 2022 (arXiv:2210.03142). At serving time both are numbers
in the table row; this file is for training.

Training knows one path, ``x = data + sigma * noise``. Whatever a network was trained on, it is (1) with other
numbers: `precondition` gives EDM's, `parametrise` those of networks that predict x0, eps or v on the
variance-preserving path, or the velocity of the straight one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Network = Callable[..., Tensor]  # (c_in * x, t, label) -> raw; with one input more, 1 + w, if it takes guidance
PredictionType = Literal["edm", "x0", "eps", "v", "flow"]


class Predictor(Protocol):
    """Anything that predicts the data: a `Denoiser`, or a closed form in a test."""

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor, w: Tensor | None = None) -> Tensor:
        """Predict the data; see `Denoiser`."""


def precondition(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``c_skip, c_out, c_in, c_noise`` of equation (1), each the shape of ``sigma``."""
    total = torch.sqrt(sigma**2 + sigma_data**2)
    return (sigma_data / total) ** 2, sigma * sigma_data / total, 1 / total, torch.log(sigma) / 4


def parametrise(prediction: PredictionType, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``c_skip, c_out, c_in, t`` of equation (1) for a prediction type, each the shape of ``sigma``.

    On the variance-preserving path the latent is ``x / sqrt(1 + sigma^2)``, and t the time of the cosine schedule;
    on the straight one it is ``x / (1 + sigma)`` and t its noise. Salimans & Ho 2022 (arXiv:2202.00512), section 4.
    """
    if prediction == "edm":
        return precondition(sigma, sigma_data)
    if prediction == "flow":
        alpha = 1 / (1 + sigma)
        return alpha, -sigma * alpha, alpha, sigma * alpha
    alpha, t = torch.rsqrt(1 + sigma**2), torch.atan(sigma) * (2 / torch.pi)
    if prediction == "x0":
        return torch.zeros_like(sigma), torch.ones_like(sigma), alpha, t
    if prediction == "eps":
        return torch.ones_like(sigma), -sigma, alpha, t
    return alpha**2, -sigma * alpha, alpha, t


@dataclass(frozen=True, slots=True)
class Denoiser:
    """A network that predicts the data, guided if ``guidance`` is not zero (and then run twice)."""

    network: Network
    sigma_data: float  # standard deviation of the data
    no_class: int  # the label that means "no class"
    guidance: float = 0.0  # w of equation (2)
    takes_guidance: bool = False  # whether the network is told 1 + w, and then runs once
    prediction: PredictionType = "edm"
    time: Callable[[Tensor], Tensor] | None = None  # from sigma to what the network is told, if not `parametrise`'s

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor, w: Tensor | None = None) -> Tensor:
        """Predict the data.

        Args:
            x: latents ``[B, C, H, W]`` float32 with ``x = data + sigma * noise``.
            sigma: noise level of each row, ``[B]`` float32, above zero.
            label: class of each row, ``[B]`` int64.
            w: guidance of each row, ``[B]`` float32; ``guidance`` for all if left out.

        Returns:
            ``x0``, shape of ``x``.
        """
        c_skip, c_out, c_in, t = parametrise(self.prediction, sigma, self.sigma_data)
        if self.time is not None:
            t = self.time(sigma)
        scaled = per_row(c_in) * x
        if self.takes_guidance:
            scale = torch.full_like(sigma, 1 + self.guidance) if w is None else 1 + w
            raw = self.network(scaled, t, label, scale)
        elif w is None and self.guidance == 0:
            raw = self.network(scaled, t, label)
        else:
            labels = torch.cat([label, torch.full_like(label, self.no_class)])
            both = self.network(torch.cat([scaled, scaled]), torch.cat([t, t]), labels)
            conditional, unconditional = both.chunk(2)
            weight = 1 + (self.guidance if w is None else per_row(w))
            raw = unconditional + weight * (conditional - unconditional)
        return per_row(c_skip) * x + per_row(c_out) * raw


def per_row(value: Tensor) -> Tensor:
    """View ``[B]`` as ``[B, 1, 1, 1]``."""
    return value[:, None, None, None]


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss weight ``1 / c_out ** 2``, under which the raw network's error counts alike at each level."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def truncated_snr(sigma: Tensor) -> Tensor:
    """``max(SNR, 1)``: the larger of the errors of x0 and eps. Salimans & Ho 2022 (arXiv:2202.00512), section 4."""
    return (1 / sigma**2).clamp(min=1)
