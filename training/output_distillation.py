"""Output distillation: regress the teacher's sample from the noise it came from.

    minimise  E  w(t) |student(z_t) - z_0|^2,   z_t on the teacher's deterministic trajectory to z_0

Luhman & Luhman 2021 (arXiv:2101.02388), their loss for t = T alone; here t is any level of the student's grid,
so that it also starts students of several steps. Cheap, needs no images, and blurs: what it is for is a
warm start of methods that begin far from a one-step generator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .denoiser import edm_weight, per_row
from .distillation import Distillation, Stage
from .loop import Batch, Plan
from .progressive import regression_plan
from .recipe import OutputDistillation, Student, WarmStarted
from .trajectories import Trajectories


def output_distillation(settings: OutputDistillation, distillation: Distillation) -> Plan:
    """Plan output distillation for its own sake."""
    return _plan(settings, distillation, settings.trajectories, settings.teacher_steps)


def warm_start(settings: WarmStarted, distillation: Distillation) -> Plan:
    """Plan output distillation before another method."""
    return _plan(settings, distillation, settings.warm_start_trajectories, settings.warm_start_teacher_steps)


def warm_started(settings: WarmStarted, stage: Stage) -> list[Stage]:
    """The stage, behind a warm start if the settings ask for one."""
    first = Stage("student-warm", stage.sigmas, warm_start, settings.warm_start_images)
    return [replace(first), stage] if settings.warm_start_images else [stage]


def _plan(settings: Student, distillation: Distillation, count: int, steps: int) -> Plan:
    known = Trajectories(distillation, count, steps)

    def loss(batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor]:
        states, label = known.draw(len(batch.x), rng)
        step = torch.randint(len(distillation.sigmas), (len(batch.x),), generator=rng).to(states.device)
        sigma = distillation.levels(states)[step]
        x0 = distillation.student(states[torch.arange(len(step)), step], sigma, label)
        weight = per_row(edm_weight(sigma, distillation.sigma_data))
        return {"loss": (weight * (x0 - states[:, -1]) ** 2).mean()}

    return replace(regression_plan(settings, distillation, loss), memory=known.memory)
