"""The teacher's own trajectories, from pure noise to a sample: what reflow and output distillation learn from.

They are made once, when the first loss asks, and are part of the checkpoint: a resumed run goes on with the
same ones. No image is looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.solvers import dpmpp_2m
from .distillation import Distillation
from .loop import generator
from .progressive import subdivided
from .sampling import follow, ve_levels


class Trajectories:
    """Some of the teacher's trajectories, by DPM-Solver++(2M), seen on the student's levels.

    Args:
        distillation: the teacher, and the student's grid.
        count: how many, over all processes.
        steps: of the teacher, at least; each step of the student is cut in the same number of parts.
    """

    def __init__(self, distillation: Distillation, count: int, steps: int) -> None:
        self.distillation = distillation
        count, grid = -(-count // distillation.processes), distillation.sigmas
        self.parts = -(-steps // len(grid))
        self.tableau = dpmpp_2m(ve_levels(subdivided(grid, distillation.sigma_floor, self.parts)))
        shape, device = distillation.images.sample_shape, distillation.device
        self.states = torch.zeros(count, len(grid) + 1, *shape, device=device)  # the last one is the sample
        self.labels = torch.zeros(count, dtype=torch.int64, device=device)
        self.is_filled = torch.zeros((), dtype=torch.bool)

    @property
    def memory(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"trajectories": self.states, "labels": self.labels, "is_filled": self.is_filled}

    def draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """States ``[count, steps + 1, C, H, W]`` and labels ``[count]`` of random trajectories."""
        if not self.is_filled:
            self._fill()
        rows = torch.randint(len(self.labels), (count,), generator=rng).to(self.labels.device)
        return self.states[rows], self.labels[rows]

    @torch.no_grad()
    def _fill(self, batch: int = 256) -> None:
        rng = generator(self.distillation.seed, 17, self.distillation.process)
        self.labels.copy_(torch.randint(len(self.distillation.images.class_names), self.labels.shape, generator=rng))
        for rows in torch.split(torch.arange(len(self.labels)), batch):
            x = self.tableau.initial_scale * torch.randn(self.states[rows, 0].shape, generator=rng).to(self.states)
            points = follow(self.distillation.teacher, self.tableau, x, self.labels[rows], rng)
            for i, point in enumerate(points):
                if i % self.parts == 0:
                    self.states[rows, i // self.parts] = point
        self.is_filled.fill_(True)
