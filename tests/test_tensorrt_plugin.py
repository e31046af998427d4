"""The TensorRT plugin of the fused step, without TensorRT: its kernel's bits, its PTX, its registration, its refusals.

NVIDIA's own ``tensorrt.plugin`` takes the registration and asks for the launch, over a stand-in for the compiled half
of the package; the kernel then runs on the CPU, over the grid and with the sizes that came out.
"""

import json
import re
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
import pytest
import tensorrt_shim
from numpy.typing import NDArray
from test_onnx_graphs import one_update, session

from fewstep.cli import main
from fewstep.export.additions import add_engines
from fewstep.export.engines import build_engine
from fewstep.export.sampler_graph import sampler_graph
from fewstep.export.step_graph import ExportError
from fewstep.export.tensorrt_plugin import CAPABILITY, KERNEL, PLUGIN, SOURCE, register_update, without_body
from fewstep.export.update_op import NAME, weights_of
from fewstep.kernels import StepRow, cuda
from fewstep.runtime import Bundle

Array = NDArray[Any]
BINDINGS = find_spec("tensorrt_bindings")
needs_compiler = pytest.mark.skipif(not cuda._compiler(), reason="neither NVRTC nor nvcc is installed")
needs_cxx = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
needs_bindings = pytest.mark.skipif(BINDINGS is None, reason="TensorRT's bindings are not installed")


def inputs_of(slots: int, shape: tuple[int, ...]) -> dict[str, Array]:
    rng = np.random.default_rng(slots)
    rows = [
        StepRow(0.3, -0.7, -1.0, 1.0, 0.9, tuple(rng.uniform(-1, 1, slots)), 0.5, 0.4, i % slots, i) for i in range(5)
    ]
    rows[1] = StepRow(0, 1, -np.inf, np.inf, 0.5, (0.5,), 0, 1, -1, 1)
    x, raw, noise = (rng.standard_normal((5, *shape), np.float32) for _ in range(3))
    history = rng.standard_normal((5, slots, *shape), np.float32)
    return {"x": x, "raw": raw, "noise": noise, "history": history, "weights": weights_of(rows, slots)}


class Sizes:
    """Where TensorRT takes the kernel's numbers."""

    nbSymExprs = 0  # noqa: N815 (TensorRT's name)

    def __init__(self) -> None:
        self.values: dict[int, int] = {}

    def __setitem__(self, i: int, value: Any) -> None:
        assert value.dtype == "int32"
        self.values[i] = value.expr.value


