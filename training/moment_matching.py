"""Multistep moment matching, alternating: Salimans et al. 2024 (arXiv:2406.04103), algorithm 2.

A student that jumps from level t to x0 is right if no later level s can tell: for every z_s reached by
its own jump, the mean of its x0 given z_s must be the teacher's.

    z_t = x + sigma_t eps                a real image, noised to a level of the student's grid
    x0  = student(z_t)
    z_s ~ q(z_s | z_t, x0)               the ancestral posterior, with the student's own x0
    auxiliary:  w(s) {|x0 - auxiliary(z_s)|^2 + |teacher(z_s) - auxiliary(z_s)|^2}
    student:    w(s)^p <x0, stop[auxiliary(z_s) - teacher(z_s)]>

w is EDM's weight. It grows as 1 / s^2, so with p = 1 the cleanest levels, where little is left to decide,
drown the rest of the student's gradient; p = 1/2 counts the raw network's error alike at every level. On
digits p = 0, 1/2 and 1 gave feature distances of 53, 62 and 90 at equal cost, the teacher 115.

The auxiliary network learns the mean of the student's x0 given z_s, and is held near the teacher. The
teacher may be guided; the student and the auxiliary network run once and so take guidance in.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .denoiser import Denoiser, edm_weight, per_row
from .distillation import Distillation
from .loop import Batch, Plan, Turn
from .recipe import Student


def moment_matching_plan(settings: Student, distillation: Distillation) -> Plan:
    """Plan algorithm 2 on a teacher, a student and an auxiliary network."""
    teacher, student, auxiliary = distillation.teacher, distillation.student, distillation.auxiliary

    def follow(batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor]:
        with torch.no_grad():
            jump = distillation.jump(batch, rng)
            target = teacher(jump.z_s, jump.sigma_s, batch.label)
        mean = auxiliary(jump.z_s, jump.sigma_s, batch.label)
        weight = per_row(edm_weight(jump.sigma_s, student.sigma_data))
        away = (weight * (target - mean) ** 2).mean()
        return {"loss": (weight * (jump.x0 - mean) ** 2).mean() + away, "gap": away}

    def match(batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor]:
        jump = distillation.jump(batch, rng)
        with torch.no_grad():
            mean = auxiliary(jump.z_s, jump.sigma_s, batch.label)
            target = teacher(jump.z_s, jump.sigma_s, batch.label)
            weight = per_row(edm_weight(jump.sigma_s, student.sigma_data)) ** settings.weight_power
            direction = weight * (mean - target)
        return {"loss": (jump.x0 * direction).mean()}

    return Plan(
        name="student",
        turns=(
            Turn("auxiliary", module(auxiliary), settings.auxiliary_learning_rate, 0.0, follow),
            Turn("student", module(student), settings.learning_rate, 0.0, match),
        ),
        images=settings.images,
        batch=settings.batch,
        decay="late-linear",
        warmup_images=0,
        ema_half_life=settings.ema_half_life,
        checkpoint_every=settings.checkpoint_every,
    )


def module(denoiser: Denoiser) -> nn.Module:
    """The network inside a denoiser that is trained."""
    assert isinstance(denoiser.network, nn.Module)
    return denoiser.network
