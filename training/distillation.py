"""What every distillation method here is made of.

    teacher, student, auxiliary     three predictors; the teacher is frozen
    source                          where z_t comes from: real images, or the student's own trajectory
    level, draw                     which level z_s is on, and how it is reached from z_t and the student's x0
    weight                          in the method's own loss

`jump` puts them together: pick a step of the student's grid, go to its level t, let the student predict,
and come to a level s. A method is then only its losses, and `Stage` says what networks it needs for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Denoiser, Predictor, per_row
from .images import Images
from .loop import Batch, Plan, Turn, noise_like
from .network import NetworkConfig
from .recipe import Student

Source = Callable[["Distillation", Batch, Tensor, torch.Generator], Tensor]  # (.., images, step [B], ..) -> z_t
Draw = Callable[[Tensor, Tensor, Tensor, Tensor, torch.Generator], Tensor]  # (z_t, x0, sigma_t, sigma_s, ..) -> z_s
Level = Callable[["Distillation", Tensor, torch.Generator], Tensor]  # (.., step [B], ..) -> sigma_s [B]

RHO = 7.0  # of the warped time in which s is uniform; EDM's


@dataclass(frozen=True, slots=True)
class Jump:
    """A student's prediction from z_t, and where it leads."""

    z_t: Tensor  # [B, C, H, W]
    sigma_t: Tensor  # [B]
    x0: Tensor  # [B, C, H, W], the student's; carries gradients
    z_s: Tensor  # [B, C, H, W], detached
    sigma_s: Tensor  # [B]


# --- where z_t comes from


def from_data(distillation: Distillation, batch: Batch, step: Tensor, rng: torch.Generator) -> Tensor:
    """Noise real images: the source of moment matching."""
    sigma = distillation.levels(batch.x)[step.to(batch.x.device)]
    return batch.x + per_row(sigma) * noise_like(batch.x, rng)


@torch.no_grad()
def from_itself(distillation: Distillation, batch: Batch, step: Tensor, rng: torch.Generator) -> Tensor:
    """Backward simulation: what the student itself makes of pure noise by that step. No image is looked at.

    Yin et al. 2024 (arXiv:2405.14867), section 4.5. Of ``batch`` only the labels are used.
    """
    levels = distillation.levels(batch.x)
    z = levels[0] * noise_like(batch.x, rng)
    for i in range(int(step.max())):
        rows = (step > i).nonzero().squeeze(1).to(z.device)
        here, there = levels[i].expand(len(rows)), levels[i + 1].expand(len(rows))
        x0 = distillation.student(z[rows], here, batch.label[rows])
        z[rows] = distillation.draw(z[rows], x0, here, there, rng)
    return z


# --- how z_s is drawn, and where


def posterior(z_t: Tensor, x0: Tensor, sigma_t: Tensor, sigma_s: Tensor, rng: torch.Generator) -> Tensor:
    """Draw z_s from q(z_s | z_t, x0) on the path ``alpha = 1``, as ancestral sampling does."""
    keep = (sigma_s / sigma_t) ** 2
    spread = sigma_s * torch.sqrt(1 - keep)
    return per_row(keep) * z_t + per_row(1 - keep) * x0 + per_row(spread) * noise_like(x0, rng)


def renoise(z_t: Tensor, x0: Tensor, sigma_t: Tensor, sigma_s: Tensor, rng: torch.Generator) -> Tensor:
    """Forget z_t: noise x0 afresh, as distribution matching does."""
    return x0 + per_row(sigma_s) * noise_like(x0, rng)


def ddim_step(z_t: Tensor, x0: Tensor, sigma_t: Tensor, sigma_s: Tensor) -> Tensor:
    """From z_t to the level s by the noise that z_t holds. Song et al. 2020 (arXiv:2010.02502), eq. 12."""
    return x0 + per_row(sigma_s / sigma_t) * (z_t - x0)


def within_step(distillation: Distillation, step: Tensor, rng: torch.Generator) -> Tensor:
    """A level between that of the step and the next, uniform in warped time."""
    ends = torch.tensor([*distillation.sigmas, distillation.sigma_floor])
    return torch.minimum(warped(ends[step], ends[step + 1], torch.rand(len(step), generator=rng)), ends[step])


def anywhere(distillation: Distillation, step: Tensor, rng: torch.Generator) -> Tensor:
    """A level of the whole range, uniform in warped time, whatever the step."""
    first, last = torch.tensor(distillation.sigmas[0]), torch.tensor(distillation.sigma_floor)
    return warped(first, last, torch.rand(len(step), generator=rng))


def warped(first: Tensor, last: Tensor, share: Tensor) -> Tensor:
    """The level that lies ``share`` of the way from one to another, on EDM's warped scale."""
    return torch.lerp(first ** (1 / RHO), last ** (1 / RHO), share) ** RHO


@dataclass(frozen=True, slots=True)
class Distillation:
    """Three predictors, the student's grid, and the choices."""

    teacher: Predictor
    student: Predictor
    auxiliary: Predictor
    sigmas: tuple[float, ...]  # levels the student is called at, noisiest first
    sigma_floor: float  # where the last step ends
    sigma_data: float
    images: Images  # training data: their number and labels; data-free methods see no pixel
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    seed: int = 0
    process: int = 0  # this one
    processes: int = 1  # of so many
    source: Source = from_data
    level: Level = within_step
    draw: Draw = posterior

    def levels(self, like: Tensor) -> Tensor:
        """The student's levels, ``[steps]``, beside ``like``."""
        return torch.tensor(self.sigmas, device=like.device)

    def jump(self, batch: Batch, rng: torch.Generator) -> Jump:
        """Let the student predict from a random step of its grid, and come to a level s."""
        step = torch.randint(len(self.sigmas), (len(batch.x),), generator=rng)
        sigma_s = self.level(self, step, rng).to(batch.x.device)
        sigma_t = self.levels(batch.x)[step.to(batch.x.device)]
        z_t = self.source(self, batch, step, rng)
        x0 = self.student(z_t, sigma_t, batch.label)
        z_s = self.draw(z_t, x0.detach(), sigma_t, sigma_s, rng)
        return Jump(z_t, sigma_t, x0, z_s, sigma_s)


def unchanged(config: NetworkConfig) -> NetworkConfig:
    """The student's architecture is the teacher's."""
    return config


@dataclass(frozen=True, slots=True)
class Stage:
    """One training of a method: which networks it needs, and its plan.

    A method has one stage or several; each starts from the network of the one before, the first from the teacher.
    """

    name: str  # of its folder and checkpoint; the last stage is called "student"
    sigmas: tuple[float, ...]  # the student's grid
    plan: Callable[[Any, Distillation], Plan]  # (the method's settings, ..)
    images: int
    teaches_itself: bool = False  # whether the student of the stage before is the teacher
    has_auxiliary: bool = False
    from_scratch: bool = False
    config: Callable[[NetworkConfig], NetworkConfig] = unchanged


def module(predictor: Predictor) -> nn.Module:
    """The network inside a predictor that is trained."""
    network = predictor.network if isinstance(predictor, Denoiser) else predictor
    assert isinstance(network, nn.Module)
    return network


def student_plan(settings: Student, *turns: Turn) -> Plan:
    """Plan the training of a student, its own turn last; the rate falls linearly over the second half."""
    return Plan(
        name="student",
        turns=turns,
        images=settings.images,
        batch=settings.batch,
        decay="late-linear",
        warmup_images=0,
        ema_half_life=settings.ema_half_life,
        checkpoint_every=settings.checkpoint_every,
    )