@needs_bindings
@needs_compiler
@needs_cxx
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_what_tensorrt_would_launch_gives_the_function_bodys_bits(slots: int, tmp_path: Path) -> None:
    """Registered, asked for output shapes and the launch as by a build, then run; 30 elements are no multiple of 4."""
    inputs = inputs_of(slots, (2, 3, 5))
    wanted = session(one_update(slots), False).run(None, inputs)
    assert BINDINGS is not None
    assert BINDINGS.submodule_search_locations is not None
    with tensorrt_shim.installed(Path(BINDINGS.submodule_search_locations[0])) as trt:
        register_update(trt)
        register_update(trt)  # a second time in a process is nothing
        creator = trt.get_plugin_registry().get_creator("FewStepUpdate", "1", "fewstep")
        plugin = creator.create_plugin("FewStepUpdate", "fewstep", [], None, trt.QuickPluginCreationRequest.PREFER_AOT)
        ranks = [array.ndim for array in inputs.values()]
        assert plugin.get_output_data_types(["float32"] * 5, ranks) == ["float32"] * 3
        expressions = [[trt.IDimensionExpr(n) for n in array.shape] for array in inputs.values()]
        shapes = plugin.get_output_shapes(expressions, [], trt.IExprBuilder())
        assert [tuple(n.value for n in shape) for shape in shapes] == [array.shape for array in wanted]
        described = [trt.DynamicPluginTensorDesc(array.shape, "float32") for array in [*inputs.values(), *wanted]]
        plugin.set_tactic(0)
        launch, sizes = SimpleNamespace(), Sizes()
        plugin.get_launch_params(expressions, described, 5, launch, sizes, trt.IExprBuilder())
        one = [desc.desc for desc in described]
        name, ptx = plugin.get_kernel(one[:5], one[5:])
    assert name == KERNEL
    assert f".entry {KERNEL}(".encode() in ptx
    made = {name: getattr(launch, name).expr.value for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y")}
    assert made == {"grid_x": 1, "grid_y": 5, "grid_z": 1, "block_x": 256, "block_y": 1}
    assert sizes.nbSymExprs == 2
    assert sizes.values == {0: 30, 1: slots}
    got = [np.full(array.shape, np.nan, np.float32) for array in wanted]
    lazy_cuda.emulate_update(tmp_path)(
        name.encode(), made["grid_x"], made["grid_y"], made["block_x"], *(a.ctypes.data for a in inputs.values()),
        sizes.values[0], sizes.values[1], *(a.ctypes.data for a in got),
    )  # fmt: skip
    for one_, want in zip(got, wanted, strict=True):
        assert one_.tobytes() == want.tobytes()


@needs_cxx
@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 1, 3), (3, 28, 28)])
def test_the_kernel_gives_the_function_bodys_bits(shape: tuple[int, int, int], tmp_path: Path) -> None:
    """Rows in whole 16 bytes and others, one block and several."""
    inputs = inputs_of(2, shape)
    wanted = session(one_update(2, shape), False).run(None, inputs)
    elements = int(np.prod(shape))
    got = [np.full(array.shape, np.nan, np.float32) for array in wanted]
    lazy_cuda.emulate_update(tmp_path)(
        KERNEL.encode(), -(-elements // 1024), 5, 256, *(a.ctypes.data for a in inputs.values()), elements, 2,
        *(a.ctypes.data for a in got),
    )  # fmt: skip
    for one, want in zip(got, wanted, strict=True):
        assert one.tobytes() == want.tobytes()


@needs_compiler
def test_the_ptx_takes_inputs_then_sizes_then_outputs() -> None:
    ptx = cuda.compile_ptx(CAPABILITY, SOURCE).decode()
    assert f".target sm_{CAPABILITY}" in ptx
    (parameters,) = re.findall(rf"\.entry {KERNEL}\((.*?)\)", ptx, re.DOTALL)
    assert re.findall(r"\.param \.(\w+)", parameters) == ["u64"] * 5 + ["u32"] * 2 + ["u64"] * 3


@needs_compiler
@pytest.mark.parametrize("capability", ["80", "90", "100", "120"])
def test_the_kernel_compiles_without_spills(capability: str) -> None:
    _, said = cuda.compile_cubin(capability, [], SOURCE)
    spent = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spent == [("0", "0", "0")], said


def test_without_its_body_the_operator_is_left_to_a_plugin(baked: Bundle) -> None:
    graph = sampler_graph(onnx.load(baked.network), 2, slots=1)
    bare = without_body(graph)
    assert [function.name for function in graph.functions] == [NAME]
    assert not bare.functions
    assert [node.op_type for node in bare.graph.node].count(NAME) == 3
    assert {f"{node.domain}::{node.op_type}" for node in bare.graph.node if node.domain} == {PLUGIN}


# --- a build by the full TensorRT


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The full TensorRT, as far as it goes, beside a GPU of compute capability 9.0."""
    monkeypatch.setitem(sys.modules, "cupy", cupy := ModuleType("cupy"))
    cupy.cuda = SimpleNamespace(Device=lambda: SimpleNamespace(compute_capability="90"))  # type: ignore[attr-defined]
    assert BINDINGS is not None
    assert BINDINGS.submodule_search_locations is not None
    with tensorrt_shim.installed(Path(BINDINGS.submodule_search_locations[0])) as trt:
        yield trt


@needs_bindings
@needs_compiler
def test_the_full_tensorrt_is_asked_for_a_plugin_and_one_gpu(baked: Bundle, full: ModuleType, tmp_path: Path) -> None:
    """The step keeps to standard operators; the sampler has no bodies left, and prefers what is ahead of time."""
    made = add_engines(
        baked, tmp_path / "out", flavour="full", batch=(1, 2, 4), has_sampler=True, has_plugin=True
    )[1]  # fmt: skip
    step, sampler = (
        json.loads((tmp_path / "out" / "engines" / f"{kind}-float16-full.engine").read_bytes())
        for kind in ("step", "sampler")
    )
    assert (step["flags"], step["plugins"]) == (["STRONGLY_TYPED"], 0)
    assert sampler["flags"] == ["PREFER_AOT_PYTHON_PLUGINS", "STRONGLY_TYPED"]
    assert sampler["plugins"] == baked.tableau().num_steps + 1
    assert step["profile"]["x"] == [[rows, 1, 8, 8] for rows in (1, 2, 4)]
    assert set(sampler["profile"]) == {"noise", "label"}  # the table's shape is fixed
    for entry in made.values():
        assert (entry.version, entry.targets) == ("11.4", ("sm90",))
        assert entry.refusal("11.4", "90") is None
        assert entry.refusal("11.4", "89") == "it was built for sm90, this GPU is sm89"


@needs_bindings
def test_a_bare_operator_without_its_plugin_is_refused_by_its_name(baked: Bundle, full: ModuleType) -> None:
    bare = without_body(sampler_graph(onnx.load(baked.network), 2, slots=1))
    with pytest.raises(ExportError, match=r"^TensorRT does not take node step0\.update \(FewStepUpdate\): no plugin$"):
        build_engine(bare, flavour="full")


@needs_bindings
def test_the_timing_cache_is_kept_between_builds(
    baked: Bundle, full: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole: a write that fails leaves the old one. One that TensorRT does not take is refused, and left."""
    step, cache = onnx.load(baked.network), tmp_path / "timing"
    for builds in (1, 2):
        build_engine(step, flavour="full", timing_cache=cache)
        assert cache.read_bytes() == f"cache of sm90 {builds}".encode()

    def fails(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        with pytest.raises(OSError, match="no space left"):
            build_engine(step, flavour="full", timing_cache=cache)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("timing", b"cache of sm90 2")]
    cache.write_bytes(b"of another GPU")
    with pytest.raises(ExportError, match=r"timing: is no timing cache of TensorRT 11\.4 and this GPU; remove it$"):
        build_engine(step, flavour="full", timing_cache=cache)
    assert cache.read_bytes() == b"of another GPU"


@needs_bindings
def test_the_full_tensorrt_builds_for_the_gpu_at_hand_only(
    baked: Bundle, full: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = onnx.load(baked.network)
    with pytest.raises(ExportError, match=r"^target sm89: the full TensorRT builds for the GPU at hand only; leave "):
        build_engine(step, flavour="full", targets=["sm89"])

    def no_driver() -> None:
        raise RuntimeError("cudaErrorInsufficientDriver")

    sys.modules["cupy"].cuda.Device = no_driver
    with pytest.raises(ExportError, match=r"for the GPU at hand, and there is none: cudaErrorInsufficientDriver$"):
        build_engine(step, flavour="full")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ExportError, match=r"for the GPU at hand, which CuPy names: pip install 'fewstep\[gpu\]'$"):
        build_engine(step, flavour="full")


def test_tensorrt_for_rtx_takes_no_timing_cache(baked: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^timing_cache: TensorRT for RTX measures nothing when it builds; leave it"):
        add_engines(baked, tmp_path / "out", timing_cache=tmp_path / "timing")


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
def test_tensorrt_for_rtx_is_refused_in_one_line(
    baked: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-o", str(tmp_path / "out"), "--tensorrt", "--sampler", "--plugin"]
    monkeypatch.setattr("sys.argv", ["fewstep", "export", str(baked.path), *flags])
    with pytest.raises(SystemExit):
        main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(
        r"tensorrt_rtx 1\.[\d.]+ has no ahead-of-time plugins; the full TensorRT has from 10\.7 on, "
        r"and without the plugin the graph's own operators do its work$",
        line,
    )


def test_a_full_tensorrt_before_10_7_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old, plugin = ModuleType("tensorrt"), ModuleType("tensorrt.plugin")
    old.__version__ = "10.6"  # type: ignore[attr-defined]
    plugin.register = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    with pytest.raises(ExportError, match=r"^tensorrt 10\.6 has no ahead-of-time plugins; "):
        register_update(old)


def test_a_plugin_without_a_sampler_is_refused(baked: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^plugin: only a whole sampler holds fused steps; ask for the sampler too$"):
        add_engines(baked, tmp_path / "out", flavour="full", has_plugin=True)
