"""The one training loop.

A method is a tuple of turns; a step takes each turn once. A turn is one network and the loss it lowers:

    teacher             network: denoising loss
    moment matching     auxiliary: follow the student    student: match moments

The loop does the rest: batches, learning rates, clipping, averages, logs, checkpoints. All randomness of
a step comes from generators seeded by (seed, step, turn, process), never from a running state, so a run
killed at any moment goes on from its last checkpoint as if nothing had happened, bit for bit.
"""

from __future__ import annotations

import csv
import io
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .checkpoint import CheckpointError, like, read_tensors, write_bytes, write_tensors, writing
from .images import Images, to_float
from .recipe import Recipe

LOG_EVERY = 50  # steps a row of the log stands for; checkpoints fall on whole rows


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stood and what to do."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some real images."""

    x: Tensor  # [B, C, H, W] float32 in [-1, 1]
    label: Tensor  # [B] int64


Loss = Callable[[Batch, torch.Generator], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Turn:
    """One network and what it learns in a step.

    ``loss`` returns scalars: under ``"loss"`` the one to lower, beside it others worth a column of the log.
    """

    name: str
    network: nn.Module  # as Accelerate prepared it
    learning_rate: float
    beta1: float
    loss: Loss


@dataclass(frozen=True, slots=True)
class Plan:
    """How long the turns are taken, and how they are averaged."""

    name: str
    turns: tuple[Turn, ...]  # the last one trains the result
    images: int
    batch: int  # over all processes
    decay: Literal["cosine", "late-linear"]  # of the learning rate; late: in the second half
    warmup_images: int
    ema_half_life: float  # images
    checkpoint_every: int  # images
    memory: Mapping[str, Tensor] = field(default_factory=dict)  # what else the losses change, in place; a process's own

    @property
    def steps(self) -> int:
        """Steps in all."""
        return max(1, self.images // self.batch)

    def rate(self, step: int) -> float:
        """Share of the full learning rate at ``step``."""
        warmup = min(1.0, (step + 1) * self.batch / max(self.warmup_images, self.batch))
        progress = step / self.steps
        if self.decay == "cosine":
            return warmup * (1 + math.cos(math.pi * progress)) / 2
        return warmup * min(1.0, 2 * (1 - progress))

    def ema_decay(self, step: int) -> float:
        """Weight of the old average; the half-life grows in with a twentieth of the images seen."""
        half_life = min(self.ema_half_life, (step + 1) * self.batch / 20)
        return float(0.5 ** (self.batch / max(half_life, 1e-9)))


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on ``key`` alone."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)


def noise_like(x: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal noise of the shape and device of ``x``, drawn on the CPU."""
    return torch.randn(x.shape, generator=rng).to(x.device)


def train_plan(
    plan: Plan,
    images: Images,
    recipe: Recipe,
    seed: int,
    folder: Path,
    accelerator: Accelerator,
    console: Console,
    show: Callable[[nn.Module, Path], None],
) -> dict[str, Tensor]:
    """Take the plan's steps, from the checkpoint in ``folder`` if there is one.

    Args:
        plan: what to do.
        images: training data.
        recipe: what the checkpoint must have been made with.
        seed: of the images' order, and of the noise.
        folder: receives ``state.safetensors``, ``log.csv`` and sample grids.
        accelerator: devices and processes.
        console: progress; a bar on a terminal, else a line for each row of the log.
        show: draws a sample grid of the averaged network to a path.

    Returns:
        The averaged weights of the last turn's network.

    Raises:
        TrainingError: a loss is not finite, or the checkpoint is of another recipe or of other images.
        WriteError: the disk is full, or the folder may not be written.
    """
    if plan.batch % accelerator.num_processes:
        raise TrainingError(
            f"{plan.name}: a batch of {plan.batch} cannot be shared by {accelerator.num_processes} processes"
        )
    main = accelerator.is_main_process
    folder.mkdir(parents=True, exist_ok=True)
    state = State(plan, images, accelerator)
    path = folder / "state.safetensors"
    start = state.load(path, recipe) if path.exists() else 0
    log = Log(folder / "log.csv", start) if main else None
    every = max(LOG_EVERY, plan.checkpoint_every // plan.batch // LOG_EVERY * LOG_EVERY)
    saved = start

    sums: dict[str, list[float]] = {}
    clock = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not (main and console.is_terminal),
    ) as bar:
        task = bar.add_task(plan.name, total=plan.steps, completed=start, note="")
        for step in range(start, plan.steps):
            for name, value in state.step(step, seed, saved, path):
                sums.setdefault(name, []).append(value)
            bar.advance(task)
            done = step + 1
            if done % LOG_EVERY == 0 or done == plan.steps:
                count = done - (done - 1) // LOG_EVERY * LOG_EVERY
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
                row = {name: sum(values) / len(values) for name, values in sums.items()}
                sums = {}
                speed = count * plan.batch / seconds
                left = (plan.steps - done) * plan.batch / speed
                losses = "  ".join(f"{name} {value:.4f}" for name, value in row.items())
                bar.update(task, note=f"{losses}  {speed:.0f} images/s")
                if log:
                    log.write(done, done * plan.batch, row, plan.rate(step), speed)
                    if not console.is_terminal:
                        note = f"{losses}  {speed:.0f} images/s  {left / 60:.1f} min left"
                        console.print(f"{plan.name} {done}/{plan.steps}  {note}", soft_wrap=True, highlight=False)
            if done % every == 0 or done == plan.steps:
                state.save(path, recipe, done)
                if main:
                    grid = folder / f"samples-{done * plan.batch:08d}.png"
                    with state.averaged() as network:
                        show(network, grid)
                accelerator.wait_for_everyone()
                saved, clock = done, time.perf_counter()
    return state.ema


class State:
    """Everything a step changes: weights, moments of the optimisers, averages."""

    def __init__(self, plan: Plan, images: Images, accelerator: Accelerator) -> None:
        self.plan = plan
        self.images, self.images_sha256 = images, images.sha256
        self.accelerator = accelerator
        self.precision = "bfloat16" if accelerator.mixed_precision == "bf16" else "float32"
        self.networks = {turn.name: accelerator.unwrap_model(turn.network) for turn in plan.turns}
        self.optimizers = {
            turn.name: torch.optim.Adam(
                turn.network.parameters(), lr=turn.learning_rate, betas=(turn.beta1, 0.99), eps=1e-8
            )
            for turn in plan.turns
        }
        self.result = self.networks[plan.turns[-1].name]
        self.ema = {name: tensor.detach().clone() for name, tensor in self.result.state_dict().items()}

    def step(self, step: int, seed: int, saved: int, path: Path) -> Iterator[tuple[str, float]]:
        """Take every turn once, then average; yields what goes into the log."""
        plan, rank = self.plan, self.accelerator.process_index
        for index, turn in enumerate(plan.turns):
            rng = generator(seed, zlib.crc32(plan.name.encode()), step, index, rank)
            batch = self._draw(seed, step * len(plan.turns) + index)
            optimizer = self.optimizers[turn.name]
            for group in optimizer.param_groups:
                group["lr"] = turn.learning_rate * plan.rate(step)
            optimizer.zero_grad(set_to_none=True)
            losses = turn.loss(batch, rng)
            self.accelerator.backward(losses["loss"])
            norm = torch.nn.utils.clip_grad_norm_(turn.network.parameters(), 1.0)
            if not torch.isfinite(norm):
                kept = f"the last good checkpoint is {path} at step {saved}" if saved else "there is no checkpoint yet"
                raise TrainingError(
                    f"{plan.name}: the loss of {turn.name} is {float(losses['loss'].detach()):g} and its gradient "
                    f"{float(norm):g} at step {step + 1}; {kept}; lower the learning rate"
                )
            optimizer.step()
            for name, value in losses.items():
                yield (turn.name if name == "loss" else name), float(value.detach())
        decay = plan.ema_decay(step)
        with torch.no_grad():
            for name, tensor in self.result.state_dict().items():
                self.ema[name].lerp_(tensor, 1 - decay)

    def _draw(self, seed: int, turn: int) -> Batch:
        """The images of this process: its share of the next stretch of an endless row of shuffled epochs."""
        images, share = self.images, self.plan.batch // self.accelerator.num_processes
        first = turn * self.plan.batch + self.accelerator.process_index * share
        places, count = np.arange(first, first + share), len(images.pixels)
        rows = np.concatenate(
            [
                np.random.default_rng((seed, epoch)).permutation(count)[places[places // count == epoch] % count]
                for epoch in range(first // count, (first + share - 1) // count + 1)
            ]
        )
        device = self.accelerator.device
        return Batch(
            to_float(images.pixels[rows]).to(device, memory_format=torch.channels_last),
            torch.from_numpy(images.labels[rows]).to(device),
        )

    def averaged(self) -> Averaged:
        """The result network with averaged weights, inside a ``with`` block."""
        return Averaged(self.result, self.ema)

    def save(self, path: Path, recipe: Recipe, step: int) -> None:
        """Write all of it, atomically. Every process calls this, and the main one writes."""
        gathered = {name: self.accelerator.gather(tensor[None]) for name, tensor in self.plan.memory.items()}
        if not self.accelerator.is_main_process:
            return
        tensors = {f"ema.{name}": tensor for name, tensor in self.ema.items()}
        for turn, network in self.networks.items():
            for name, parameter in network.named_parameters():
                tensors[f"{turn}.weight.{name}"] = parameter
                for key, value in self.optimizers[turn].state[parameter].items():
                    tensors[f"{turn}.{key}.{name}"] = value
        tensors |= {f"memory.{name}": tensor for name, tensor in gathered.items()}
        write_tensors(
            path,
            tensors,
            {
                "plan": self.plan.name, "step": step, "recipe": recipe.text, "recipe_hash": recipe.hash,
                "images": self.images_sha256, "precision": self.precision,
            },
        )  # fmt: skip

    def load(self, path: Path, recipe: Recipe) -> int:
        """Read what `save` wrote and return its step."""
        again = "remove it, and this part of the run begins again"
        try:
            tensors, about = read_tensors(path)
        except CheckpointError as error:
            raise TrainingError(f"{error}; {again}") from None
        if about.get("plan") != self.plan.name:
            raise TrainingError(f"{path}: holds no training of {self.plan.name}; {again}")
        differences = recipe.differences(about["recipe"], student=self.plan.name != "teacher")
        if differences:
            raise TrainingError(
                f"{path}: made by another recipe ({'; '.join(differences[:3])}); use another folder or that recipe"
            )
        if about.get("images", self.images_sha256) != self.images_sha256:
            raise TrainingError(f"{path}: made with other images; go on with those, or use another folder")
        precision = about.get("precision", "float32")
        if precision != self.precision:
            raise TrainingError(
                f"{path}: made in {precision}, not {self.precision}; go on with --precision {precision}"
            )
        for name, place in self.plan.memory.items():
            theirs = tensors[f"memory.{name}"]
            if len(theirs) != self.accelerator.num_processes:
                raise TrainingError(f"{path}: made by {len(theirs)} processes; go on with as many")
            place.copy_(theirs[self.accelerator.process_index])
        self.ema = {name: like(tensors[f"ema.{name}"], tensor) for name, tensor in self.ema.items()}
        for turn, network in self.networks.items():
            optimizer = self.optimizers[turn]
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    parameter.copy_(tensors[f"{turn}.weight.{name}"])
                    moments = {key: like(tensors[f"{turn}.{key}.{name}"], parameter) for key in MOMENTS}
                    optimizer.state[parameter] = {"step": tensors[f"{turn}.step.{name}"], **moments}
        return int(about["step"])


MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, as PyTorch names them


class Averaged:
    """Lends a network its averaged weights for the length of a ``with`` block."""

    def __init__(self, network: nn.Module, ema: dict[str, Tensor]) -> None:
        self.network, self.ema = network, ema

    def __enter__(self) -> nn.Module:
        self.own = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.network.load_state_dict(self.ema)
        return self.network

    def __exit__(self, *_: object) -> None:
        self.network.load_state_dict(self.own)


class Log:
    """A CSV file with a row for every `LOG_EVERY` steps; rows after a resumed checkpoint are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.reader(file))
            whole = [row for row in rows[1:] if len(row) == len(rows[0])]  # a full disk cuts the last one
            kept = rows[:1] + [row for row in whole if int(row[0]) <= start]
            text = io.StringIO()
            csv.writer(text).writerows(kept if start else [])
            write_bytes(path, text.getvalue().encode())

    def write(self, step: int, images: int, row: Mapping[str, float], rate: float, speed: float) -> None:
        """Append one row."""
        values = {"step": step, "images": images, **row, "rate": rate, "images_per_second": round(speed, 1)}
        with writing(self.path), self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(values)
            writer.writerow(values.values())
