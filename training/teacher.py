"""The teacher: a denoiser trained on real images.

    minimise over theta   E  w(sigma) |x - D_theta(x + sigma * eps, sigma, label)|^2

with ln(sigma) normal and w = 1 / c_out^2: Karras et al. 2022 (arXiv:2206.00364), eq. 8 and table 1. The
label is dropped now and then, so that one network serves both sides of guidance.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .denoiser import Denoiser, edm_weight, per_row
from .loop import Batch, Plan, Turn, noise_like
from .recipe import Teacher


def teacher_plan(settings: Teacher, denoiser: Denoiser) -> Plan:
    """Plan EDM training of a denoiser whose network Accelerate has prepared."""
    assert isinstance(denoiser.network, nn.Module)

    def loss(batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor]:
        count, device = len(batch.x), batch.x.device
        log_sigma = settings.log_sigma_mean + settings.log_sigma_std * torch.randn(count, generator=rng)
        sigma = log_sigma.exp().to(device)
        dropped = (torch.rand(count, generator=rng) < settings.label_dropout).to(device)
        label = torch.where(dropped, denoiser.no_class, batch.label)
        x0 = denoiser(batch.x + per_row(sigma) * noise_like(batch.x, rng), sigma, label)
        return {"loss": (per_row(edm_weight(sigma, denoiser.sigma_data)) * (x0 - batch.x) ** 2).mean()}

    return Plan(
        name="teacher",
        turns=(Turn("teacher", denoiser.network, settings.learning_rate, 0.9, loss),),
        images=settings.images,
        batch=settings.batch,
        decay="cosine",
        warmup_images=settings.warmup_images,
        ema_half_life=settings.ema_half_life,
        checkpoint_every=settings.checkpoint_every,
    )
