"""Moment matching, Diff-Instruct and DMD: one gradient, three ways to draw z_s.

A student that jumps from z_t to x0 is right if no later level s can tell: wherever z_s comes to lie, the mean
of its x0 given z_s must be the teacher's. An auxiliary network learns that mean, and the student follows

    d loss / d x0 = w(s)^p (auxiliary(z_s) - teacher(z_s)) / norm                                 (1)

                     z_t                    z_s                              norm
    moment matching  real image + noise     q(z_s | z_t, x0), s in the step  1
    Diff-Instruct    pure noise             x0 + s eps, ln(s) normal         1
    DMD2             student's own state    x0 + s eps, s anywhere           mean |x0 - teacher(z_s)|

Moment matching: Salimans et al. 2024 (arXiv:2406.04103), algorithm 2. Diff-Instruct: Luo et al. 2023
(arXiv:2305.18455), eq. 8; sigma^2 times its score difference is (1). DMD: Yin et al. 2024 (arXiv:2311.18828),
eq. 7 and 8, and with backward simulation and several auxiliary turns arXiv:2405.14867; its discriminator is
not here. Moment matching too can start from the student's own states, and then needs no images.

The auxiliary network's loss is the ordinary denoising loss on the student's x0; moment matching holds it
near the teacher as well, which halves (1) at the optimum:

    w(s) {|x0 - auxiliary(z_s)|^2 + |teacher(z_s) - auxiliary(z_s)|^2}

w is EDM's weight. It grows as 1 / s^2, so with p = 1 the cleanest levels, where little is left to decide,
drown the rest of the student's gradient; p = 1/2 counts the raw network's error alike at every level. On
digits p = 0, 1/2 and 1 gave moment matching feature distances of 53, 62 and 90 at equal cost, the teacher 115.

The teacher may be guided; the student and the auxiliary network run once and so take guidance in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .denoiser import edm_weight, per_row
from .distillation import (
    Distillation,
    Jump,
    Level,
    anywhere,
    from_data,
    from_itself,
    module,
    posterior,
    renoise,
    student_plan,
)
from .loop import Batch, Plan, Turn
from .recipe import DiffInstruct, Dmd, Matching, MomentMatching


def moment_matching(settings: MomentMatching, distillation: Distillation) -> Plan:
    """Plan multistep moment matching, alternating."""
    source = from_data if settings.source == "data" else from_itself
    return matching(settings, replace(distillation, source=source, draw=posterior), holds_near_teacher=True)


def diff_instruct(settings: DiffInstruct, distillation: Distillation) -> Plan:
    """Plan Diff-Instruct, for a one-step student."""
    level = normal_level(settings.log_sigma_mean, settings.log_sigma_std)
    return matching(settings, replace(distillation, source=from_itself, draw=renoise, level=level))


def dmd(settings: Dmd, distillation: Distillation) -> Plan:
    """Plan DMD2 without its discriminator, for a student of any number of steps."""
    source = from_data if settings.source == "data" else from_itself
    return matching(settings, replace(distillation, source=source, draw=renoise, level=anywhere), normalises=True)


def direction(distillation: Distillation, jump: Jump, label: Tensor, power: float, normalises: bool) -> Tensor:
    """Equation (1), ``[B, C, H, W]``."""
    mean = distillation.auxiliary(jump.z_s, jump.sigma_s, label)
    target = distillation.teacher(jump.z_s, jump.sigma_s, label)
    weight = per_row(edm_weight(jump.sigma_s, distillation.sigma_data)) ** power
    if normalises:
        weight = weight / (jump.x0 - target).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
    return weight * (mean - target)


def matching(
    settings: Matching, distillation: Distillation, holds_near_teacher: bool = False, normalises: bool = False
) -> Plan:
    """Plan the alternation of auxiliary and student.

    Args:
        settings: lengths and rates.
        distillation: the networks, and how z_t and z_s come about.
        holds_near_teacher: whether the auxiliary network's loss has its second term.
        normalises: whether (1) is divided by DMD's norm.
    """

    def follow(batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor]:
        with torch.no_grad():
            jump = distillation.jump(batch, rng)
            target = distillation.teacher(jump.z_s, jump.sigma_s, batch.label)
        mean = distillation.auxiliary(jump.z_s, jump.sigma_s, batch.label)
        weight = per_row(edm_weight(jump.sigma_s, distillation.sigma_data))
        away = (weight * (target - mean) ** 2).mean()
        loss = (weight * (jump.x0 - mean) ** 2).mean()
        return {"loss": loss + away if holds_near_teacher else loss, "gap": away}

    def match(batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor]:
        jump = distillation.jump(batch, rng)
        with torch.no_grad():
            towards = direction(distillation, jump, batch.label, settings.weight_power, normalises)
        return {"loss": (jump.x0 * towards).mean()}

    auxiliary = Turn("auxiliary", module(distillation.auxiliary), settings.auxiliary_learning_rate, 0.0, follow)
    student = Turn("student", module(distillation.student), settings.learning_rate, 0.0, match)
    return student_plan(settings, *(auxiliary for _ in range(settings.auxiliary_turns)), student)


def normal_level(mean: float, std: float) -> Level:
    """Levels whose logarithm is normal."""

    def level(distillation: Distillation, step: Tensor, rng: torch.Generator) -> Tensor:
        sigma = (mean + std * torch.randn(len(step), generator=rng)).exp()
        return sigma.clamp(distillation.sigma_floor, distillation.sigmas[0])

    return level
