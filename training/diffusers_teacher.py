"""Networks of diffusers, loaded from a folder of theirs.

    folder/unet  or  folder/transformer    UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel
    folder/scheduler                       betas and prediction type: epsilon, sample or v_prediction

A network on the variance-preserving path is a predictor on ours by other numbers (`denoiser.parametrise`) and
its own time: the discrete one, between whole times if sigma is, as diffusers' Karras schedules have it. Networks
with a learned variance (twice the channels out) give their mean.

Once loaded it is a network like ours: its `Description` goes with every checkpoint, so students of its architecture
are built without the folder, trained by any method that needs no new input of it, exported and served.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..runtime.schedules import Schedule, discrete_betas, trained
from .denoiser import Denoiser, PredictionType
from .network import NetworkConfig

KINDS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
PREDICTIONS: dict[str, PredictionType] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


class DiffusersError(ValueError):
    """A folder cannot be used; the message names the file and the reason."""


@dataclass(frozen=True, slots=True)
class Description:
    """What builds a network of diffusers again, without its weights."""

    network: str  # its config.json
    scheduler: str  # its scheduler_config.json
    num_labels: int  # classes that it is told, "no class" included and last; 0 if it is told none
    conditions: tuple[int, int, int] | None = None  # [labels, tokens, width] of what a conditional one is told

    def schedule(self) -> Schedule:
        """The times it was trained at."""
        return trained(_betas("scheduler_config.json", json.loads(self.scheduler)))

    def times(self) -> Times:
        """From sigma to what it is told."""
        return Times(self.schedule())


class DiffusersNetwork(nn.Module):
    """A network of diffusers behind our signature, ``(x, t, label) -> raw``.

    Always in evaluation mode: its dropout would draw from a generator that no checkpoint keeps.

    Args:
        network: of one of the `KINDS`.
        config: what it is.
    """

    conditions: Tensor | None

    def __init__(self, network: nn.Module, config: NetworkConfig) -> None:
        super().__init__()
        assert config.diffusers is not None
        self.network, self.config = network, config
        shape = config.diffusers.conditions
        self.register_buffer("conditions", None if shape is None else torch.zeros(shape))
        self.eval()

    def train(self, mode: bool = True) -> DiffusersNetwork:
        """Stay in evaluation mode."""
        super().train(False)
        return self

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Run the network; a variance that it gives too is dropped."""
        told: dict[str, Any] = {}
        if self.conditions is not None:
            told["encoder_hidden_states"] = self.conditions[label]
        elif self.config.takes_label:
            told["class_labels"] = label
        raw: Tensor = self.network(x, t, **told, return_dict=False)[0]
        return raw[:, : x.shape[1]]


def from_description(config: NetworkConfig) -> DiffusersNetwork:
    """A new network, with weights of its own."""
    assert config.diffusers is not None
    about = json.loads(config.diffusers.network)
    kind: Any = getattr(importlib.import_module("diffusers"), about["_class_name"])
    return DiffusersNetwork(kind.from_config(about), config)


def describe(folder: str | Path, conditions: Tensor | None = None) -> NetworkConfig:
    """Read what a folder holds.

    Args:
        folder: what ``save_pretrained`` of a pipeline wrote.
        conditions: ``[classes + 1, tokens, width]``, what a ``UNet2DConditionModel`` is told for each label, "no class"
            last.

    Raises:
        DiffusersError: a file is missing, or the network or its schedule is of a kind that is not known.
    """
    folder = Path(folder)
    scheduler, place = _read(folder / "scheduler" / "scheduler_config.json"), _place(folder)
    about = _read(place / "config.json")
    kind = str(about.get("_class_name"))
    if kind not in KINDS:
        raise DiffusersError(f"{place}: is a {kind}, not one of {', '.join(KINDS)}")
    if (kind == "UNet2DConditionModel") != (conditions is not None):
        wants = "is told embeddings; give one for each class, and for no class" if conditions is None else "takes none"
        raise DiffusersError(f"{place}: {wants}")
    prediction = str(scheduler.get("prediction_type", "epsilon"))
    if prediction not in PREDICTIONS:
        raise DiffusersError(f"{folder}: predicts {prediction}, not one of {', '.join(PREDICTIONS)}")
    _betas(folder, scheduler)
    sides = about.get("sample_size")
    height, width = sides if isinstance(sides, list) else (sides, sides)
    if not isinstance(height, int) or not isinstance(width, int):
        raise DiffusersError(f"{place / 'config.json'}: sample_size is {sides!r}, not the sides of an image")
    num_labels = _num_labels(about) if conditions is None else len(conditions)
    shape = (
        None if conditions is None else (int(conditions.shape[0]), int(conditions.shape[1]), int(conditions.shape[2]))
    )
    return NetworkConfig(
        (int(about.get("in_channels", 3)), height, width), max(0, num_labels - 1), kind="diffusers",
        prediction=PREDICTIONS[prediction],
        diffusers=Description(json.dumps(about), json.dumps(scheduler), num_labels, shape),
    )  # fmt: skip


