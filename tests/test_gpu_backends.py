"""The GPU backends without a GPU: the choice of an engine, errors that say what is missing, and the order of work.

`lazy_cuda` stands in for the GPU, and does everything as late as it may; ONNX Runtime on the CPU stands in for the
network of either library, put in line on the stream that the library was given. So the samples are those of the CPU to
the bit if, and only if, copies, network and fused step are asked in the right order on one stream.
"""

import dataclasses
import logging
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lazy_cuda
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import network
from mixed_requests import generate_making_room, requests_of

from fewstep.export.additions import add_engines, add_precisions
from fewstep.export.engines import Flavour
from fewstep.export.torch_backend import torch_backend
from fewstep.runtime import Bundle, BundleError, Engine
from fewstep.runtime.backends import BackendError
from fewstep.runtime.bundle import EngineFile
from fewstep.runtime.gpu_backends import Buckets, OnnxCudaBackend, TensorRTBackend, backend_on, choose_engine
from fewstep.runtime.request import SampleFailed
from fewstep.server.settings import Settings

needs_cxx = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


def with_engines(bundle: Bundle, **changes: Any) -> Bundle:
    entry = {
        "flavour": "rtx", "version": "1.7", "graph": "step", "precision": "float16", "batch": (1, 8, 16),
        "targets": ("sm89",), "network_sha256": "0" * 64, **changes,
    }  # fmt: skip
    engines = {"engines/one.engine": EngineFile.model_validate(entry)}
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"engines": engines}))


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("tensorrt_rtx")
    module.__version__ = "1.7"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    return module


def test_an_engine_that_fits_is_chosen(baked: Bundle, tensorrt: ModuleType) -> None:
    assert choose_engine(with_engines(baked), 16, "89") == ("engines/one.engine", tensorrt)


def test_precision_chooses_the_engine(baked: Bundle, tensorrt: ModuleType) -> None:
    """Left out, it is the most exact one that fits, and not the first by name."""
    one = with_engines(baked).manifest.engines["engines/one.engine"]
    engines = {f"{p}.engine": one.model_copy(update={"precision": p}) for p in ("bfloat16", "float16", "int8")}
    held = dataclasses.replace(baked, manifest=baked.manifest.model_copy(update={"engines": engines}))
    for precision in ("bfloat16", "int8"):
        assert choose_engine(held, 16, "89", precision)[0] == f"{precision}.engine"
    assert choose_engine(held, 16, "89")[0] == "float16.engine"
    message = (
        r"^precision: digits has no step engine in float32: --precision chooses bfloat16 or float16 or int8; "
        r"fewstep export digits -o FOLDER --tensorrt --precision float32 builds one$"
    )
    with pytest.raises(BackendError, match=message):
        choose_engine(held, 16, "89", "float32")


def test_the_server_passes_its_precision_on(baked: Bundle, tensorrt: ModuleType, gpu: None, tmp_path: Path) -> None:
    backend = backend_on("tensorrt", "int8")
    assert backend is not None
    with pytest.raises(
        BackendError, match=r"^precision: digits has no step engine in int8: --precision chooses float16;"
    ):
        backend(with_engines(baked), 4)
    backend = backend_on("cuda", "float16")
    assert backend is not None
    with pytest.raises(BundleError, match=r"^precision: digits has float32, not 'float16'; fewstep export digits -o"):
        backend(baked, 4)
    assert Settings.load(None, {"device": "tensorrt", "precision": "float16"}).precision == "float16"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "1.6"}, r"one\.engine: it was built by TensorRT 1\.6, here is 1\.7$"),
        ({"targets": ("sm86",)}, r"one\.engine: it was built for sm86, this GPU is sm89$"),
        ({"batch": (1, 2, 8)}, r"one\.engine: it takes 8 rows at most, 16 are asked for$"),
        ({"graph": "sampler"}, r"it has none; fewstep export --tensorrt builds them$"),
        ({"flavour": "full"}, r"one\.engine: tensorrt is not installed$"),
    ],
)
def test_an_engine_that_does_not_fit_says_why(
    baked: Bundle, tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=reason):
        choose_engine(with_engines(baked, **changes), 16, "89")


