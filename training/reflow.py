"""Reflow: straighten the teacher's trajectories.

    z = (1 - t) x + t eps,   minimise  E |velocity(z, t) - (eps - x)|^2,   t uniform                (1)

over pairs (eps, x) of the noise and the sample that the teacher makes of it. Liu et al. 2022 (arXiv:2209.03003),
eq. 1 and algorithm 1. On the path alpha = 1, z / (1 - t) is x + sigma eps with sigma = t / (1 - t), and (1)
is |x0 - x|^2 / t^2. Straight trajectories need few steps of Euler's method, which is DDIM there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .denoiser import per_row
from .distillation import Distillation
from .loop import Batch, Plan
from .progressive import regression_plan
from .recipe import Reflow
from .trajectories import Trajectories


def reflow(settings: Reflow, distillation: Distillation) -> Plan:
    """Plan one reflow."""
    known = Trajectories(distillation, settings.trajectories, settings.teacher_steps)
    least, most = (sigma / (1 + sigma) for sigma in (distillation.sigma_floor, distillation.sigmas[0]))

    def loss(batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor]:
        states, label = known.draw(len(batch.x), rng)
        t = (least + (most - least) * torch.rand(len(batch.x), generator=rng)).to(states.device)
        sigma = t / (1 - t)
        # The latent at the first level is all noise to the teacher, and sample plus noise to the student.
        x, eps = states[:, -1], states[:, 0] / distillation.sigmas[0]
        x0 = distillation.student(x + per_row(sigma) * eps, sigma, label)
        return {"loss": ((x0 - x) ** 2 / per_row(t) ** 2).mean()}

    return replace(regression_plan(settings, distillation, loss), memory=known.memory)
