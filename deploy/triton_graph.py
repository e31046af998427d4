"""The variant without Python: a student's whole sampler as one graph, for Triton's onnxruntime and tensorrt backends.

    NOISE FP32 [steps + 1, C, H, W], LABEL INT64 [1], GUIDANCE FP32 [1]  ->  IMAGE UINT8 [H, W, C]

A model is one solver with one number of steps, whose table is in the graph. The client makes the noise, with
`kernels.normals`: no ONNX operator gives the engine's. Pixels are the engine's to rounding, and are held against it
before the model is written. The rows of a batch go through all steps together: requests join between samples.

A TensorRT plan runs with the TensorRT that built it, on the GPU it was built for. So for that backend the graph is
written with the configuration, and the command that makes the plan of it where it is to run: `plan_command`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf import text_format
from google.protobuf.json_format import ParseDict
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from tritonclient.grpc.model_config_pb2 import ModelConfig

from ..export.onnx_file import save_model
from ..export.sampler_graph import request_inputs, sampler_graph, with_table
from ..runtime import Bundle, Engine, Request, Tableau
from .triton_repository import (
    CONFIG,
    GRAPH,
    GRAPH_CASES,
    PLAN,
    RepositoryError,
    cores,
    graph_sha256,
    new_model,
    queue_policy,
)

_INPUTS = {"noise": "NOISE", "label": "LABEL", "guidance": "GUIDANCE"}
_TYPES: dict[int, str] = {TensorProto.FLOAT: "TYPE_FP32", TensorProto.INT64: "TYPE_INT64"}


def write_graph_model(
    bundle: Bundle,
    repository: Path,
    *,
    solver: str | None = None,
    steps: int | None = None,
    name: str | None = None,
    max_rows: int = 16,
    instances: int = 1,
    threads: int | None = None,
    is_tensorrt: bool = False,
    replace: bool = False,
) -> Path:
    """Write a student's sampler as a model of a repository.

    Args:
        bundle: the student.
        repository: folder of the repository; made if it is not there.
        solver: of the table; the default one's when left out, as are the steps.
        steps: network calls.
        name: of the model; the student's with solver and steps when left out.
        max_rows: the largest batch.
        instances: sessions.
        threads: CPU threads of one.
        is_tensorrt: for the tensorrt backend.
        replace: take the place of a model of this name.

    Returns:
        The model's folder.

    Raises:
        RepositoryError: the student calls its network twice a step, the model is there already, or its pixels are off.
        ValueError: there is no such table.
    """
    if bundle.manifest.guidance.mode == "classifier-free":
        raise RepositoryError(f"{bundle.name} calls its network twice a step: it has no whole-sampler graph")
    tableau = bundle.tableau(solver, steps)
    name = name or f"{bundle.name}-{tableau.name}-{tableau.num_steps}"
    model = sampler_model(bundle, tableau)
    with new_model(repository, name, replace) as folder:
        (folder / "1").mkdir()
        save_model(model, folder / "1" / GRAPH)
        save_file(_cases(bundle, tableau, folder / "1" / GRAPH), folder / "1" / GRAPH_CASES)
        said = {
            "variant": "graph",
            "solver": tableau.name,
            "steps": str(tableau.num_steps),
            "sha256": graph_sha256(folder / "1"),
            **({"intra_op_thread_count": str(threads)} if threads and not is_tensorrt else {}),
            **({"plan": plan_command(model, max_rows)} if is_tensorrt else {}),
        }
        group = {"kind": "KIND_GPU" if is_tensorrt else "KIND_AUTO", "count": instances}
        config: dict[str, Any] = {
            "name": name,
            "backend": "tensorrt" if is_tensorrt else "onnxruntime",
            **({"default_model_filename": PLAN} if is_tensorrt else {}),
            "max_batch_size": max_rows,
            "input": [_config_of(value) for value in model.graph.input],
            "output": [_config_of(value) for value in model.graph.output],
            "instance_group": [group | cores(None if is_tensorrt else threads)],
            "version_policy": {"latest": {"num_versions": 1}},
            "dynamic_batching": queue_policy(),
            "model_warmup": [_warm_up(model, rows) for rows in sorted({1, max_rows})],
            "parameters": {key: {"string_value": value} for key, value in said.items()},
        }
        text = text_format.MessageToString(ParseDict(config, ModelConfig()))
        (folder / CONFIG).write_text(text, "utf-8")
    return repository / name


def sampler_model(bundle: Bundle, tableau: Tableau) -> onnx.ModelProto:
    """The graph: the sampler with its table inside, in Triton's names, to eight-bit pixels."""
    model = sampler_graph(onnx.load(str(bundle.network)), tableau.num_steps, tableau.num_places)
    graph = with_table(model, bundle, tableau).graph
    for value in graph.input:
        value.name = _INPUTS[value.name]
    for node in graph.node:
        node.input[:] = [_INPUTS.get(one, one) for one in node.input]
    for name, number in (("scale", 127.5), ("middle", 128.0), ("black", 0.0), ("white", 255.0)):
        graph.initializer.append(numpy_helper.from_array(np.array(number, np.float32), f"fewstep.{name}"))
    last = graph.output[0].name
    for kind, other, made in (
        ("Mul", "fewstep.scale", "scaled"),
        ("Add", "fewstep.middle", "moved"),
        ("Max", "fewstep.black", "floored"),
        ("Min", "fewstep.white", "clipped"),
    ):
        graph.node.append(helper.make_node(kind, [last, other], [f"fewstep.{made}"]))
        last = f"fewstep.{made}"
    graph.node.append(helper.make_node("Transpose", [last], ["fewstep.pixels"], perm=[0, 2, 3, 1]))
    graph.node.append(helper.make_node("Cast", ["fewstep.pixels"], ["IMAGE"], to=TensorProto.UINT8))  # TensorRT: last
    channels, height, width = bundle.manifest.sample_shape
    del graph.output[:]
    shape: list[int | str | None] = ["batch", height, width, channels]
    graph.output.append(helper.make_tensor_value_info("IMAGE", TensorProto.UINT8, shape))
    onnx.checker.check_model(model)
    return model


