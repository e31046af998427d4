"""A step graph in other precisions. Its inputs and its output stay float32, as do x, the history and the update.

    float32    as trained, up to the storage of its weights
    float16    casts at the border, everything between in half precision
    bfloat16   the same; ONNX Runtime's CPU has no bfloat16 convolution, so there it is emulated to be measured
    int8       QDQ around the inner convolutions, symmetric, weights by channel, activations by calibration
    int8-cpu   the same with unsigned activations, which x86 multiplies with signed weights; for ONNX Runtime's CPU

Calibration runs the student's own trajectories: the inputs that the network sees at every step of a table.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from ..runtime import Bundle, Tableau
from .onnx_file import save_model
from .step_graph import ExportError
from .trajectory import StepError, relative, said, trajectory

Array = NDArray[Any]
Precision = Literal["float32", "float16", "bfloat16", "int8", "int8-cpu"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def convert(
    model: onnx.ModelProto, precision: Precision, calibration: Sequence[dict[str, Array]] = ()
) -> onnx.ModelProto:
    """A step graph in another precision.

    Args:
        model: a step graph of float32 arithmetic, however its weights are stored; left as it is.
        precision: the wanted one.
        calibration: network inputs, for the int8 ones.

    Raises:
        ExportError: int8 without calibration, or of a network of fewer than three convolutions.
    """
    wide = _widened(model)
    if precision == "float32":
        return wide
    if precision in ("int8", "int8-cpu"):
        if not calibration:
            raise ExportError(f"{precision} needs calibration: inputs that the network sees")
        return _quantised(wide, calibration, is_signed=precision == "int8")
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half: onnx.ModelProto = convert_float_to_float16(onnx.shape_inference.infer_shapes(wide), keep_io_types=True)
    del half.graph.value_info[:]
    # The converter puts the casts of the inputs at the end.
    casts = [node for node in half.graph.node if node.input and node.input[0] in {v.name for v in half.graph.input}]
    first = [node for node in casts if node.op_type == "Cast"]
    others = [node for node in half.graph.node if not any(node is cast for cast in first)]
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in [*first, *others]]
    del half.graph.node[:]
    half.graph.node.extend(ordered)
    if precision == "bfloat16":
        _to_bfloat16(half, {tensor.name: tensor for tensor in wide.graph.initializer})
    onnx.checker.check_model(half)
    return half


def measure(
    bundle: Bundle,
    tableau: Tableau,
    variants: dict[Precision, Path],
    samples: int = 32,
    network: torch.nn.Module | None = None,
) -> dict[str, Any]:
    """Hold each precision against float32 and against PyTorch, step by step and at the end.

    Args:
        bundle: the student.
        tableau: whose steps.
        variants: graphs by precision, float32 among them.
        samples: how many.
        network: the one in PyTorch, as it was exported, if there is one.

    Returns:
        By precision: ``steps``, a `StepError` against the float32 graph each; ``torch``, the same against the network,
        if there is one; ``samples``, the relative root mean square difference of the finished samples from float32's;
        and ``run``, what ran it.
    """
    calls, finished = trajectory(bundle, tableau, variants["float32"], samples)
    wanted = {"steps": [raw for _, raw in calls]}
    if network is not None:
        wanted["torch"] = [said(network, inputs) for inputs, _ in calls]
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision, path in variants.items():
            how = "ONNX Runtime's CPU provider"
            if precision == "bfloat16":
                save_model(emulated(onnx.load(str(path))), path := Path(folder) / "emulated.onnx")
                how = "emulated: float32 arithmetic, each operator's result rounded to bfloat16"
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            got = [session.run(None, inputs)[0] for inputs, _ in calls]
            errors = {
                name: [StepError.of(i, *pair) for i, pair in enumerate(zip(got, raws, strict=True))]
                for name, raws in wanted.items()
            }
            _, ours = trajectory(bundle, tableau, path, samples)
            report[precision] = {"run": how, **errors, "samples": relative(ours, finished)}
    return report


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """A bfloat16 graph for a runtime without bfloat16 arithmetic, in whose place float32 is rounded.

    An operator computes in float32 with what bfloat16 holds, and what comes out is rounded to bfloat16: so does
    hardware that sums in float32. A runtime that fuses operators rounds less often.

    Args:
        model: what `convert` made; left as it is.
    """
    wide = onnx.shape_inference.infer_shapes(model)
    brain = TensorProto.BFLOAT16
    rounded = {value.name for value in wide.graph.value_info if value.type.tensor_type.elem_type == brain}
    del wide.graph.value_info[:]

    def widen(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == brain:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))

    for tensor in wide.graph.initializer:
        widen(tensor)
    nodes = []
    for node in wide.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                widen(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == brain:
                attribute.i = TensorProto.FLOAT
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name in rounded:
                node.output[i] = wider = f"{name}.wide"
                narrow = f"{name}.bfloat16"
                nodes.append(onnx.helper.make_node("Cast", [wider], [narrow], narrow, to=brain))
                nodes.append(onnx.helper.make_node("Cast", [narrow], [name], f"{name}.widen", to=TensorProto.FLOAT))
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del wide.graph.node[:]
    wide.graph.node.extend(nodes)
    onnx.checker.check_model(wide)
    return wide


def _widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with weights stored in float32, without the casts that widen them."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in wide.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    nodes = []
    for node in wide.graph.node:
        if node.op_type == "Cast" and node.input[0] in stored:
            tensor = stored[node.input[0]]
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), node.output[0]))
        else:
            nodes.append(node)
    del wide.graph.node[:]
    wide.graph.node.extend(nodes)
    return wide


def _to_bfloat16(model: onnx.ModelProto, trained: dict[str, onnx.TensorProto]) -> None:
    """Turn every float16 of a graph into bfloat16; weights are rounded from float32, once."""
    half, brain = TensorProto.FLOAT16, TensorProto.BFLOAT16

    def narrow(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == half:
            source = trained.get(tensor.name, tensor)
            values = numpy_helper.to_array(source).astype(np.float32).astype(ml_dtypes.bfloat16)
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, brain, values.shape, values.tobytes(), raw=True))

    for tensor in model.graph.initializer:
        narrow(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                narrow(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
                attribute.i = brain


class _Reader:
    """Calibration data as ONNX Runtime's quantiser reads them."""

    def __init__(self, inputs: Sequence[dict[str, Array]]) -> None:
        self._left: Iterator[dict[str, Array]] = iter(inputs)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._left, None)


