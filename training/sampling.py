"""Run a solver's table on a torch network, a whole batch at one step: what training looks at.

Serving runs the same tables through `kernels`, row by row; this is the plain loop to hold it against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..runtime.schedules import COSINE, EDM, Levels, karras, straight
from ..runtime.tableau import Tableau
from .checkpoint import Checkpoint, writing
from .denoiser import Predictor
from .network import NetworkConfig


@torch.no_grad()
def sample(
    denoiser: Predictor,
    tableau: Tableau,
    label: Tensor,
    sample_shape: tuple[int, int, int],
    generator: torch.Generator,
    batch: int = 128,
) -> Tensor:
    """Draw one sample for each label.

    Args:
        denoiser: predicts the data; on the device of ``label``.
        tableau: a table of form x0 on the path ``alpha = 1``.
        label: classes, ``[N]`` int64.
        sample_shape: ``[C, H, W]``.
        generator: source of all noise, on the CPU so that every device sees the same.
        batch: rows of one network call.

    Returns:
        Samples ``[N, C, H, W]`` float32, not clipped.
    """
    parts = []
    for rows in torch.split(label, batch):
        x = tableau.initial_scale * torch.randn(len(rows), *sample_shape, generator=generator).to(rows.device)
        for point in follow(denoiser, tableau, x, rows, generator):
            x = point
        parts.append(x)
    return torch.cat(parts)


def follow(
    denoiser: Predictor, tableau: Tableau, x: Tensor, label: Tensor, generator: torch.Generator
) -> Iterator[Tensor]:
    """The latents ``[B, C, H, W]`` before each network call, ``x`` first, and the sample last."""
    if tableau.form != "x0":
        raise ValueError(f"{tableau.name}: training samples tables of form x0, not {tableau.form}")
    history: list[Tensor] = []  # newest first
    yield x
    for i in range(len(tableau.a)):
        sigma = torch.full((len(x),), float(tableau.sigma[i]), device=x.device)
        history = [denoiser(x, sigma, label), *history][: tableau.b.shape[1]]
        x = float(tableau.a[i]) * x
        for weight, x0 in zip(tableau.b[i], history, strict=False):
            x = x + float(weight) * x0
        if tableau.c[i] != 0:
            x = x + float(tableau.c[i]) * torch.randn(x.shape, generator=generator).to(x.device)
        yield x


def ve_levels(sigmas: Sequence[float]) -> Levels:
    """Levels on the path ``alpha = 1``, noisiest first, with clean data behind them."""
    sigma = np.array(sigmas)
    return Levels(np.ones(len(sigma) + 1), np.append(sigma, 0.0), np.log(sigma) / 4, schedule=EDM)


def student_levels(checkpoint: Checkpoint, num_steps: int | None = None) -> Levels:
    """Levels to sample a student on: its own, or its range cut into another number of steps.

    A student of one step has no range of its own; that of its recipe is cut.
    """
    own, settings = checkpoint.sigmas, checkpoint.recipe.student
    if num_steps in (None, len(own)):
        return ve_levels(own)
    return karras(int(num_steps or 0), own[-1] if len(own) > 1 else settings.sigma_min, own[0])


def on_path(levels: Levels, config: NetworkConfig) -> Levels:
    """Levels of the path ``alpha = 1`` on a network's own, with its times; see `denoiser.parametrise`."""
    prediction = config.prediction
    if prediction == "edm":
        return levels
    ratio = levels.sigma / levels.alpha
    if config.diffusers is not None:
        schedule = config.diffusers.schedule()
        alpha = 1 / np.hypot(1, ratio)
        return Levels(alpha, ratio * alpha, np.asarray(schedule.time(ratio[:-1])), schedule=schedule)
    if prediction == "flow":
        return Levels(1 / (1 + ratio), ratio / (1 + ratio), (ratio / (1 + ratio))[:-1], schedule=straight())
    alpha = 1 / np.hypot(1, ratio)
    return Levels(alpha, ratio * alpha, np.arctan(ratio[:-1]) * (2 / np.pi), schedule=COSINE)


def save_grid(x: Tensor, path: Path, columns: int) -> None:
    """Write samples ``[N, C, H, W]`` in [-1, 1] as one PNG, ``columns`` a line, small images enlarged."""
    count, channels, height, width = x.shape
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    lines = -(-count // columns)
    sheet = np.zeros((channels, lines * (height + 2), columns * (width + 2)), np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        sheet[:, top : top + height, left : left + width] = image
    picture = Image.fromarray(sheet[0] if channels == 1 else sheet.transpose(1, 2, 0))
    zoom = max(1, 64 // max(height, width))
    with writing(path):
        picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)
