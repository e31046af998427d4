"""The whole-sampler graph: a step graph unrolled over a table's steps, with `update_op` between the calls.

    noise[B, steps + 1, C, H, W], table[steps + 1, 8 + 2 S] (, label[B]) (, guidance[B]) -> sample[B, C, H, W]

The table is an input, so one file runs every table of its number of steps and slots; weights are stored once.
An option: step graphs are what the engine runs, since rows of a batch need not be at the same step. The network is
called once a step, so its guidance must be in its weights or one of its inputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ..kernels import normals
from ..runtime import Bundle, Request
from ..runtime.prediction import Prediction
from ..runtime.tableau import Tableau
from .step_graph import ExportError
from .update_op import COLUMNS, DOMAIN, NAME, update_function, weights_of

Array = NDArray[Any]


def sampler_graph(step: onnx.ModelProto, steps: int, slots: int) -> onnx.ModelProto:
    """Unroll a step graph.

    Args:
        step: a step graph, of any precision whose inputs and output are float32.
        steps: network calls.
        slots: history slots of the tables it shall run.

    Raises:
        ValueError: the step graph's inputs are not float32.
    """
    graph = step.graph
    inputs = {value.name: value for value in graph.input}
    if any(inputs[name].type.tensor_type.elem_type != TensorProto.FLOAT for name in ("x", "t")):
        raise ValueError("the step graph's inputs are not float32")
    shape = [dim.dim_value for dim in inputs["x"].type.tensor_type.shape.dim][1:]
    conditions = [value for name, value in inputs.items() if name not in ("x", "t")]
    for value in conditions:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    columns = len(COLUMNS) + 2 * slots
    nodes: list[onnx.NodeProto] = []
    initializers = list(graph.initializer)

    def constant(name: str, values: Any) -> str:
        initializers.append(onnx.numpy_helper.from_array(np.asarray(values, np.int64), name))
        return name

    def add(kind: str, *given: str, output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(given), [output], output, **attributes))
        return output

    # What depends on the weights alone is computed once.
    fixed = {tensor.name for tensor in graph.initializer}
    once = []
    for node in graph.node:
        if all(name in fixed or not name for name in node.input) and not node.op_type.startswith("Random"):
            fixed.update(node.output)
            once.append(node)
    nodes += once
    repeated = [node for node in graph.node if not any(node is other for other in once)]

    one_axis = constant("fewstep.axis", [0])
    batch = add("Shape", "noise", output="fewstep.batch", start=0, end=1)
    like_x = add("Concat", batch, constant("fewstep.shape", shape), output="fewstep.x_shape", axis=0)
    history_shape = constant("fewstep.slots_and_shape", [slots, *shape])
    like_history = add("Concat", batch, history_shape, output="fewstep.history_shape", axis=0)
    like_table = add("Concat", batch, constant("fewstep.columns", [columns]), output="fewstep.row_shape", axis=0)
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
    x = add("ConstantOfShape", like_x, output="fewstep.x", value=zero)
    history = add("ConstantOfShape", like_history, output="fewstep.history", value=zero)
    raw = network_input = x
    time_column = constant("fewstep.t_column", COLUMNS.index("t"))
    for i in range(steps + 1):
        index = constant(f"step{i}.index", i)
        row = add("Unsqueeze", add("Gather", "table", index, output=f"step{i}.row", axis=0), one_axis,
                  output=f"step{i}.row_1")  # fmt: skip
        weights = add("Expand", row, like_table, output=f"step{i}.weights")
        fresh = add("Gather", "noise", index, output=f"step{i}.noise", axis=1)
        if i:
            t = add("Gather", weights, time_column, output=f"step{i}.t", axis=1)
            names = {name: name for name in (*fixed, *(value.name for value in conditions), "")}
            names |= {"x": network_input, "t": t}
            for node in repeated:
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                copy.name = f"step{i}.{node.name}"
                copy.input[:] = [names[name] for name in node.input]
                for j, name in enumerate(node.output):
                    names[name] = copy.output[j] = f"step{i}.{name}" if name else ""
                nodes.append(copy)
            raw = names[graph.output[0].name]
        made = ["sample" if i == steps else f"step{i}.x", f"step{i}.history", f"step{i}.network_input"]
        given = [x, raw, fresh, history, weights]
        nodes.append(helper.make_node(NAME, given, made, f"step{i}.update", domain=DOMAIN))
        x, history, network_input = made

    def floats(name: str, *dims: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(dims))

    unrolled = helper.make_graph(
        nodes,
        "sampler",
        [floats("noise", "batch", steps + 1, *shape), floats("table", steps + 1, columns), *conditions],
        [floats("sample", "batch", *shape)],
        initializers,
    )
    opsets = [*step.opset_import, helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(unrolled, opset_imports=opsets, functions=[update_function(slots, 1 + len(shape))])
    model.ir_version = step.ir_version
    model.functions.extend(step.functions)
    onnx.checker.check_model(model)
    return model


def refuse_second_call(bundle: Bundle) -> None:
    """Check that a student has a whole-sampler graph.

    Raises:
        ExportError: it calls its network twice a step.
    """
    if bundle.manifest.guidance.mode == "classifier-free":
        raise ExportError(f"{bundle.name} calls its network twice a step: it has no whole-sampler graph")


def with_table(model: onnx.ModelProto, bundle: Bundle, tableau: Tableau) -> onnx.ModelProto:
    """Put a table into a sampler graph, which is changed: ``table`` is no input any more."""
    rows = tableau.step_rows(bundle.manifest.output.prediction())
    weights = weights_of(rows, tableau.num_places)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "table"))
    kept = [value for value in model.graph.input if value.name != "table"]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model


def request_inputs(bundle: Bundle, tableau: Tableau, requests: Sequence[Request]) -> dict[str, Array]:
    """What a graph with ``tableau.num_places`` slots is fed for requests."""
    manifest = bundle.manifest
    conditions: dict[str, Array] = {}
    if manifest.labels:
        conditions["label"] = np.array([request.label for request in requests], np.int64)
    if manifest.guidance.mode == "embedded":
        scale = [manifest.guidance.default if one.guidance is None else one.guidance for one in requests]
        conditions["guidance"] = np.array(scale, np.float32)
    seeds = np.array([request.seed for request in requests], np.uint64)
    prediction, shape = manifest.output.prediction(), manifest.sample_shape
    return sampler_inputs(tableau, prediction, tableau.num_places, seeds, conditions, shape)


def sampler_inputs(
    tableau: Tableau, prediction: Prediction, slots: int, seed: NDArray[np.uint64], conditions: Mapping[str, Array],
    shape: tuple[int, ...],
) -> dict[str, Array]:  # fmt: skip
    """What the graph is fed to make the samples that the engine makes from the same seeds.

    Args:
        tableau: with as many steps as the graph.
        prediction: the network's.
        slots: the graph's.
        seed: ``[B]`` uint64.
        conditions: ``label`` and ``guidance`` where the network takes them.
        shape: of a sample.
    """
    rows = tableau.step_rows(prediction)
    elements = int(np.prod(shape))
    noise = np.stack([normals(seed, np.full(len(seed), row.noise_id), elements) for row in rows], axis=1)
    return {"noise": noise.reshape(len(seed), len(rows), *shape), "table": weights_of(rows, slots), **conditions}
