"""Progressive distillation: one step of the student is two of the teacher, again and again.

    x1 = teacher(z, t)      z'  = x1 + t'/t (z  - x1)          two steps of DDIM, from t by t' to s
    x2 = teacher(z', t')    z'' = x2 + s/t' (z' - x2)

    the x0 with which one step from z ends on z'':

    x0 = ((1 - q') x2 + q' (1 - q) x1) / (1 - q q'),   q = t'/t,  q' = s/t'                        (1)

Salimans & Ho 2022 (arXiv:2202.00512), algorithm 2. Theirs is (z'' - s/t z) / (1 - s/t), which is a small
difference of large numbers where the steps are short; on the path alpha = 1 the z cancels and (1) is left,
a weighted mean, for networks of any prediction type. In the last step s = 0, and (1) is x2.

The loss has their truncated SNR weight. Each stage halves the number of steps, on grids inside one another.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .denoiser import Predictor, per_row, truncated_snr
from .distillation import RHO, Distillation, Stage, ddim_step, from_data, module, student_plan
from .loop import Batch, Loss, Plan, Turn
from .recipe import Progressive, Student


def two_steps(
    teacher: Predictor, z: Tensor, t: Tensor, middle: Tensor, s: Tensor, label: Tensor, w: Tensor | None = None
) -> Tensor:
    """Equation (1).

    Args:
        teacher: the predictor to follow.
        z: latents ``[B, C, H, W]`` at the levels ``t``.
        t: levels before, between and after the two steps, ``[B]``; see ``middle`` and ``s``.
        middle: where it is 0, the teacher takes a single step, to clean data.
        s: may be 0.
        label: classes ``[B]``.
        w: guidance ``[B]``, for predictors that are told it.
    """
    x1 = teacher(z, t, label, w)
    q = middle / t
    lower = torch.where(middle > 0, middle, t)  # any level, where it is not used
    q2 = torch.where(middle > 0, s / lower, 0)
    x2 = torch.where(per_row(middle > 0), teacher(ddim_step(z, x1, t, lower), lower, label, w), x1)
    return (per_row(1 - q2) * x2 + per_row(q2 * (1 - q)) * x1) / per_row(1 - q * q2)


def subdivided(sigmas: tuple[float, ...], floor: float, parts: int) -> tuple[float, ...]:
    """Cut each step of a grid in ``parts``, evenly in warped time; the last step as if it ended at ``floor``."""
    ends = [sigma ** (1 / RHO) for sigma in (*sigmas, floor)]
    return tuple(
        (ends[i] + j / parts * (ends[i + 1] - ends[i])) ** RHO for i in range(len(sigmas)) for j in range(parts)
    )


def progressive_plan(
    settings: Student,
    distillation: Distillation,
    guidance: tuple[float, float] | None = None,
    stochastic: bool = False,
) -> Plan:
    """Plan one halving.

    Args:
        settings: length and rates.
        distillation: teacher, student, and the student's grid; the teacher's has a level between any two.
        guidance: range of w, if both are told it.
        stochastic: the teacher's grid is the student's own, and a step is two cells of it long, from any of its
            levels: for the stochastic sampler of Meng et al.
    """
    sigmas, floor = distillation.sigmas, distillation.sigma_floor
    fine = (*(sigmas if stochastic else subdivided(sigmas, floor, 2)), 0.0, 0.0)
    stride = 1 if stochastic else 2

    def loss(batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor]:
        step = torch.randint(len(sigmas), (len(batch.x),), generator=rng)
        z = from_data(distillation, batch, step, rng)
        w = uniform_guidance(guidance, batch, rng) if guidance else None
        place = (stride * step).to(z.device)
        grid = torch.tensor(fine, device=z.device)
        t, middle, s = grid[place], grid[place + 1], grid[place + 2]
        with torch.no_grad():
            target = two_steps(distillation.teacher, z, t, middle, s, batch.label, w)
        x0 = distillation.student(z, t, batch.label, w)
        return {"loss": (per_row(truncated_snr(t)) * (x0 - target) ** 2).mean()}

    return regression_plan(settings, distillation, loss)


def regression_plan(settings: Student, distillation: Distillation, loss: Loss) -> Plan:
    """Plan a method that lowers one loss of the student's; the rate falls linearly over the second half."""
    return student_plan(settings, Turn("student", module(distillation.student), settings.learning_rate, 0.9, loss))


def progressive_stages(settings: Progressive, sigmas: tuple[float, ...]) -> list[Stage]:
    """A stage for each halving; the first teacher takes ``start_steps``."""
    return halvings(settings.start_steps, sigmas, settings.sigma_floor, settings.images)


def halvings(start_steps: int, sigmas: tuple[float, ...], floor: float, images: int) -> list[Stage]:
    """Stages from a teacher of ``start_steps`` to a student on ``sigmas``."""
    stages, count = [], start_steps // 2
    while count >= len(sigmas):
        name = "student" if count == len(sigmas) else f"student-{count}"
        grid = subdivided(sigmas, floor, count // len(sigmas))
        stages.append(Stage(name, grid, progressive_plan, images, teaches_itself=True))
        count //= 2
    return stages


def uniform_guidance(bounds: tuple[float, float], batch: Batch, rng: torch.Generator) -> Tensor:
    """A w for each row, ``[B]``."""
    low, high = bounds
    return (low + (high - low) * torch.rand(len(batch.x), generator=rng)).to(batch.x.device)
