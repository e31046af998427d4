"""A bundle's network in torch, for gradients: rebuilt from its ONNX file, and believed only if it says the same."""

from __future__ import annotations

import json
from pathlib import Path

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
    from ..architectures import build_network, configure

    labels = bundle.manifest.labels
    advice = "give --checkpoint with the file it was exported from"
    try:
        recipe = recipe_from(json.loads((bundle.path / "recipe.json").read_text("utf-8")))
    except (OSError, ValueError):
        raise FitError(f"{bundle.name}: holds no recipe.json to rebuild the network in torch from; {advice}") from None
    try:
        network = build_network(
            configure(recipe.network, bundle.manifest.sample_shape, len(labels.names) if labels else 0)
        )
        network.load_state_dict(_weights(bundle, network))
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise FitError(f"{bundle.name}: the network cannot be rebuilt in torch: {reason}; {advice}") from None
    return network


def _weights(bundle: Bundle, network: nn.Module) -> dict[str, Tensor]:
    """The parameters in a bundle's ONNX file, by their names in torch."""
    graph = onnx.load(str(bundle.network)).graph
    held: dict[str, Tensor] = {}
    for tensor in graph.initializer:
        name = tensor.name.removesuffix(".half").removeprefix("network.")
        held[name] = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    held |= _norms(bundle, graph, held, network)
    weights = {}
    for name, wanted in network.state_dict().items():
        if name not in held:
            raise ValueError(f"the ONNX file has no {name}")
        weights[name] = held[name].to(wanted.dtype).reshape(wanted.shape)
    return weights


def _norms(bundle: Bundle, graph: onnx.GraphProto, held: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The parameters of group norms: the exporter unfolds these and loses their names, so they go by order of use."""
    used: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: used.append(name))
        for name, module in network.named_modules()
        if isinstance(module, nn.GroupNorm)
    ]
    x = torch.zeros(1, *bundle.manifest.sample_shape)
    with torch.no_grad():
        network(x, torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    for hook in hooks:
        hook.remove()
    reader = {name: node for node in graph.node for name in node.input}
    found: dict[str, Tensor] = {}
    normalised = [node for node in graph.node if node.op_type == "InstanceNormalization"]
    for name, node in zip(used, normalised, strict=False):
        for kind, suffix in (("Reshape", ""), ("Mul", "weight"), ("Add", "bias")):
            node = reader[node.output[0]]
            if node.op_type != kind:
                raise ValueError(f"{name} stands in no known way in the ONNX file")
            if suffix:
                (parameter,) = [held[given] for given in node.input if given in held]
                found[f"{name}.{suffix}"] = parameter
    return found


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
