"""What every distillation method here is made of.

    teacher, student, auxiliary     three denoisers; the teacher is frozen
    source                          where z_t comes from: real images, or the student's own trajectory
    draw                            how z_s is reached from z_t and the student's x0: posterior or renoise

`jump` puts them together: pick a step of the student's grid, go to its level t, let the student predict,
and come back to a level s inside that step. A method is then only its losses on the jump.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Denoiser, per_row
from .loop import Batch, noise_like

Source = Callable[[Batch, Tensor, torch.Generator], Tensor]  # (images, sigma_t [B]) -> z_t
Draw = Callable[[Tensor, Tensor, Tensor, Tensor, torch.Generator], Tensor]  # (z_t, x0, sigma_t, sigma_s) -> z_s

RHO = 7.0  # of the warped time in which s is uniform; EDM's


@dataclass(frozen=True, slots=True)
class Jump:
    """A student's prediction from z_t, and where it leads."""

    z_t: Tensor  # [B, C, H, W]
    sigma_t: Tensor  # [B]
    x0: Tensor  # [B, C, H, W], the student's; carries gradients
    z_s: Tensor  # [B, C, H, W], detached
    sigma_s: Tensor  # [B]


def from_data(batch: Batch, sigma: Tensor, rng: torch.Generator) -> Tensor:
    """Noise real images: the source of moment matching."""
    return batch.x + per_row(sigma) * noise_like(batch.x, rng)


def posterior(z_t: Tensor, x0: Tensor, sigma_t: Tensor, sigma_s: Tensor, rng: torch.Generator) -> Tensor:
    """Draw z_s from q(z_s | z_t, x0) on the path ``alpha = 1``, as ancestral sampling does."""
    keep = (sigma_s / sigma_t) ** 2
    spread = sigma_s * torch.sqrt(1 - keep)
    return per_row(keep) * z_t + per_row(1 - keep) * x0 + per_row(spread) * noise_like(x0, rng)


def renoise(z_t: Tensor, x0: Tensor, sigma_t: Tensor, sigma_s: Tensor, rng: torch.Generator) -> Tensor:
    """Forget z_t: noise x0 afresh, as distribution matching does."""
    return x0 + per_row(sigma_s) * noise_like(x0, rng)


@dataclass(frozen=True, slots=True)
class Distillation:
    """Three denoisers, the student's grid, and the two choices."""

    teacher: Denoiser
    student: Denoiser
    auxiliary: Denoiser
    sigmas: tuple[float, ...]  # levels the student is called at, noisiest first
    sigma_floor: float  # where the last step ends
    source: Source = from_data
    draw: Draw = posterior

    def jump(self, batch: Batch, rng: torch.Generator) -> Jump:
        """Let the student predict from a random step of its grid; s is uniform in warped time."""
        count, device = len(batch.x), batch.x.device
        ends = torch.tensor([*self.sigmas, self.sigma_floor])
        step = torch.randint(len(self.sigmas), (count,), generator=rng)
        sigma_t, end = ends[step], ends[step + 1]
        share = torch.rand(count, generator=rng)
        warped = sigma_t ** (1 / RHO) + share * (end ** (1 / RHO) - sigma_t ** (1 / RHO))
        sigma_t, sigma_s = sigma_t.to(device), torch.minimum(warped**RHO, sigma_t).to(device)
        z_t = self.source(batch, sigma_t, rng)
        x0 = self.student(z_t, sigma_t, batch.label)
        z_s = self.draw(z_t, x0.detach(), sigma_t, sigma_s, rng)
        return Jump(z_t, sigma_t, x0, z_s, sigma_s)
