"""Guided distillation: a student that is told the guidance and runs once. Meng et al. 2022 (arXiv:2210.03142).

    stage 1    minimise  E  w(t) |student(z_t, class, w) - guided teacher(z_t, class, w)|^2         (their eq. 3)
    stage 2    progressive distillation, teacher and student both told w                 (their algorithm 2)

z_t is a real image, noised; w is uniform over a range, and t over the cosine schedule. The student is the
teacher with an embedding of w that begins at zero. Errors are largest at the ends of the range: ask for
more of it than will be served.

The N-step stochastic sampler (their section 3.3) takes steps of twice the length and one step of noise
back, so its student must know steps of two cells from every level of the grid. It is distilled last, from the
deterministic N-step student on the same grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .denoiser import per_row, truncated_snr
from .distillation import Distillation, Stage
from .loop import Batch, Plan, noise_like
from .network import NetworkConfig
from .progressive import halvings, progressive_plan, regression_plan, subdivided, uniform_guidance
from .recipe import Guided


def guided_stages(settings: Guided, sigmas: tuple[float, ...]) -> list[Stage]:
    """Stage 1, the halvings of stage 2, and the stochastic student if asked for."""
    parts = settings.start_steps // settings.num_steps
    first = Stage(
        "student-guided", subdivided(sigmas, settings.sigma_floor, parts), stage_one, settings.stage_one_images,
        config=told_guidance,
    )  # fmt: skip
    later = halvings(settings.start_steps, sigmas, settings.sigma_floor, settings.images)
    stages = [first, *(replace(stage, plan=stage_two) for stage in later)]
    if settings.stochastic:
        stages[-1] = replace(stages[-1], name=f"student-{len(sigmas)}" if later else first.name)
        stages.append(Stage("student", sigmas, stage_stochastic, settings.images, teaches_itself=True))
    stages[-1] = replace(stages[-1], name="student")
    return stages


def stage_one(settings: Guided, distillation: Distillation) -> Plan:
    """Plan the student that replaces the two calls of a guided teacher."""

    def loss(batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor]:
        sigma = torch.tan(torch.rand(len(batch.x), generator=rng) * (math.pi / 2))
        sigma = sigma.clamp(distillation.sigma_floor, distillation.sigmas[0]).to(batch.x.device)
        z = batch.x + per_row(sigma) * noise_like(batch.x, rng)
        w = uniform_guidance((settings.guidance_min, settings.guidance_max), batch, rng)
        with torch.no_grad():
            target = distillation.teacher(z, sigma, batch.label, w)
        x0 = distillation.student(z, sigma, batch.label, w)
        return {"loss": (per_row(truncated_snr(sigma)) * (x0 - target) ** 2).mean()}

    return regression_plan(settings, distillation, loss)


def stage_two(settings: Guided, distillation: Distillation) -> Plan:
    """Plan one halving of the deterministic student."""
    return progressive_plan(settings, distillation, (settings.guidance_min, settings.guidance_max))


def stage_stochastic(settings: Guided, distillation: Distillation) -> Plan:
    """Plan the student of the stochastic sampler."""
    bounds = (settings.guidance_min, settings.guidance_max)
    return progressive_plan(settings, distillation, bounds, stochastic=True)


def told_guidance(config: NetworkConfig) -> NetworkConfig:
    """The teacher's architecture with an embedding of the guidance scale."""
    return replace(config, guidance_embedding=True)