@pytest.mark.skipif(find_spec("cupy") is not None, reason="CuPy is installed")
@pytest.mark.parametrize("backend", [OnnxCudaBackend, TensorRTBackend])
def test_without_cupy_the_error_says_what_to_install(baked: Bundle, backend: Any) -> None:
    with pytest.raises(BackendError, match=r"^the CUDA step needs CuPy: pip install 'fewstep\[gpu\]'$"):
        Engine(baked, backend=backend)


# --- on the stand-in


@pytest.fixture
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with lazy_cuda.installed(tmp_path_factory.getbasetemp() / "kernels"):
        (tmp_path_factory.getbasetemp() / "kernels").mkdir(exist_ok=True)
        yield


def cpu_session(bundle: Bundle) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(bundle.network), options, providers=["CPUExecutionProvider"])


class FakeTensorRT(ModuleType):
    """As much of TensorRT's Python module as runs an engine; the engine is the bundle's network."""

    def __init__(self, name: str, bundle: Bundle, batch: tuple[int, int, int]) -> None:
        super().__init__(name)
        self.__version__ = "1.7"
        self.Logger = lambda severity: None
        self.Logger.ERROR = 0  # type: ignore[attr-defined]
        self.TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="ours")
        self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
        self.nptype = lambda dtype: dtype
        self.session, self.batch = cpu_session(bundle), batch
        self.contexts: list[FakeContext] = []

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 (TensorRT's name)
        return SimpleNamespace(deserialize_cuda_engine=lambda data: FakeEngine(self) if data == b"whole" else None)


class FakeEngine:
    device_memory_size_v2 = 4096

    def __init__(self, module: FakeTensorRT) -> None:
        self._module = module
        self._nodes = [*module.session.get_inputs(), *module.session.get_outputs()]
        self.num_io_tensors = len(self._nodes)

    def get_tensor_name(self, i: int) -> str:
        return str(self._nodes[i].name)

    def get_tensor_mode(self, name: str) -> str:
        return "output" if name == self._nodes[-1].name else "input"

    def get_tensor_dtype(self, name: str) -> Any:
        return np.int64 if name == "label" else np.float32

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace()
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        return config

    def create_execution_context(self, how: Any) -> "FakeContext":
        context = FakeContext(self._module, how)
        self._module.contexts.append(context)
        return context


class FakeContext:
    def __init__(self, module: FakeTensorRT, how: Any) -> None:
        self.how, self._module = how, module
        self._shapes: dict[str, Any] = {}
        self._addresses: dict[str, int] = {}
        self.memory = 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= FakeEngine.device_memory_size_v2
        self.memory = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return self._module.batch[0] <= shape[0] <= self._module.batch[2]

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory
        session = self._module.session
        binding = session.io_binding()
        for node in session.get_inputs():
            dtype = np.int64 if node.name == "label" else np.float32
            binding.bind_input(node.name, "cpu", 0, dtype, self._shapes[node.name], self._addresses[node.name])
        (out,) = session.get_outputs()
        binding.bind_output(out.name, "cpu", 0, np.float32, self._shapes["x"], self._addresses[out.name])
        lazy_cuda.Stream.by_ptr[stream].ask(lambda: session.run_with_iobinding(binding))
        return True


@pytest.fixture
def fake(gpu: None, baked: Bundle, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``fake(bundle, **changes of the engine)``: the bundle with an engine, and the module that runs it."""

    def make(bundle: Bundle, tmp_path: Any, **changes: Any) -> tuple[Bundle, FakeTensorRT]:
        made = with_engines(bundle, **{"targets": (), **changes})
        entry = made.manifest.engines["engines/one.engine"]
        name = "tensorrt_rtx" if entry.flavour == "rtx" else "tensorrt"
        module = FakeTensorRT(name, bundle, entry.batch)
        monkeypatch.setitem(sys.modules, name, module)
        (tmp_path / "engines").mkdir()
        (tmp_path / "engines" / "one.engine").write_bytes(b"whole")
        return dataclasses.replace(made, path=tmp_path), module

    return make


@needs_cxx
@pytest.mark.parametrize("is_guided", [False, True])
@pytest.mark.parametrize("flavour", ["rtx", "full"])
def test_tensorrt_gives_the_cpus_bits_on_one_stream(
    baked: Bundle, guided: Bundle, fake: Any, tmp_path: Any, flavour: str, is_guided: bool
) -> None:
    bundle = guided if is_guided else baked
    requests = requests_of(bundle, is_guided)
    here = Engine(bundle, max_rows=3, threads=1).generate(requests)
    with_engine, module = fake(bundle, tmp_path, flavour=flavour)
    engine = Engine(with_engine, max_rows=3, backend=TensorRTBackend)
    engine.warm_up()
    for one, other in zip(here, engine.generate(requests), strict=True):
        assert one.pixels.tobytes() == other.pixels.tobytes()
    sizes = [1, 2, 4, 6] if is_guided else [1, 2, 3]
    assert [context._shapes["x"][0] for context in module.contexts] == sizes
    assert len({context.memory for context in module.contexts}) == 1
    (stream,) = lazy_cuda.Stream.by_ptr.values()
    if flavour == "full":  # our graphs
        assert {context.how for context in module.contexts} == {"ours"}
        assert stream.replayed >= engine.counters.ticks
    else:  # TensorRT's own
        assert {context.how.cuda_graph_strategy for context in module.contexts} == {"whole"}
        assert {context.how.strategy for context in module.contexts} == {"ours"}
        assert stream.replayed == 0


@needs_cxx
def test_without_graphs_the_bits_are_the_same(baked: Bundle, fake: Any, tmp_path: Any) -> None:
    with_engine, _ = fake(baked, tmp_path, flavour="full")
    requests = requests_of(baked, False)
    here = Engine(baked, max_rows=4, threads=1).generate(requests)
    there = Engine(with_engine, max_rows=4, backend=lambda b, rows: TensorRTBackend(b, rows, False)).generate(requests)
    assert all(one.pixels.tobytes() == other.pixels.tobytes() for one, other in zip(here, there, strict=True))
    assert next(iter(lazy_cuda.Stream.by_ptr.values())).replayed == 0


@needs_cxx
def test_rows_that_make_room_go_on_to_the_same_bits(baked: Bundle, fake: Any, tmp_path: Any) -> None:
    with_engine, _ = fake(baked, tmp_path, flavour="full")
    requests = requests_of(baked, False)
    here = Engine(baked, max_rows=3, threads=1).generate(requests)
    engine = Engine(with_engine, max_rows=3, backend=TensorRTBackend)
    there = generate_making_room(engine, requests)
    for one, other in zip(here, there, strict=True):
        assert one.pixels.tobytes() == other.pixels.tobytes()


@needs_cxx
def test_an_engine_of_larger_batches_runs_smaller_ones_padded(baked: Bundle, fake: Any, tmp_path: Any) -> None:
    with_engine, module = fake(baked, tmp_path, flavour="full", batch=(4, 8, 16))
    requests = requests_of(baked, False)[:2]
    here = Engine(baked, threads=1).generate(requests)
    there = Engine(with_engine, max_rows=2, backend=TensorRTBackend).generate(requests)
    assert all(one.pixels.tobytes() == other.pixels.tobytes() for one, other in zip(here, there, strict=True))
    assert [context._shapes["x"][0] for context in module.contexts] == [4]


@needs_cxx
def test_an_engine_that_tensorrt_cannot_load_is_named(baked: Bundle, fake: Any, tmp_path: Any) -> None:
    """Such as one that was built for another GPU and does not say for which."""
    with_engine, _ = fake(baked, tmp_path)
    (tmp_path / "engines" / "one.engine").write_bytes(b"of another GPU")
    with pytest.raises(BackendError, match=r"one\.engine: TensorRT 1\.7 cannot load it$"):
        Engine(with_engine, max_rows=2, backend=TensorRTBackend)


@needs_cxx
def test_what_cannot_be_captured_is_started_call_by_call(
    baked: Bundle, fake: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Any) -> None:
        self.captured = None
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(lazy_cuda.Stream, "end_capture", refuse)
    with_engine, _ = fake(baked, tmp_path, flavour="full")
    requests = requests_of(baked, False)
    here = Engine(baked, max_rows=2, threads=1).generate(requests)
    with caplog.at_level(logging.WARNING, "fewstep"):
        there = Engine(with_engine, max_rows=2, backend=TensorRTBackend).generate(requests)
    assert all(one.pixels.tobytes() == other.pixels.tobytes() for one, other in zip(here, there, strict=True))
    assert [record.getMessage() for record in caplog.records] == [
        f"no CUDA graph for {rows} rows, the network is started call by call: "
        "operation not permitted when stream is capturing"
        for rows in (1, 2)
    ]


@needs_cxx
def test_an_error_of_the_gpu_ends_the_samples_of_its_tick_and_no_others(
    baked: Bundle, fake: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows when the engine waits, so not in a later tick, and not as a wrong sample."""
    with_engine, _ = fake(baked, tmp_path, flavour="full")
    requests = requests_of(baked, False)[:2]
    here = Engine(baked, threads=1).generate(requests)
    engine = Engine(with_engine, max_rows=2, backend=TensorRTBackend)
    does = lazy_cuda.Stream.synchronize
    failures = iter([RuntimeError("cudaErrorLaunchFailure")])

    def fails_once(self: lazy_cuda.Stream) -> None:
        if error := next(failures, None):
            self.line.clear()
            raise error
        does(self)

    futures = engine.submit(requests)
    engine.step()
    monkeypatch.setattr(lazy_cuda.Stream, "synchronize", fails_once)
    engine.step()
    for future in futures:
        with pytest.raises(SampleFailed, match=r"^the step failed: cudaErrorLaunchFailure$"):
            future.result(timeout=0)
    for one, other in zip(here, engine.generate(requests), strict=True):
        assert one.pixels.tobytes() == other.pixels.tobytes()


@needs_cxx
@pytest.mark.parametrize("is_guided", [False, True])
def test_onnx_runtime_gives_the_cpus_bits_on_one_stream(
    baked: Bundle, guided: Bundle, gpu: None, monkeypatch: pytest.MonkeyPatch, is_guided: bool
) -> None:
    bundle = guided if is_guided else baked
    requests = requests_of(bundle, is_guided)
    here = Engine(bundle, max_rows=3, threads=1).generate(requests)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lazy_cuda.CudaSession)
    engine = Engine(bundle, max_rows=3, backend=OnnxCudaBackend)
    engine.warm_up()
    for one, other in zip(here, engine.generate(requests), strict=True):
        assert one.pixels.tobytes() == other.pixels.tobytes()


def in_half(bundle: Bundle, folder: Path, gives: int = onnx.TensorProto.FLOAT16) -> Bundle:
    """Its graph with a float16 input, and such an output if nothing else is said: the same network between casts."""
    model = onnx.load(bundle.network)
    (output,) = model.graph.output
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [{"x": "x_single", output.name: "raw_single"}.get(name, name) for name in names]
    (x,) = [value for value in model.graph.input if value.name == "x"]
    x.type.tensor_type.elem_type, output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16, gives
    model.graph.node.insert(0, onnx.helper.make_node("Cast", ["x"], ["x_single"], to=onnx.TensorProto.FLOAT))
    model.graph.node.append(onnx.helper.make_node("Cast", ["raw_single"], [output.name], to=gives))
    onnx.save(model, folder / bundle.network.name)
    return dataclasses.replace(bundle, path=folder)


@needs_cxx
def test_the_step_is_of_the_dtype_of_the_networks_input(
    guided: Bundle, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, requests = in_half(guided, tmp_path), requests_of(guided, True)
    here = Engine(bundle, max_rows=3, threads=1).generate(requests)
    single = Engine(guided, max_rows=3, threads=1).generate(requests)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lazy_cuda.CudaSession)
    there = Engine(bundle, max_rows=3, backend=OnnxCudaBackend).generate(requests)
    for one, other, wider in zip(here, there, single, strict=True):
        assert one.pixels.tobytes() == other.pixels.tobytes() != wider.pixels.tobytes()


@needs_cxx
def test_a_network_of_two_dtypes_ends_its_samples_with_the_reason(
    baked: Bundle, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = in_half(baked, tmp_path, onnx.TensorProto.FLOAT)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lazy_cuda.CudaSession)
    engine = Engine(bundle, max_rows=1, backend=OnnxCudaBackend)
    with pytest.raises(SampleFailed, match=r"the network gives float32 and takes float16: this CUDA step wants both"):
        engine.generate(requests_of(baked, False)[:1])


@needs_cxx
def test_onnx_runtime_runs_the_precision_that_is_asked_for(
    baked: Bundle, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = add_precisions(baked, tmp_path / "student", ["float16"])
    requests = requests_of(bundle, False)
    here = Engine(bundle, max_rows=3, threads=1, precision="float16").generate(requests)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lazy_cuda.CudaSession)
    there = Engine(bundle, max_rows=3, backend=backend_on("cuda", "float16")).generate(requests)
    assert all(one.pixels.tobytes() == other.pixels.tobytes() for one, other in zip(here, there, strict=True))


@pytest.mark.parametrize(
    ("least", "most", "sizes"), [(1, 1, [1]), (1, 6, [1, 2, 4, 6]), (1, 64, [1, 2, 4, 8, 16, 32, 64]), (4, 4, [4])]
)
def test_buckets_are_powers_of_two_and_the_largest_batch(least: int, most: int, sizes: list[int]) -> None:
    ran: list[int] = []
    buckets = Buckets(least, most, ran.append, None)
    buckets.prepare(lambda: None)
    assert ran == buckets.sizes == sizes
    del ran[:]
    for rows in range(1, most + 1):
        buckets(rows)
    assert ran == [min(size for size in sizes if size >= rows) for rows in range(1, most + 1)]


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("is_guided", [False, True])
@pytest.mark.parametrize("way", ["onnxruntime", "torch", "tensorrt", "tensorrt_rtx"])
def test_on_a_gpu_samples_are_the_cpus_to_rounding(
    baked: Bundle, guided: Bundle, tmp_path: Path, way: str, is_guided: bool
) -> None:
    """TF32 and other orders of summation; what is wrong is far off."""
    bundle = guided if is_guided else baked
    pytest.importorskip("cupy", reason="CuPy is not installed")
    backend: Any = OnnxCudaBackend
    try:
        if way == "torch":
            backend = torch_backend(network(0), "cuda")
        elif way != "onnxruntime":
            pytest.importorskip(way, reason=f"{way} is not installed")
            flavour: Flavour = "full" if way == "tensorrt" else "rtx"
            bundle, _ = add_engines(bundle, tmp_path / "with", flavour=flavour, precisions=["float32"], batch=(1, 4, 8))
            backend = TensorRTBackend
        engine = Engine(bundle, max_rows=3, backend=backend)
    except BackendError as error:
        pytest.skip(str(error))
    requests = requests_of(bundle, is_guided)
    here = Engine(bundle, max_rows=3, threads=1).generate(requests)
    for one, other in zip(here, engine.generate(requests), strict=True):
        difference = np.sqrt(np.mean((one.pixels - other.pixels) ** 2) / np.mean(one.pixels**2))
        assert difference < 0.05