def load_network(folder: str | Path, conditions: Tensor | None = None) -> DiffusersNetwork:
    """Read the weights too.

    Args:
        folder: see `describe`.
        conditions: see `describe`.

    Raises:
        DiffusersError: see `describe`.
    """
    config, place = describe(folder, conditions), _place(Path(folder))
    kind: Any = getattr(importlib.import_module("diffusers"), _read(place / "config.json")["_class_name"])
    try:
        network = kind.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise DiffusersError(f"{place}: its weights cannot be read: {str(error).splitlines()[0]}") from None
    wrapped = DiffusersNetwork(network, config).requires_grad_(False)
    if conditions is not None:
        wrapped.conditions = conditions.float()
    return wrapped


def load_conditions(file: str | Path) -> Tensor:
    """The tensor ``conditions [classes + 1, tokens, width]`` of a safetensors file.

    Raises:
        DiffusersError: there is none.
    """
    try:
        conditions = load_file(file).get("conditions")
    except (OSError, SafetensorError) as error:
        raise DiffusersError(f"{file}: cannot be read: {error}") from None
    if conditions is None or conditions.ndim != 3:
        raise DiffusersError(f"{file}: has no tensor conditions of shape [classes + 1, tokens, width]")
    return conditions


def load_diffusers(folder: str | Path, conditions: Tensor | None = None) -> Denoiser:
    """Load a folder's network as a predictor.

    Args:
        folder: see `describe`.
        conditions: see `describe`.

    Raises:
        DiffusersError: see `describe`.
    """
    network = load_network(folder, conditions)
    config = network.config
    assert config.diffusers is not None
    return Denoiser(network, 1.0, config.num_classes, prediction=config.prediction, time=config.diffusers.times())


class Times:
    """From sigma to the discrete time of a network."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, sigma: Tensor) -> Tensor:
        """The time of each level."""
        time = self.schedule.time(sigma.detach().double().cpu().numpy())
        return torch.from_numpy(np.asarray(time)).to(sigma)


def _place(folder: Path) -> Path:
    place = next((folder / part for part in ("unet", "transformer") if (folder / part).is_dir()), None)
    if place is None:
        raise DiffusersError(f"{folder}: has neither a folder unet nor a folder transformer")
    return place


def _betas(whose: str | Path, scheduler: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    if scheduler.get("trained_betas") is not None:
        return np.asarray(scheduler["trained_betas"], np.float64)
    if scheduler.get("rescale_betas_zero_snr"):
        raise DiffusersError(f"{whose}: rescale_betas_zero_snr, whose last level is noise alone, is not supported")
    if "beta_schedule" not in scheduler:
        raise DiffusersError(f"{whose}: a {scheduler.get('_class_name')} has no betas; its levels are not known")
    kind = str(scheduler["beta_schedule"])
    if kind not in BETAS:
        raise DiffusersError(f"{whose}: beta_schedule {kind} is not one of {', '.join(BETAS)}")
    ends = (float(scheduler.get("beta_start", 0.0001)), float(scheduler.get("beta_end", 0.02)))
    return discrete_betas(BETAS[kind], int(scheduler.get("num_train_timesteps", 1000)), ends)


def _num_labels(about: dict[str, Any]) -> int:
    """Labels a network takes, the one for "no class" included; 0 if it takes none."""
    if about["_class_name"] == "DiTTransformer2DModel":
        return int(about.get("num_embeds_ada_norm") or 1000) + 1  # DiT keeps one more for "no class"
    return int(about.get("num_class_embeds") or 0)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise DiffusersError(f"{path}: cannot be read: {error}") from None
