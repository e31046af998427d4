"""Checkpoints: one safetensors file each, tensors under plain names, everything else as JSON metadata.

Never pickle: a file that holds only numbers cannot run code. A file is written beside its place, synced
and renamed, so a kill at any moment leaves the old one or the new one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..runtime.files import NO_ROOM, replace_all
from .architectures import AnyNetwork, build_network
from .diffusers_teacher import Description
from .network import NetworkConfig
from .recipe import Recipe, recipe_from

FORMAT = "fewstep-checkpoint-1"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the reason."""


class WriteError(OSError):
    """A file cannot be written; the message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained network and all that is known of it: what export reads."""

    kind: str  # "teacher" or "student"
    network: AnyNetwork  # averaged weights, in evaluation mode, on the CPU
    recipe: Recipe
    class_names: tuple[str, ...]
    sigma_data: float
    sigmas: tuple[float, ...]  # levels the student was trained on, noisiest first, without the final zero
    guidance: float  # w baked in; 0 for a teacher
    images: int  # seen in training
    dataset: str
    licence: str

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """``[C, H, W]`` of one image."""
        return self.network.config.sample_shape


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a trained network, atomically."""
    about: dict[str, Any] = {"format": FORMAT, "network": asdict(checkpoint.network.config)}
    for item in fields(checkpoint):
        if item.name not in ("network", "recipe"):
            about[item.name] = getattr(checkpoint, item.name)
    about |= {"recipe": json.loads(checkpoint.recipe.text), "recipe_hash": checkpoint.recipe.hash}
    write_tensors(path, checkpoint.network.state_dict(), about)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote.

    Raises:
        CheckpointError: the file is missing, is not such a checkpoint, or its weights do not fit its network.
    """
    tensors, about = read_tensors(Path(path))
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a trained network; its format is {about.get('format')!r}, not {FORMAT!r}")
    network = build_network(_config(about["network"]))
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Checkpoint(
        kind=about["kind"],
        network=network.eval().requires_grad_(False),
        recipe=recipe_from(about["recipe"]),
        class_names=tuple(about["class_names"]),
        sigma_data=about["sigma_data"],
        sigmas=tuple(about["sigmas"]),
        guidance=about["guidance"],
        images=about["images"],
        dataset=about["dataset"],
        licence=about["licence"],
    )


def _config(about: dict[str, Any]) -> NetworkConfig:
    """What ``asdict`` made of a configuration, and JSON of that."""
    described = about.pop("diffusers", None)
    if described is not None:
        shape = described.pop("conditions")
        described = Description(**described, conditions=None if shape is None else tuple(shape))
    return NetworkConfig(sample_shape=tuple(about.pop("sample_shape")), diffusers=described, **about)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to ``path``, atomically: if it fails, what was there before still is."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, metadata={key: json.dumps(value) for key, value in about.items()}))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, atomically: if it fails, what was there before still is."""
    with writing(path):
        replace_all({path: content})


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Put the file's name into what goes wrong with it; the error of a full disk has none."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno in NO_ROOM else "mend that"
        kept = f"what was written before is kept: {remedy} and run the same command again"
        raise WriteError(f"{path}: cannot be written ({error.strerror or error}); {kept}") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            names = file.keys()  # not a mapping: it cannot be iterated itself
            return {name: file.get_tensor(name) for name in names}, about
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({error})") from None


def like(saved: Tensor, place: Tensor) -> Tensor:
    """A copy of ``saved`` with the device and memory layout of ``place``."""
    return torch.empty_like(place).copy_(saved)
