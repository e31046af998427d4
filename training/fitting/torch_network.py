"""A bundle's network in torch, for gradients: rebuilt from its ONNX file, and believed only if it says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from ...runtime.backends import OnnxBackend
from ...runtime.bundle import Bundle
from ..checkpoint import load_checkpoint
from ..recipe import recipe_from
from .targets import FitError, Samples

SAME = 1e-3  # relative to the largest output: float16 storage of a checkpoint's weights moves them by less


def torch_network(bundle: Bundle, guidance: float | None, checkpoint: Path | None, threads: int) -> _Guided:
    """The network of a bundle in torch.

    Args:
        bundle: the bundle.
        guidance: the scale that all predictions are guided with.
        checkpoint: where to take the network from; left out, it is rebuilt from the bundle.
        threads: CPU threads.

    Raises:
        FitError: it cannot be rebuilt, or it is another network.
    """
    torch.set_num_threads(threads)
    network = load_checkpoint(checkpoint).network if checkpoint is not None else _rebuild(bundle)
    network = network.eval().requires_grad_(False)
    mode, labels = bundle.manifest.guidance.mode, bundle.manifest.labels
    scale = 1.0 if mode == "none" or guidance is None else guidance
    guided = _Guided(network, labels.null if labels else None, scale)
    _refuse_another(bundle, network, scale, guided, checkpoint)
    return guided


class _Guided:
    def __init__(self, network: nn.Module, null: int | None, scale: float) -> None:
        self._network, self._null, self._scale = network, null, scale

    def __call__(self, x: Tensor, alpha: Tensor, sigma: Tensor, t: Tensor, samples: Samples) -> Tensor:
        """See `end_to_end.TorchNetwork`."""
        times = t.to(x.dtype).expand(len(x))
        if samples.label is None and self._null is None:
            return self._network(x, times)  # type: ignore[no-any-return]
        null = torch.full((len(x),), self._null or 0)
        label = null if samples.label is None else torch.from_numpy(samples.label)
        if self._scale == 1:
            return self._network(x, times, label)  # type: ignore[no-any-return]
        both = self._network(torch.cat([x, x]), torch.cat([times, times]), torch.cat([label, null]))
        said, unsaid = both.chunk(2)
        return unsaid + self._scale * (said - unsaid)  # type: ignore[no-any-return]


def _rebuild(bundle: Bundle) -> nn.Module:
    from ..network import NetworkConfig, UNet

    labels = bundle.manifest.labels
    advice = "give --checkpoint with the file it was exported from"
    try:
        recipe = recipe_from(json.loads((bundle.path / "recipe.json").read_text("utf-8")))
    except (OSError, ValueError):
        raise FitError(f"{bundle.name}: holds no recipe.json to rebuild the network in torch from; {advice}") from None
    import dataclasses

    known: dict[str, Any] = {field.name for field in dataclasses.fields(NetworkConfig)}  # type: ignore[assignment]
    shape = {key: value for key, value in dataclasses.asdict(recipe.network).items() if key in known}
    try:
        network = UNet(NetworkConfig(bundle.manifest.sample_shape, len(labels.names) if labels else 0, **shape))
        network.load_state_dict(_weights(bundle, network))
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise FitError(f"{bundle.name}: the network cannot be rebuilt in torch: {reason}; {advice}") from None
    return network


def _weights(bundle: Bundle, network: nn.Module) -> dict[str, Tensor]:
    """The parameters in a bundle's ONNX file, by their names in torch."""
    held: dict[str, Tensor] = {}
    for tensor in onnx.load(str(bundle.network)).graph.initializer:
        name = tensor.name.removesuffix(".half").removeprefix("network.")
        held[name] = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    weights = {}
    for name, wanted in network.state_dict().items():
        if name not in held:
            raise FitError(f"the ONNX file has no {name}")
        weights[name] = held[name].to(wanted.dtype).reshape(wanted.shape)
    return weights


def _refuse_another(bundle: Bundle, network: nn.Module, scale: float, guided: _Guided, checkpoint: Path | None) -> None:
    """Hold torch against the ONNX file on a few inputs."""
    manifest, rows = bundle.manifest, 3
    backend = OnnxBackend(bundle.network, rows, manifest.sample_shape)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, *manifest.sample_shape)).astype(np.float32)
    label = np.arange(rows) % len(manifest.labels.names) if manifest.labels else None
    backend.inputs["x"][:] = x
    backend.inputs["t"][:] = 0.3
    if label is not None:
        backend.inputs["label"][:] = label
    if "guidance" in backend.inputs:
        backend.inputs["guidance"][:] = scale
        same = guided
    else:
        same = _Guided(network, manifest.labels.null if manifest.labels else None, 1.0)
    at = torch.tensor(0.3, dtype=torch.float64)
    with torch.no_grad():
        ours = same(torch.from_numpy(x), at, at, at, Samples(x, label)).numpy()
    theirs = backend(rows)
    off = float(np.abs(ours - theirs).max() / max(1e-12, float(np.abs(theirs).max())))
    if not off < SAME:
        whence = str(checkpoint) if checkpoint else "what was rebuilt from recipe.json"
        raise FitError(f"{bundle.name}: {whence} is another network: it differs by {off:.2g} of the output")
