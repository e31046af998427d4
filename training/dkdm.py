"""DKDM: distil a teacher into any other network, without data and without first making a data set.

    minimise  E  w(t) |student(z_t) - teacher(z_t)|^2                                             (1)

where z_t comes from a pool of latents in the middle of the teacher's own sampling. A call of the teacher gives
both the target and the latent's next state, so a step costs one teacher call. Xiang et al. 2024
(arXiv:2409.03550), eq. 9 and algorithm 1, with their three orders:

    iterative    one batch is denoised together, all rows on one level
    shuffled     one batch, whose rows stand on levels of their own
    dynamic      a pool of many more rows, of which each step takes some at random and puts them back

A pool is what a server of few-step samples holds: each row carries its own row of the teacher's table. A row
that is finished starts again from noise, with a new class; or with none, and then the student is not told any either.

Of a teacher with a learned variance the mean is taken. The paper's second term, a KL divergence, trains the student's
variance and nothing else, since its gradient is stopped at the mean; a table's noise is one number a row, so nothing
here would read that variance, and the term is left out. The pool's own noise is the posterior's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..runtime.schedules import karras
from ..runtime.solvers import ancestral
from .architectures import configure
from .denoiser import edm_weight, per_row
from .distillation import Distillation, posterior
from .loop import Batch, Plan, generator, noise_like
from .network import NetworkConfig
from .progressive import regression_plan
from .recipe import Dkdm

STRIDES = 16  # in which a new pool is spread over the levels


class Pool:
    """Latents on their way through the teacher's table, each at a row of its own."""

    def __init__(self, settings: Dkdm, distillation: Distillation) -> None:
        self.settings, self.distillation = settings, distillation
        size = settings.pool if settings.order == "dynamic" else settings.batch
        size, device = size // distillation.processes, distillation.device
        table = ancestral(karras(settings.chain_steps, settings.sigma_floor, settings.sigma_max))
        self.a, self.b, self.c, self.sigma = (
            torch.tensor(column, dtype=torch.float32, device=device)
            for column in (table.a, table.b[:, 0], table.c, table.sigma)
        )
        self.x = torch.zeros(size, *distillation.images.sample_shape, device=device)
        self.row = torch.zeros(size, dtype=torch.int64, device=device)
        self.label = torch.zeros(size, dtype=torch.int64, device=device)
        self.is_filled = torch.zeros((), dtype=torch.bool)

    @property
    def memory(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"x": self.x, "row": self.row, "label": self.label, "is_filled": self.is_filled}

    @torch.no_grad()
    def draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take some rows one teacher step further.

        Returns:
            Latents ``[count, C, H, W]``, levels and labels ``[count]`` before the step, and the teacher's x0.
        """
        if not self.is_filled:
            self._fill()
        rows = torch.randperm(len(self.x), generator=rng)[:count].to(self.x.device)
        x, row, label = self.x[rows], self.row[rows], self.label[rows]
        sigma = self.sigma[row]
        x0 = self.distillation.teacher(x, sigma, label)
        ahead = per_row(self.a[row]) * x + per_row(self.b[row]) * x0 + per_row(self.c[row]) * noise_like(x, rng)
        is_done = row == len(self.a) - 1
        fresh = self.sigma[0] * noise_like(x, rng)
        self.x[rows] = torch.where(per_row(is_done), fresh, ahead)
        self.row[rows] = torch.where(is_done, 0, row + 1)
        self.label[rows] = torch.where(is_done, self._labels(len(rows), rng), label)
        return x, sigma, label, x0

    def _labels(self, count: int, rng: torch.Generator) -> Tensor:
        classes = len(self.distillation.images.class_names)
        label = torch.randint(classes, (count,), generator=rng)
        return (label if self.settings.conditional else torch.full_like(label, classes)).to(self.x.device)

    def _fill(self) -> None:
        """Start every row, and bring each to a level of its own by a few long steps of the teacher."""
        rng = generator(self.distillation.seed, 19, self.distillation.process)
        count = len(self.x)
        self.label.copy_(self._labels(count, rng))
        self.x.copy_(self.sigma[0] * noise_like(self.x, rng))
        if self.settings.order != "iterative":
            goal = torch.randint(len(self.a), (count,), generator=rng)
            for stride in range(1, STRIDES + 1):
                there = (goal * stride / STRIDES).round().long().to(self.x.device)
                behind = (there > self.row).nonzero().squeeze(1)
                for rows in torch.split(behind, 256) if len(behind) else ():
                    here, below, x = self.sigma[self.row[rows]], self.sigma[there[rows]], self.x[rows]
                    x0 = self.distillation.teacher(x, here, self.label[rows])
                    self.x[rows] = posterior(x, x0, here, below, rng)
                self.row.copy_(there)
        self.is_filled.fill_(True)


def dkdm(settings: Dkdm, distillation: Distillation) -> Plan:
    """Plan (1) over a pool; the student may be of any architecture, with weights of its own."""
    pool = Pool(settings, distillation)

    def loss(batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor]:
        z, sigma, label, target = pool.draw(len(batch.x), rng)
        x0 = distillation.student(z, sigma, label)
        return {"loss": (per_row(edm_weight(sigma, distillation.sigma_data)) * (x0 - target) ** 2).mean()}

    return replace(regression_plan(settings, distillation, loss), memory=pool.memory)


def other_network(settings: Dkdm, config: NetworkConfig) -> NetworkConfig:
    """The student's architecture, for the teacher's images and classes, or for none if it is to be told none."""
    classes = config.num_classes if settings.conditional else 0
    if settings.network is None:
        return replace(config, num_classes=classes)
    return configure(settings.network, config.sample_shape, classes)
