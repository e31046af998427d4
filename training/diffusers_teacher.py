"""Teachers that were trained with diffusers, loaded from a folder of theirs.

    folder/unet  or  folder/transformer    UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel
    folder/scheduler                       betas and prediction type: epsilon, sample or v_prediction

A network on the variance-preserving path is a predictor on ours by other numbers (`denoiser.parametrise`) and
its own time: the discrete one, between whole times if sigma is, as diffusers' Karras schedules have it. Networks
with a learned variance (twice the channels out) give their mean.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..runtime.schedules import discrete_betas, trained
from .denoiser import Denoiser, PredictionType

KINDS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
PREDICTIONS: dict[str, PredictionType] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


class DiffusersError(ValueError):
    """A folder cannot be used as a teacher; the message names the file and the reason."""


class DiffusersNetwork(nn.Module):
    """A network of diffusers behind our signature, ``(x, t, label) -> raw``.

    Args:
        network: of one of the `KINDS`.
        conditions: ``[classes + 1, tokens, width]``, what a conditional network is told for each label, "no class"
            last; read by ``UNet2DConditionModel`` only.
    """

    def __init__(self, network: nn.Module, conditions: Tensor | None = None) -> None:
        super().__init__()
        self.network = network
        self.conditions: Tensor | None
        self.register_buffer("conditions", conditions)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Run the network; a variance that it gives too is dropped."""
        config: Any = self.network.config
        told: dict[str, Tensor] = {}
        if self.conditions is not None:
            told["encoder_hidden_states"] = self.conditions[label]
        elif _num_classes(config):
            told["class_labels"] = label
        raw: Tensor = self.network(x, t, **told, return_dict=False)[0]
        return raw[:, : x.shape[1]]


def load_diffusers(folder: str | Path, conditions: Tensor | None = None) -> Denoiser:
    """Load a teacher.

    Args:
        folder: what ``save_pretrained`` of a pipeline wrote.
        conditions: see `DiffusersNetwork`.

    Raises:
        DiffusersError: a file is missing, or the network or its schedule is of a kind that is not known.
    """
    folder = Path(folder)
    scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    place = next((folder / part for part in ("unet", "transformer") if (folder / part).is_dir()), None)
    if place is None:
        raise DiffusersError(f"{folder}: has neither a folder unet nor a folder transformer")
    kind = str(_read(place / "config.json").get("_class_name"))
    if kind not in KINDS:
        raise DiffusersError(f"{place}: is a {kind}, not one of {', '.join(KINDS)}")
    if kind == "UNet2DConditionModel" and conditions is None:
        raise DiffusersError(f"{place}: is told embeddings; give one for each class, and for no class")
    prediction = str(scheduler.get("prediction_type", "epsilon"))
    if prediction not in PREDICTIONS:
        raise DiffusersError(f"{folder}: predicts {prediction}, not one of {', '.join(PREDICTIONS)}")
    network: nn.Module = getattr(importlib.import_module("diffusers"), kind).from_pretrained(place)
    wrapped = DiffusersNetwork(network, conditions).eval().requires_grad_(False)
    config: Any = network.config
    no_class = len(conditions) - 1 if conditions is not None else max(0, _num_classes(config) - 1)
    return Denoiser(wrapped, 1.0, no_class, prediction=PREDICTIONS[prediction], time=_Times(_betas(folder, scheduler)))


class _Times:
    """From sigma to the discrete time of a network."""

    def __init__(self, betas: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        self.schedule = trained(betas)

    def __call__(self, sigma: Tensor) -> Tensor:
        time = self.schedule.time(sigma.detach().double().cpu().numpy())
        return torch.from_numpy(np.asarray(time)).to(sigma)


def _betas(folder: Path, scheduler: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    if scheduler.get("trained_betas") is not None:
        return np.asarray(scheduler["trained_betas"], np.float64)
    kind = str(scheduler.get("beta_schedule", "linear"))
    if kind not in BETAS:
        raise DiffusersError(f"{folder}: beta_schedule {kind} is not one of {', '.join(BETAS)}")
    ends = (float(scheduler.get("beta_start", 0.0001)), float(scheduler.get("beta_end", 0.02)))
    return discrete_betas(BETAS[kind], int(scheduler.get("num_train_timesteps", 1000)), ends)


def _num_classes(config: Any) -> int:
    """Labels a network takes, the one for "no class" included; 0 if it takes none."""
    if hasattr(config, "num_embeds_ada_norm"):
        return int(config.num_embeds_ada_norm) + 1  # DiT keeps one more for "no class"
    return int(getattr(config, "num_class_embeds", None) or 0)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise DiffusersError(f"{path}: cannot be read: {error}") from None
