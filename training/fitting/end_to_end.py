"""All rows together: coefficients and times, by gradients through the whole table.

    u[i+1] = u[i] - u[0] * softmax(gaps)[i]               levels, u = (sigma / alpha) ** (1 / 7): stick-breaking
    a[i]   = theory * exp(stretch[i])                     theory: DDIM's row between these levels
    b[i,j] = theory * weight[i,j]
    t[i]   = time of level i + offset[i]                  what the network is told, apart from where it is

Theory moves with the levels while they are learned, and what is learned beside it is near one and near zero: with
free coefficients in its place the same loss ends far worse (Wang et al. 2025, GAS). Stick-breaking keeps the levels
in order, and clean data last, whatever the numbers are. All begin at the base solver and its levels. Minimised
is the distance of the end to the teacher's end, from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...runtime.prediction import Prediction, form_weights
from ...runtime.schedules import Levels, Schedule
from ...runtime.tableau import MAX_HISTORY, Tableau
from .closed_form import Fitted, declared, trimmed
from .targets import RHO, Array, FitError, Samples


class TorchNetwork(Protocol):
    """The network for gradients; like `targets.Network.raw`, of one batch."""

    def __call__(self, x: Tensor, alpha: Tensor, sigma: Tensor, t: Tensor, samples: Samples, /) -> Tensor:
        """The raw output for a scaled input ``[B, ...]``, at one level, told ``t``; all three are scalars."""
        ...


@dataclass(frozen=True)
class EndToEnd:
    """How to fit end to end."""

    network: TorchNetwork
    prediction: Prediction
    iterations: int = 300
    batch: int = 32
    learning_rate: float = 0.02  # falls to zero along a cosine
    seed: int = 0  # of the order of the samples
    learn_levels: bool = True
    on_iteration: Callable[[], None] = lambda: None

    def fit(self, base: Tableau, levels: Levels, samples: Samples, ends: Array, history: int) -> Fitted:
        """Fit a table to the teacher's ends; of all iterations the last counts.

        Args:
            base: the solver to start from; one call a level.
            levels: the levels it was given.
            samples: what to fit on.
            ends: where the teacher ends, ``[samples, ...]``.
            history: predictions that a row may read, if the base does not read more.

        Raises:
            FitError: the base visits a level twice, or the fit diverged.
        """
        if base.num_steps != len(levels.t):
            raise FitError(f"{base.name}: end-to-end fits solvers with one call a level")
        depth = min(max(history, base.history), base.num_steps, MAX_HISTORY)
        learned = _Learned(base, levels, depth, self.learn_levels)
        optimizer = torch.optim.Adam(learned.parameters, lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.iterations)
        order = np.random.default_rng(self.seed)
        noise, wanted = torch.from_numpy(samples.noise), torch.from_numpy(ends)
        queue = np.zeros(0, np.int64)
        for _ in range(self.iterations):
            if len(queue) < min(self.batch, len(samples)):
                queue = order.permutation(len(samples))
            rows, queue = queue[: self.batch], queue[self.batch :]
            part = Samples(samples.noise[rows], None if samples.label is None else samples.label[rows])
            end = self._run(learned, noise[rows], part)
            loss = ((end - wanted[rows]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(learned.parameters, 1.0)
            optimizer.step()
            schedule.step()
            self.on_iteration()
        table = learned.table(base)
        with torch.no_grad():
            errors = []
            for k in range(0, len(samples), self.batch):
                part = Samples(noise[k : k + self.batch].numpy(), _slice(samples.label, k, self.batch))
                end = self._run(learned, noise[k : k + self.batch], part)
                errors.append(((end - wanted[k : k + self.batch]).double() ** 2).flatten(1).mean(1))
        after = float(torch.cat(errors).mean().sqrt())
        if not np.isfinite(after):
            raise FitError(f"{base.name}: the fit diverged; try a lower learning rate")
        return Fitted(table, (), (after,), ())

    def _run(self, learned: _Learned, x: Tensor, samples: Samples) -> Tensor:
        alpha, sigma, t, a, b = learned()
        x = learned.start * x
        seen: list[Tensor] = []
        for i in range(len(a)):
            m = _predict(self.prediction, learned.form, x, alpha[i], sigma[i], t[i], samples, self.network)
            seen = [m, *seen][: b.shape[1]]
            x = a[i].to(x.dtype) * x
            for j, said in enumerate(seen):
                x = x + b[i, j].to(x.dtype) * said
        return x


class _Learned:
    """The learned numbers, and the table they make; float64."""

    def __init__(self, base: Tableau, levels: Levels, depth: int, learn_levels: bool) -> None:
        schedule = levels.schedule
        if schedule is None:
            raise FitError("the levels do not know their schedule, so they cannot move")
        self.schedule: Schedule = schedule
        self.form, self.start = base.form, base.initial_scale
        share = base.sigma / (base.alpha + base.sigma)
        self._is_pure = bool(base.alpha[0] == 0)
        ratio = base.sigma[self._is_pure :] / base.alpha[self._is_pure :]
        clock = share if self._is_pure else ratio ** (1 / RHO)
        self._first = float(clock[0])
        gaps = torch.tensor(np.log(-np.diff(clock)))
        self._fixed = torch.tensor(base.alpha[:1]), torch.tensor(base.sigma[:1])
        alpha, sigma, t = self._levels(gaps)
        self._offset = torch.tensor(base.t) - t
        theory_a, theory_b = _theory(self.form, alpha, sigma)
        a = torch.tensor(base.a)
        keeps = theory_a != 0
        ones = torch.ones_like(a)
        if bool((a[keeps] / theory_a[keeps] <= 0).any()) or bool((a[~keeps] != 0).any()):
            raise FitError(f"{base.name}: its rows are too far from DDIM's to start from")
        stretch = torch.where(keeps, a / torch.where(keeps, theory_a, ones), ones).log()
        weight = torch.zeros(base.num_steps, depth, dtype=torch.float64)
        weight[:, : base.history] = torch.tensor(base.b) / theory_b[:, None]
        reachable = torch.tril(torch.ones(base.num_steps, depth, dtype=torch.float64))
        self._mask = reachable
        self._gaps, self._stretch, self._weight = gaps, stretch, weight
        self._told = torch.zeros_like(t)
        self.parameters = [self._stretch, self._weight, *([self._gaps, self._told] if learn_levels else [])]
        for parameter in self.parameters:
            parameter.requires_grad_()

    def __call__(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``alpha, sigma`` [rows + 1], ``t, a`` [rows], ``b`` [rows, history]."""
        alpha, sigma, t = self._levels(self._gaps)
        theory_a, theory_b = _theory(self.form, alpha, sigma)
        b = theory_b[:, None] * self._weight * self._mask
        return alpha, sigma, t + self._offset + self._told, theory_a * self._stretch.exp(), b

    def _levels(self, gaps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left = 1 - torch.cumsum(torch.softmax(gaps, 0), 0)[:-1]
        clock = self._first * left
        if self._is_pure:
            signal, noise = 1 - clock, clock
        else:
            signal, noise = torch.ones_like(clock), clock**RHO
        total = {"ve": signal, "vp": torch.hypot(signal, noise), "flow": signal + noise}[self.schedule.path]
        clean = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
        alpha = torch.cat([self._fixed[0], signal / total, clean[0]])
        sigma = torch.cat([self._fixed[1], noise / total, clean[1]])
        return alpha, sigma, _times(self.schedule, alpha[:-1], sigma[:-1])

    def table(self, base: Tableau) -> Tableau:
        """The table as it stands."""
        with torch.no_grad():
            alpha, sigma, t, a, b = (value.numpy() for value in self())
        return declared(replace(base, alpha=alpha, sigma=sigma, t=t, a=a, b=trimmed(b), residual=1e5))


def _theory(form: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """DDIM's row between each level and the next in a form: weight of the latent, weight of the prediction."""
    here, there, noise, noise_there = alpha[:-1], alpha[1:], sigma[:-1], sigma[1:]
    if form == "eps":
        grow = there / here
        return grow, noise_there - grow * noise
    if form == "x0":
        decay = noise_there / noise
        return decay, there - decay * here
    # x = alpha x0 + sigma eps and m = p x0 + q eps; the next latent is a mixture of the two.
    p, q = (-noise, here) if form == "v" else (-torch.ones_like(here), torch.ones_like(here))
    determinant = here * q - noise * p
    return (there * q - noise_there * p) / determinant, (here * noise_there - noise * there) / determinant


def _times(schedule: Schedule, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network is told at each level, with its slope over the level: ``schedule.time`` is no torch."""
    pure = alpha.detach() == 0
    ratio = sigma / torch.where(pure, torch.ones_like(alpha), alpha)
    at = np.where(pure.numpy(), np.inf, ratio.detach().numpy())
    step = 1e-4
    with np.errstate(invalid="ignore"):
        value = schedule.time(at)
        slope = (schedule.time(at * np.exp(step)) - schedule.time(at * np.exp(-step))) / (2 * step)
    slopes = torch.tensor(np.where(np.isfinite(slope) & ~pure.numpy(), slope, 0.0))
    log = torch.where(pure, torch.zeros_like(ratio), ratio).clamp_min(1e-300).log()
    return torch.tensor(value) + slopes * (log - log.detach())


def _predict(
    prediction: Prediction,
    form: str,
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    t: Tensor,
    samples: Samples,
    network: TorchNetwork,
) -> Tensor:
    """`targets.Network.predict`, with gradients to the level: see `prediction`."""
    if prediction.type == "edm":
        data = torch.tensor(prediction.sigma_data, dtype=torch.float64)
        total = torch.hypot(sigma, data)
        c_skip, c_out, c_in = (data / total) ** 2, sigma * data / total, 1 / total
        p, q = (1 - c_skip) / c_out, -c_skip * sigma / c_out
        x_in = c_in.to(x.dtype) * x
    else:
        p, q = (torch.as_tensor(w) for w in form_weights(prediction.type, alpha, sigma))  # type: ignore[arg-type]
        x_in = x
    raw = network(x_in, alpha, sigma, t, samples)
    if form == prediction.type:
        return raw
    want_x0, want_eps = (torch.as_tensor(w) for w in form_weights(form, alpha, sigma))  # type: ignore[arg-type]
    determinant = alpha * q - sigma * p
    k_x = (want_x0 * q - want_eps * p) / determinant
    k_m = (alpha * want_eps - sigma * want_x0) / determinant
    return k_x.to(x.dtype) * x + k_m.to(x.dtype) * raw


def _slice(label: Array | None, k: int, count: int) -> Array | None:
    return None if label is None else label[k : k + count]