def plan_command(model: onnx.ModelProto, max_rows: int) -> str:
    """What makes ``model.plan`` of the graph, in the folder of both."""

    def shapes(rows: int) -> str:
        told = []
        for value in model.graph.input:
            dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
            told.append(f"{value.name}:{'x'.join(map(str, [rows, *dims]))}")
        return ",".join(told)

    usual = max(1, max_rows // 2)
    return (
        f"trtexec --onnx={GRAPH} --saveEngine={PLAN} --stronglyTyped --minShapes={shapes(1)} "
        f"--optShapes={shapes(usual)} --maxShapes={shapes(max_rows)}"
    )


def _cases(bundle: Bundle, tableau: Tableau, graph: Path) -> dict[str, NDArray[Any]]:
    """Requests as Triton's clients make them, with the engine's pixels, which the graph was held against.

    In ONNX Runtime no pixel may be off by more than one level, which is rounding.
    """
    seeds = np.array([0, 5, 2**63], np.uint64)
    labels = bundle.manifest.labels
    requests = [Request(int(seed), tableau, i % len(labels.names) if labels else None) for i, seed in enumerate(seeds)]
    given = graph_inputs(bundle, tableau, requests)
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (images,) = session.run(None, given)
    pixels = np.stack([sample.to_uint8() for sample in Engine(bundle, max_rows=len(requests)).generate(requests)])
    off = int(np.abs(images.astype(int) - pixels.astype(int)).max())
    if off > 1:
        raise RepositoryError(f"{bundle.name}: the sampler's graph is off by up to {off} of 255; it was not written")
    return triton_inputs(given) | {"IMAGE": pixels}


def graph_inputs(bundle: Bundle, tableau: Tableau, requests: list[Request]) -> dict[str, NDArray[Any]]:
    """What the graph is fed for requests, by the names of its inputs and without Triton's extra dimension."""
    given = request_inputs(bundle, tableau, requests)
    return {_INPUTS[name]: array for name, array in given.items() if name != "table"}


def triton_inputs(given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The same as Triton's clients send it: one number for each row is a column there."""
    return {name: array if array.ndim > 1 else array[:, None] for name, array in given.items()}


def _warm_up(model: onnx.ModelProto, rows: int) -> dict[str, Any]:
    """Zeros for all inputs, so that an instance is ready when its libraries have set themselves up."""
    inputs = {}
    for value in model.graph.input:
        told = _config_of(value)
        inputs[told["name"]] = {"data_type": told["data_type"], "dims": told["dims"], "zero_data": True}
    return {"name": f"{rows} rows", "batch_size": rows, "inputs": inputs}


def _config_of(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    dims = [dim.dim_value for dim in tensor.shape.dim][1:]
    kind = _TYPES.get(tensor.elem_type, "TYPE_UINT8")
    # Triton counts the batch as the first dimension, and knows no input without another one.
    return {"name": value.name, "data_type": kind, "dims": dims or [1], **({} if dims else {"reshape": {"shape": []}})}
