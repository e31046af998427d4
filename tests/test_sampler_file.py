"""The whole sampler as a file: the engine's samples in stock ONNX Runtime, by the page's own snippet too."""

import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lazy_cuda
import numpy as np
import onnx
import onnxruntime
import pytest
from typer.testing import CliRunner

from fewstep.cli import app
from fewstep.export.additions import add_engines
from fewstep.export.engines import BuiltEngine
from fewstep.export.precisions import Precision
from fewstep.export.sampler_file import write_sampler
from fewstep.export.sampler_graph import request_inputs
from fewstep.export.step_graph import ExportError
from fewstep.kernels.ort_op import ort_library
from fewstep.runtime import Bundle, Engine, Request

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"


def test_it_is_written_by_the_command_and_gives_the_engines_samples(baked: Bundle, tmp_path: Path) -> None:
    """Without the operator's kernel and with it, which are equal to the bit."""
    out = tmp_path / "sampler.onnx"
    asked = ["export", str(baked.path), "--sampler", "--solver", "dpmpp_2m", "--steps", "3", "-o", str(out)]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0, told.output
    assert re.search(r"digits, dpmpp_2m with 3 steps, float32 [\d,]+ bytes; .* max abs \S+, relative \S+$", told.output)
    tableau = baked.tableau("dpmpp_2m", 3)
    requests = [Request(seed, tableau, seed) for seed in (2, 9)]
    given = request_inputs(baked, tableau, requests)
    del given["table"]  # is in the file
    stock = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert {node.name for node in stock.get_inputs()} == set(given) == {"noise", "label"}
    (samples,) = stock.run(None, given)
    for ours, theirs in zip(samples, Engine(baked, threads=1).generate(requests), strict=True):
        assert np.abs(ours - theirs.pixels).max() <= 1e-5 * np.abs(ours).max()
    if ort_library():
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(ort_library()))
        kernel = onnxruntime.InferenceSession(out, options, providers=["CPUExecutionProvider"])
        assert np.array_equal(kernel.run(None, given)[0], samples)


def test_the_pages_snippet_gives_the_engines_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "sampler.onnx" in code)
    write_sampler(bundle := Bundle.load("fashion-mnist-mm4"), Path("sampler.onnx"), tableau := bundle.tableau())
    found: dict[str, Any] = {}
    exec(snippet, found)
    wanted = Engine(bundle).generate([Request(seed, tableau, label) for seed, label in ((0, 3), (1, 7))])
    for ours, theirs in zip(found["samples"], wanted, strict=True):
        assert np.abs(ours - theirs.pixels).max() <= 1e-4 * np.abs(ours).max()


class Context:
    """Of a TensorRT engine, whose work ONNX Runtime does, late, on the memory that it was told of."""

    def __init__(self, graph: onnx.ModelProto) -> None:
        self._session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> None:
        binding, kinds = self._session.io_binding(), {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        for node in self._session.get_inputs():
            where = self._shapes[node.name], self._addresses[node.name]
            binding.bind_input(node.name, "cpu", 0, kinds[node.type], *where)
        (out,) = self._session.get_outputs()
        shape = (self._shapes["noise"][0], *out.shape[1:])
        binding.bind_output(out.name, "cpu", 0, np.float32, shape, self._addresses[out.name])
        lazy_cuda.Stream.by_ptr[stream].ask(lambda: self._session.run_with_iobinding(binding))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_pages_snippet_for_tensorrt_gives_the_engines_samples(
    baked: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the stand-in for the GPU: shapes, addresses and names are those of the graph that the engine is built from."""
    monkeypatch.chdir(tmp_path)
    graphs: list[onnx.ModelProto] = []

    def build(graph: onnx.ModelProto, **_: Any) -> BuiltEngine:
        graphs.append(graph)
        return BuiltEngine(b"whole", "1.7", 1, ())

    monkeypatch.setattr("fewstep.export.additions.build_engine", build)
    add_engines(baked, Path("OUT"), has_sampler=True)
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "trt.Runtime" in code)
    trt = ModuleType("tensorrt_rtx")
    trt.Logger = lambda severity: None  # type: ignore[attr-defined]
    trt.Logger.ERROR = 0
    engines = {b"whole": SimpleNamespace(create_execution_context=lambda: Context(graphs[-1]))}
    trt.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=engines.get)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    found: dict[str, Any] = {}
    with lazy_cuda.installed(tmp_path):
        exec(snippet, found)
    tableau = baked.tableau()
    wanted = Engine(baked, threads=1).generate([Request(seed, tableau, label) for seed, label in ((0, 3), (1, 7))])
    for ours, theirs in zip(found["pictures"], wanted, strict=True):
        assert np.abs(ours - theirs.pixels).max() <= 0.05 * np.abs(theirs.pixels).max()  # float16


@pytest.mark.parametrize(("precision", "bounds"), [("float16", (1e-6, 1e-2)), ("bfloat16", (1e-4, 0.1))])
def test_other_precisions_are_measured(
    baked: Bundle, tmp_path: Path, precision: Precision, bounds: tuple[float, float]
) -> None:
    parity = write_sampler(baked, tmp_path / "s.onnx", baked.tableau("ddim", 2), precision)
    assert bounds[0] < parity.relative < bounds[1]
    model = onnx.load(tmp_path / "s.onnx")  # as it is to be run, not as it was measured
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert (onnx.TensorProto.BFLOAT16 in kinds) == (precision == "bfloat16")


def test_a_large_student_keeps_its_weights_beside_the_file(
    baked: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.export.onnx_file._OUTSIDE", 0)
    write_sampler(baked, tmp_path / "s.onnx", baked.tableau("ddim", 1))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.onnx", "s.onnx.data"]
    onnxruntime.InferenceSession(tmp_path / "s.onnx", providers=["CPUExecutionProvider"])


def test_what_is_no_sampler_is_refused_and_leaves_nothing(
    baked: Bundle, guided: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tableau, out = baked.tableau("ddim", 1), tmp_path / "s.onnx"
    with pytest.raises(ExportError, match=r"calls its network twice a step: it has no whole-sampler graph$"):
        write_sampler(guided, out, guided.tableau())
    with pytest.raises(ExportError, match=r"folder: a whole sampler is one file, whose name ends with \.onnx$"):
        write_sampler(baked, tmp_path / "folder", tableau)
    monkeypatch.setattr("fewstep.export.sampler_file.relative", lambda *_: float("nan"))
    with pytest.raises(ExportError, match=r"its samples differ from the engine's by nan; it was not written$"):
        write_sampler(baked, out, tableau)
    assert not list(tmp_path.iterdir())
    out.write_bytes(b"mine")
    with pytest.raises(ExportError, match=r"s\.onnx: exists already$"):
        write_sampler(baked, out, tableau)
    assert out.read_bytes() == b"mine"
