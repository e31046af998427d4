"""Consistency models: every latent of a trajectory is sent to the same clean image.

    distillation    minimise  E |f(z_t, t) - f_target(z_s, s)|^2,  z_s one Heun step of the teacher below z_t
    tuning          minimise  E |f(z_t, t) - stop f(z_s, s)| / (t - s),  z_t and z_s of one image and one noise

and f(z, 0) = z, which EDM's preconditioning has built in. Distillation: Song et al. 2023 (arXiv:2303.01469),
algorithm 2, with the target an average of f. Tuning starts from a diffusion model, without a teacher, and lets
s approach t as it goes: Geng et al. 2024 (arXiv:2406.14548), eq. 9 and 10,

    s = t max(0, 1 - (1 + 8 sigmoid(-t)) / q^(stage + 1))                                         (1)

The student is sampled by `runtime.solvers.consistency`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..runtime.schedules import karras
from .denoiser import Predictor, edm_weight, per_row
from .distillation import Distillation, ddim_step, module
from .loop import Batch, Plan, noise_like
from .progressive import regression_plan
from .recipe import ConsistencyDistillation, ConsistencyTuning


def consistency_distillation(settings: ConsistencyDistillation, distillation: Distillation) -> Plan:
    """Plan consistency distillation; the auxiliary network is the averaged target."""
    chain = karras(settings.chain_steps, settings.sigma_floor, settings.sigma_max).sigma
    student, target = module(distillation.student), module(distillation.auxiliary)
    averages = dict(target.named_parameters())

    def loss(batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor]:
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                averages[name].lerp_(parameter, 1 - settings.target_decay)
        grid = torch.tensor(chain, dtype=torch.float32, device=batch.x.device)
        place = torch.randint(len(grid) - 1, (len(batch.x),), generator=rng).to(batch.x.device)
        t, s = grid[place], grid[place + 1]
        z_t = batch.x + per_row(t) * noise_like(batch.x, rng)
        with torch.no_grad():
            z_s = heun_step(distillation.teacher, z_t, t, s, batch.label)
            goal = clean_at_zero(distillation.auxiliary, z_s, s, batch.label)
        x0 = distillation.student(z_t, t, batch.label)
        return {"loss": (per_row(edm_weight(t, distillation.sigma_data)) * (x0 - goal) ** 2).mean()}

    memory = {f"target.{name}": tensor.data for name, tensor in averages.items()}
    return replace(regression_plan(settings, distillation, loss), memory=memory)


def consistency_tuning(settings: ConsistencyTuning, distillation: Distillation) -> Plan:
    """Plan easy consistency tuning."""
    seen = torch.zeros((), dtype=torch.int64)  # steps

    def loss(batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor]:
        stage = int(seen) * settings.doublings * settings.batch // max(settings.images, settings.batch)
        seen.add_(1)
        t = (settings.log_sigma_mean + settings.log_sigma_std * torch.randn(len(batch.x), generator=rng)).exp()
        t = t.clamp(distillation.sigma_floor, distillation.sigmas[0]).to(batch.x.device)
        s = lower_level(t, settings.ratio, stage)
        noise = noise_like(batch.x, rng)
        with torch.no_grad():
            goal = clean_at_zero(distillation.student, batch.x + per_row(s) * noise, s, batch.label)
        x0 = distillation.student(batch.x + per_row(t) * noise, t, batch.label)
        distance = ((x0 - goal) ** 2).mean((1, 2, 3)).add(1e-8).sqrt()
        return {"loss": (distance / (t - s)).mean()}

    return replace(regression_plan(settings, distillation, loss), memory={"seen": seen})


def lower_level(t: Tensor, ratio: float, stage: int) -> Tensor:
    """Equation (1)."""
    return t * (1 - (1 + 8 * torch.sigmoid(-t)) / ratio ** (stage + 1)).clamp(min=0)


def heun_step(teacher: Predictor, z: Tensor, t: Tensor, s: Tensor, label: Tensor) -> Tensor:
    """From level t to s by Karras et al. 2022 (arXiv:2206.00364), algorithm 1; to clean data by Euler's method."""
    first = teacher(z, t, label)
    ahead = ddim_step(z, first, t, s)
    lower = torch.where(s > 0, s, t)
    second = teacher(ahead, lower, label)
    slope = ((z - first) / per_row(t) + (ahead - second) / per_row(lower)) / 2
    return torch.where(per_row(s > 0), z + per_row(s - t) * slope, ahead)


def clean_at_zero(predictor: Predictor, z: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """A consistency function, which leaves clean data as they are."""
    x0 = predictor(z, torch.where(sigma > 0, sigma, 1.0), label)
    return torch.where(per_row(sigma > 0), x0, z)
