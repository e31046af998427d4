"""The operator and the whole-sampler graph: the same samples in every runtime, and the same as the engine's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator

from fewstep.export.sampler_graph import sampler_graph, sampler_inputs
from fewstep.export.update_op import COLUMNS, DOMAIN, NAME, OPSET, update_function, weights_of
from fewstep.kernels import StepRow, normals, step_reference
from fewstep.kernels.fused_step import pack_rows
from fewstep.kernels.ort_op import ort_library
from fewstep.runtime import Bundle, Engine, Request

Array = NDArray[Any]
needs_library = pytest.mark.skipif(ort_library() is None, reason="there is no C++ compiler")


def session(model: onnx.ModelProto, has_kernel: bool, optimised: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if has_kernel:
        options.register_custom_ops_library(str(ort_library()))
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def one_update(slots: int, shape: tuple[int, ...] = (2, 3, 5)) -> onnx.ModelProto:
    """A model of one operator and nothing else."""
    shapes: dict[str, list[str | int | None]] = {
        "x": ["rows", *shape], "raw": ["rows", *shape], "noise": ["rows", *shape],
        "history": ["rows", slots, *shape], "weights": ["rows", len(COLUMNS) + 2 * slots],
    }  # fmt: skip
    inputs = [helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()]
    made = [("x_", shapes["x"]), ("history_", shapes["history"]), ("network_input", shapes["x"])]
    outputs = [helper.make_tensor_value_info(name, 1, shape) for name, shape in made]
    node = helper.make_node(NAME, list(shapes), [name for name, _ in made], domain=DOMAIN)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "update", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, functions=[update_function(slots)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_the_operator_is_the_fused_step(slots: int) -> None:
    """To the bit in stock ONNX Runtime, with the kernel in its place, and in onnx's reference evaluator."""
    rng = np.random.default_rng(slots)
    rows = [
        StepRow(0.3, -0.7, -1.0, 1.0, 0.9, tuple(rng.uniform(-1, 1, slots)), 0.5, 0.4, i % slots, i) for i in range(5)
    ]
    rows[1] = StepRow(0, 1, -np.inf, np.inf, 0.5, (0.5,), 0, 1, -1, 1)
    shape = (5, 2, 3, 5)
    x, raw = (rng.standard_normal(shape, np.float32) for _ in range(2))
    history = rng.standard_normal((5, slots, *shape[1:]), np.float32)
    seed = np.arange(5, dtype=np.uint64)
    noise = normals(seed, np.array([row.noise_id for row in rows]), 30).reshape(shape)
    inputs = {"x": x, "raw": raw, "noise": noise, "history": history, "weights": weights_of(rows, slots)}
    model = one_update(slots)
    got = {"stock": session(model, False).run(None, inputs), "reference": ReferenceEvaluator(model).run(None, inputs)}
    if ort_library():
        got["kernel"] = session(model, True).run(None, inputs)
    wanted = [x.reshape(5, -1).copy(), history.reshape(5, slots, -1).copy(), np.empty((5, 30), np.float32)]
    step_reference(
        pack_rows(rows, slots), np.arange(5, dtype=np.int32), wanted[0], wanted[1], raw.reshape(5, -1),
        np.full(5, -1, np.int32), np.zeros(5, np.float32), seed, wanted[2],
    )  # fmt: skip
    for where, outputs in got.items():
        for one, want in zip(outputs, wanted, strict=True):
            assert np.array_equal(np.asarray(one).reshape(want.shape), want), where


def test_every_node_has_a_name_of_its_own(baked: Bundle) -> None:
    """ONNX Runtime 1.20 and 1.21 do not load the sampler else; see `update_function`. They are not installed here."""
    model = sampler_graph(onnx.load(baked.network), 3, slots=4)
    (body,) = model.functions
    for nodes in (body.node, model.graph.node):
        names = [node.name for node in nodes]
        assert all(names)
        assert len(set(names)) == len(names)


@needs_library
def test_a_registered_kernel_takes_the_bodys_place(tmp_path: Path) -> None:
    for has_kernel in (False, True):
        session(one_update(2), has_kernel, tmp_path / "optimised.onnx")
        kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
        assert (NAME in kinds) == has_kernel


@pytest.mark.parametrize(("solver", "steps"), [("ancestral", 4), ("dpmpp_2m", 3), ("heun", 3)])
def test_the_whole_sampler_gives_the_engines_samples(baked: Bundle, solver: str, steps: int) -> None:
    """In stock ONNX Runtime and with the kernel to the bit of each other, and to rounding of the engine's."""
    tableau = baked.tableau(solver, steps)
    model = sampler_graph(onnx.load(baked.network), steps, slots=2)
    seed, label = np.array([5, 2**63], np.uint64), np.array([3, 7], np.int64)
    shape = baked.manifest.sample_shape
    inputs = sampler_inputs(tableau, baked.manifest.output.prediction(), 2, seed, {"label": label}, shape)
    (stock,) = session(model, False).run(None, inputs)
    if ort_library():
        assert np.array_equal(session(model, True).run(None, inputs)[0], stock)
    engine = Engine(baked, max_rows=2, threads=1)
    samples = engine.generate([Request(int(s), tableau, int(k)) for s, k in zip(seed, label, strict=True)])
    for sample, ours in zip(samples, stock, strict=True):
        assert np.abs(sample.pixels - ours).max() <= 1e-5 * np.abs(ours).max()


def test_the_whole_sampler_runs_in_onnxs_reference_evaluator(baked: Bundle) -> None:
    tableau = baked.tableau("ddim", 2)
    model = sampler_graph(onnx.load(baked.network), 2, slots=1)
    shape = baked.manifest.sample_shape
    inputs = sampler_inputs(
        tableau, baked.manifest.output.prediction(), 1, np.array([1], np.uint64), {"label": np.array([2])}, shape
    )
    (stock,) = session(model, False).run(None, inputs)
    (ours,) = ReferenceEvaluator(model).run(None, inputs)
    assert np.abs(np.asarray(ours) - stock).max() <= 1e-4 * np.abs(stock).max()


def test_the_whole_sampler_stores_weights_once(make_bundle: Callable[..., Path]) -> None:
    step = onnx.load(make_bundle() / "model.onnx")
    four, eight = (sampler_graph(step, steps, 1) for steps in (4, 8))

    def stored(model: onnx.ModelProto) -> int:
        return sum(tensor.ByteSize() for tensor in model.graph.initializer if np.prod(tensor.dims) > 64)

    assert stored(four) == stored(eight) == stored(step)
