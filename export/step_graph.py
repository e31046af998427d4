"""The step graph: one network call as an ONNX file, ``x[B, ...], t[B], label[B] -> raw[B, ...]`` for any B.

A network that takes its guidance as an input has one more, ``guidance[B]``.

Weights are stored in half precision and widened when the file is loaded, so the file is half the size and the
arithmetic is float32: the network of the file is the network with its weights rounded once. What the rounding
and the exporter did is measured against torch each time, and refused when it is more than rounding.
"""

import hashlib
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from .onnx_file import DATA, save_model

OPSET = 20
_SMALL = 256  # tensors below this many elements keep float32: biases and constants weigh nothing
_TOLERANCE = 1e-4  # of the graph against torch with the same rounded weights, relative to the largest output


class ExportError(RuntimeError):
    """A network that could not be exported faithfully."""


@dataclass(frozen=True, slots=True)
class Parity:
    """The exported graph against torch, over several batch sizes; errors of single elements."""

    graph_error: float  # with the same rounded weights, relative to the largest output: the exporter's doing
    storage_error: float  # against the weights as trained: the rounding's doing


def export_step_graph(
    network: torch.nn.Module,
    sample_shape: tuple[int, int, int],
    path: Path,
    num_labels: int | None,
    half: bool = True,
    guidance: tuple[float, float] | None = None,
) -> Parity:
    """Write a network as a step graph and hold it against torch.

    Args:
        network: called with ``x [B, C, H, W]``, ``t [B]`` float32 and, if ``num_labels``, ``label [B]`` int64, and, if
            ``guidance``, ``guidance [B]`` float32.
        sample_shape: channels, height, width.
        path: the file to write; a large network has its weights in a second one, see `onnx_file`.
        num_labels: labels the network takes, the null one included; None for an unconditional network.
        half: store weights in float16.
        guidance: the range of the guidance that the network takes as an input; None if it takes none.

    Returns:
        The measured differences.

    Raises:
        ExportError: the graph is not the network.
    """
    network = network.eval().requires_grad_(False)
    example = _inputs(2, sample_shape, num_labels, guidance, seed=0)
    names = list(example)
    batch = torch.export.Dim("batch", min=1, max=65536)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        quiet = logging.getLogger("torch.onnx")
        level = quiet.level
        quiet.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                network,
                tuple(example.values()),
                dynamo=True,
                dynamic_shapes=tuple({0: batch} for _ in names),
                opset_version=OPSET,
                input_names=names,
                output_names=["raw"],
                verbose=False,
            )
        finally:
            quiet.setLevel(level)
    assert program is not None
    model = program.model_proto
    if half:
        _store_in_half(model, network.state_dict())
    _drop_notes(model)
    save_model(model, path)
    onnx.checker.check_model(str(path))  # by its path, since a large model does not fit into one message
    parity = _compare(network, path, sample_shape, num_labels, half, guidance)
    if not parity.graph_error <= _TOLERANCE:  # NaN is no small error
        path.unlink()
        path.with_name(path.name + DATA).unlink(missing_ok=True)
        raise ExportError(f"{path}: the graph differs from the network by {parity.graph_error:.2g} of its output")
    return parity


def _inputs(
    rows: int,
    sample_shape: tuple[int, ...],
    num_labels: int | None,
    guidance: tuple[float, float] | None,
    seed: int,
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "x": torch.randn((rows, *sample_shape), generator=generator),
        "t": torch.linspace(-0.5, 1.0, rows + 1)[1:].contiguous(),
    }
    if num_labels is not None:
        inputs["label"] = torch.randint(num_labels, (rows,), generator=generator)
    if guidance is not None:
        inputs["guidance"] = torch.linspace(*guidance, rows + 1)[1:].contiguous()
    return inputs


def _store_in_half(model: onnx.ModelProto, weights: Mapping[str, torch.Tensor]) -> None:
    """Keep large float32 weights as float16 behind a Cast, which every runtime folds away at load.

    Constants of the graph that are no weights, such as the frequencies of an embedding, are kept as they are. The
    exporter keeps the names of most weights; others, such as matrices that it transposes, are known by what they hold.
    """
    large = [weight.detach() for weight in weights.values() if weight.numel() >= _SMALL]
    held = {_digest(weight.numpy()) for weight in large} | {_digest(w.T.numpy()) for w in large if w.ndim == 2}
    casts = []
    for tensor in model.graph.initializer:
        is_large = tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) >= _SMALL
        if not is_large or (tensor.name not in weights and _digest(numpy_helper.to_array(tensor)) not in held):
            continue
        name = tensor.name
        stored = numpy_helper.from_array(_to_half(numpy_helper.to_array(tensor), name), f"{name}.half")
        tensor.CopyFrom(stored)
        casts.append(onnx.helper.make_node("Cast", [stored.name], [name], f"{name}.widen", to=onnx.TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])


def _digest(array: NDArray[Any]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()


def _to_half(array: NDArray[Any], name: str) -> NDArray[np.float16]:
    if np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        raise ExportError(f"weight {name} does not fit half precision: {np.abs(array).max():.3g}")
    return array.astype(np.float16)


def _drop_notes(model: onnx.ModelProto) -> None:
    """Remove what the exporter writes about itself: source lines and paths of the machine it ran on."""
    del model.metadata_props[:]
    model.doc_string = ""
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.input, *model.graph.output, *model.graph.initializer]:
        value.doc_string = ""
        if hasattr(value, "metadata_props"):
            del value.metadata_props[:]


def _compare(
    network: torch.nn.Module,
    path: Path,
    sample_shape: tuple[int, ...],
    num_labels: int | None,
    half: bool,
    guidance: tuple[float, float] | None,
) -> Parity:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    trained = {name: value.clone() for name, value in network.state_dict().items()}
    rounded = {
        name: value.half().float() if half and value.is_floating_point() and value.numel() >= _SMALL else value
        for name, value in trained.items()
    }
    errors = {"graph": 0.0, "storage": 0.0}
    try:
        for rows in (1, 2, 7):
            inputs = _inputs(rows, sample_shape, num_labels, guidance, seed=rows)
            (ours,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
            for kind, weights in (("graph", rounded), ("storage", trained)):
                network.load_state_dict(weights)
                with torch.no_grad():
                    theirs: NDArray[np.float32] = network(*inputs.values()).numpy()
                error = float(np.abs(ours - theirs).max() / np.maximum(1e-12, np.abs(theirs).max()))
                errors[kind] = float(np.maximum(errors[kind], error))  # keeps NaN
    finally:
        network.load_state_dict(trained)
    return Parity(errors["graph"], errors["storage"])