def _quantised(wide: onnx.ModelProto, calibration: Sequence[dict[str, Array]], is_signed: bool) -> onnx.ModelProto:
    from onnxruntime import quantization

    convolutions = [node.name for node in wide.graph.node if node.op_type == "Conv"]
    if len(convolutions) < 3:
        raise ExportError(f"int8 is for networks of convolutions; this one has {len(convolutions)}")

    signed, unsigned = quantization.QuantType.QInt8, quantization.QuantType.QUInt8
    # TensorRT takes symmetric scales only, and no int32 bias.
    options = {"ActivationSymmetric": is_signed, "WeightSymmetric": True, "QuantizeBias": not is_signed}

    class Reader(_Reader, quantization.CalibrationDataReader):  # type: ignore[misc]
        pass

    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(onnx.shape_inference.infer_shapes(wide), str(source))
        # All convolutions but the first, which reads the latent, and the last, which writes the prediction: their
        # rounding is the sample's own. What is left is in docs/results/parity-fashion-mnist-mm4.json.
        level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)  # it advises a preprocessing that fails on these graphs
        try:
            quantization.quantize_static(
                str(source), str(out), Reader(calibration), quant_format=quantization.QuantFormat.QDQ,
                activation_type=signed if is_signed else unsigned, weight_type=signed,
                per_channel=True, op_types_to_quantize=["Conv"], nodes_to_exclude=[convolutions[0], convolutions[-1]],
                extra_options=options,
            )  # fmt: skip
        finally:
            logging.getLogger().setLevel(level)
        return onnx.load(str(out))
