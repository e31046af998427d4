"""The CUDA step without a GPU: it compiles without spills, and its source, run on the CPU, gives the reference's bits.

A C++ compiler takes ``cuda.cu`` as it is, given stand-ins for CUDA's few names; a loop over the grid that `plan`
chose stands in for the GPU. So the indexing, both access widths and all history depths are executed here.
"""

import hashlib
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fused_step_cases import CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from lazy_cuda import emulate
from numpy.typing import NDArray
from scripts import load_script

from fewstep.kernels import cuda, native, step_reference

BUILDS: Any = load_script("cuda_builds")
Array = NDArray[Any]
DTYPES: dict[cuda.Network, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
needs_compiler = pytest.mark.skipif(not cuda._compiler(), reason="neither NVRTC nor nvcc is installed")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
ANOTHER = 12345  # a user's number
needs_cxx = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


class Emulated:
    """The kernels of one build as `fused_step`; it remembers which of them ran."""

    def __init__(self, launch: Any, network: cuda.Network) -> None:
        self._launch, self._network = launch, network
        self.ran: set[str] = set()

    def __call__(
        self, table: Array, row: Array, x: Array, history: Array, raw: Array, uncond: Array, guidance: Array,
        seed: Array, network_input: Array,
    ) -> None:  # fmt: skip
        (rows, elements), slots = x.shape, history.shape[1]
        pointers = tuple(array.ctypes.data for array in (x, history, raw, network_input))
        launch = cuda.plan(rows, elements, slots, self._network, pointers)
        self.ran.add(launch.kernel)
        self._launch(
            launch.kernel.encode(), *launch.grid, launch.threads, table.ctypes.data, table.strides[0], row.ctypes.data,
            elements, slots, x.ctypes.data, history.ctypes.data, raw.ctypes.data, uncond.ctypes.data,
            guidance.ctypes.data, seed.ctypes.data, network_input.ctypes.data,
        )  # fmt: skip


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Emulated]:
    """Build the CUDA source with g++: ``emulated(network, fast=False)``."""
    made: dict[tuple[str, bool], Emulated] = {}
    folder = tmp_path_factory.mktemp("emulated")

    def build(network: cuda.Network, fast: bool = False) -> Emulated:
        if (network, fast) not in made:
            made[network, fast] = Emulated(emulate(folder, network, fast), network)
        return made[network, fast]

    return build


EVERY_ACCESS = {**CASES, "elements": st.sampled_from([1, 3, 4, 7, 8, 20, 32, 64, 65, 1024, 2056, 2059])}
HISTORIES = [1, 2, 3, 4, 5, 8, 11]
EVERY_ACCESS["history"] = st.sampled_from(HISTORIES)


@needs_cxx
@pytest.mark.parametrize("network", cuda.NETWORKS)
def test_the_cuda_source_run_on_the_cpu_is_the_reference_to_the_bit(
    network: cuda.Network, emulated: Callable[..., Emulated]
) -> None:
    """Also what is not read: NaN stands in every unused term of a `Case`."""
    step = emulated(network)

    def holds(seed: int, rows: int, elements: int, history: int, dtype: Any) -> None:
        case = Case(np.random.default_rng(seed), rows, elements, history, dtype)
        for got, wanted in zip(case.run(step), case.run(step_reference), strict=True):
            assert got.tobytes() == wanted.tobytes()

    for history, elements in product(HISTORIES, (64, 65)):  # every kernel, whatever is drawn below
        holds(0, 3, elements, history, DTYPES[network])
    drawn = {**EVERY_ACCESS, "dtype": st.just(DTYPES[network])}
    settings(max_examples=150, deadline=None)(given(**drawn)(holds))()
    assert step.ran == {f"fewstep_step_{depth}_{access}" for depth in cuda.DEPTHS for access in ("whole", "any")}


@needs_cxx
def test_unaligned_arrays_give_the_same_bits(emulated: Callable[..., Emulated]) -> None:
    case = Case(np.random.default_rng(3), 5, 64, 2, np.float32)
    wanted = case.run(step_reference)

    def off_by_four(array: Array) -> Array:
        memory = np.empty(array.nbytes + 32, np.uint8)
        start = -memory.ctypes.data % 16 + 4
        moved = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        moved[...] = array
        return moved

    case.x, case.raw = off_by_four(case.x), off_by_four(case.raw)

    def step(table: Array, row: Array, x: Array, history: Array, *others: Array) -> None:
        moved = off_by_four(x)
        emulated("float32")(table, row, moved, history, *others)
        x[...] = moved

    for got, want in zip(case.run(step), wanted, strict=True):
        assert got.tobytes() == want.tobytes()


@needs_cxx
def test_fast_noise_is_the_exact_noise_to_2e_6_with_the_c_librarys_functions(tmp_path: Path) -> None:
    """A GPU's own err by up to 2**-21 each, which the square root widens near zero."""
    said = BUILDS.fast_noise(emulate(tmp_path, "float32", True), 50_000)
    assert said["normals"] == 200_000
    assert 0 < said["rms_difference"] < said["largest_difference"] < 2e-6


@pytest.mark.parametrize(
    ("rows", "elements", "slots", "network", "address", "wanted"),
    [
        (3, 784, 1, "float32", 0, cuda.Launch("fewstep_step_1_whole", (1, 3), 224)),
        (3, 784, 3, "float32", 4, cuda.Launch("fewstep_step_4_any", (1, 3), 224)),
        (1, 3 * 256 * 256, 9, "bfloat16", 64, cuda.Launch("fewstep_step_8_whole", (96, 1), 256)),
        (2, 12, 2, "float16", 0, cuda.Launch("fewstep_step_2_any", (1, 2), 32)),
    ],
)
def test_the_launch_covers_each_element_once(
    rows: int, elements: int, slots: int, network: cuda.Network, address: int, wanted: cuda.Launch
) -> None:
    launch = cuda.plan(rows, elements, slots, network, (0, address))
    assert launch == wanted
    width = 4 if network == "float32" else 8
    assert (launch.grid[0] - 1) * launch.threads * width < elements <= launch.grid[0] * launch.threads * width


def test_a_batch_larger_than_a_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^65536 rows: a launch takes 1 to 65535$"):
        cuda.plan(65536, 4, 1, "float32", (0,))


SERVED: list[tuple[cuda.Network, cuda.Noise]] = [(network, "exact") for network in cuda.NETWORKS]


@needs_compiler
@pytest.mark.parametrize(("network", "noise"), [*SERVED, ("float32", "fast")])
@pytest.mark.parametrize("capability", BUILDS.CAPABILITIES)
def test_it_compiles_for_every_architecture_without_spills(
    capability: str, network: cuda.Network, noise: cuda.Noise
) -> None:
    """All builds that the runtime uses, and a third of those with fast noise; all are in ``cuda_builds.json``."""
    made = BUILDS.build(capability, network, noise)
    assert (made["kernels"], made["stack_bytes"], made["spilled_bytes"]) == (8, 0, 0), made


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_nvcc_takes_the_same_source() -> None:
    made, said = cuda._by_nvcc("cubin", "cuda.cu", ["-arch=sm_80", "-DFEWSTEP_NETWORK=1", "-DFEWSTEP_FAST_NOISE=0"])
    assert made[:4] == b"\x7fELF"
    assert said.count(" 0 bytes spill stores, 0 bytes spill loads") == 8, said


# --- the cache


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two cache folders of our own, and a compiler that counts in place of the real one."""
    made = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setattr(native, "_places", lambda: made)
    monkeypatch.setattr(cuda, "_compiler", lambda: "pretended 1.0")
    compiled: list[str] = []

    def compile_cubin(capability: str, options: list[str]) -> tuple[bytes, str]:
        compiled.append(capability)
        return b"\x7fELF" + capability.encode() + b"%d" % len(compiled), ""

    monkeypatch.setattr(cuda, "compile_cubin", compile_cubin)
    return made


def test_a_cubin_is_compiled_once_for_each_architecture(folders: list[Path]) -> None:
    assert cuda.cubin("90") == cuda.cubin("90") == b"\x7fELF901"
    assert cuda.cubin("80") == b"\x7fELF802"
    assert cuda.cubin("90", "float16") == b"\x7fELF903"
    assert len(list(folders[0].iterdir())) == 3


def test_a_torn_or_altered_cubin_is_compiled_again(folders: list[Path]) -> None:
    cuda.cubin("90")
    (kept,) = folders[0].iterdir()
    whole = kept.read_bytes()
    for spoiled in (b"", whole[:20], whole[:-1], whole[:-1] + b"x", b"x" + whole[1:]):
        kept.write_bytes(spoiled)
        assert cuda.cubin("90") != spoiled[:-32]
        assert native.read_kept(kept) is not None


def test_a_folder_that_cannot_be_written_is_passed_over(folders: list[Path]) -> None:
    folders[0].write_text("a file where the folder should be")
    assert cuda.cubin("90") == cuda.cubin("90") == b"\x7fELF901"
    folders[1].rename(folders[1].with_name("gone"))
    folders[1].write_text("neither")
    assert cuda.cubin("80") == b"\x7fELF802"


def plant(folder: Path, name: str) -> Path:
    """What another user would put there: whole, and of his own making."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_bytes(b"planted" + hashlib.sha256(b"planted").digest())
    return file


@needs_root
@pytest.mark.parametrize("of_another", ["folder", "file", "link"])
def test_what_another_user_put_in_place_is_not_loaded(
    folders: list[Path], tmp_path: Path, of_another: str, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.cubin("90")
    (name,) = [path.name for path in folders[0].iterdir()]
    shutil.rmtree(folders[0])
    if of_another == "link":
        planted = plant(tmp_path / "elsewhere", name)
        folders[0].symlink_to(planted.parent)
        os.chown(folders[0], ANOTHER, ANOTHER, follow_symlinks=False)
    else:
        planted = plant(folders[0], name)
        os.chown(planted if of_another == "file" else planted.parent, ANOTHER, ANOTHER)
    assert cuda.cubin("90") == b"\x7fELF902"
    if of_another == "file":  # in a folder of ours: ours takes its place
        assert native.read_kept(planted) == b"\x7fELF902"
    else:
        assert native.read_kept(folders[1] / name) == b"\x7fELF902"
        assert f"{folders[0]} is not used: it belongs to another user" in caplog.messages


def test_what_others_could_have_altered_is_compiled_again(folders: list[Path]) -> None:
    """The folder is closed to them; what was open to them is not believed."""
    cuda.cubin("90")
    (kept,) = folders[0].iterdir()
    assert (stat.S_IMODE(folders[0].stat().st_mode), stat.S_IMODE(kept.stat().st_mode)) == (0o700, 0o600)
    for mode in (0o620, 0o602):
        plant(folders[0], kept.name).chmod(mode)
        folders[0].chmod(0o777)
        assert cuda.cubin("90") != b"planted"
        assert cuda.cubin("90") == native.read_kept(kept)
        assert stat.S_IMODE(folders[0].stat().st_mode) == 0o755


def test_a_user_without_a_home_and_a_name_gets_the_second_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in containers that are run under a number."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(RuntimeError):
        Path.home()
    assert list(native.cache_folders()) == [tmp_path / f"fewstep-{os.getuid()}"]


@needs_compiler
def test_two_processes_that_compile_at_once_both_get_whole_kernels(tmp_path: Path) -> None:
    """With the real compiler: two processes, one empty cache, and whoever comes later reads what is kept."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    print_hash = "import hashlib; from fewstep.kernels import cuda; print(hashlib.sha256(cuda.cubin('80')).hexdigest())"
    command = [sys.executable, "-c", print_hash]
    together = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in together]
    assert [process.returncode for process in together] == [0, 0]
    (kept,) = (tmp_path / "fewstep").glob("fewstep-cuda-80-*.cubin")
    whole = native.read_kept(kept)
    assert whole is not None
    assert list((tmp_path / "fewstep").iterdir()) == [kept]  # nothing half-written beside it
    later = subprocess.run(command, env={**environment, "PATH": ""}, capture_output=True, text=True, check=True).stdout
    assert {*said, later} == {hashlib.sha256(whole).hexdigest() + "\n"}


class CUDARuntimeError(RuntimeError):
    """CuPy's."""


class CUDADriverError(RuntimeError):
    """CuPy's."""


def fails(error: Exception) -> Callable[..., Any]:
    def call(*_: Any) -> None:
        raise error

    return call


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """As much of ``cupy.cuda`` as a step asks for when it is made."""
    module = SimpleNamespace(load=lambda cubin: None, get_function=lambda name: name)
    cupy = ModuleType("cupy")
    cupy.cuda = made = SimpleNamespace(  # type: ignore[attr-defined]
        Device=lambda: SimpleNamespace(compute_capability="90"),
        Module=lambda: module,
        runtime=SimpleNamespace(CUDARuntimeError=CUDARuntimeError, driverGetVersion=lambda: 12080),
        driver=SimpleNamespace(CUDADriverError=CUDADriverError),
        module=module,
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return made


def test_without_a_driver_the_error_says_so(gpu: SimpleNamespace) -> None:
    """As CuPy says it where there is none."""
    gpu.Device = fails(CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient"))
    with pytest.raises(cuda.CudaError, match=r"^no CUDA device: cudaErrorInsufficientDriver: CUDA driver version"):
        cuda.CudaStep()


@pytest.mark.parametrize("error", [CUDADriverError, CUDARuntimeError])
def test_a_driver_that_is_too_old_for_the_kernels_is_told_with_what_helps(
    gpu: SimpleNamespace, folders: list[Path], error: type[Exception]
) -> None:
    gpu.module.load = fails(error("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid"))
    with pytest.raises(
        cuda.CudaError,
        match=r"^the GPU's driver, of CUDA 12\.8, does not load the kernels: CUDA_ERROR_INVALID_IMAGE: .* is invalid; "
        r"if it is older than their compiler, pretended 1\.0, update it, or: pip install 'nvidia-cuda-nvrtc<12\.9'$",
    ):
        cuda.CudaStep()


def test_arrays_of_another_dtype_than_the_kernels_are_refused(gpu: SimpleNamespace, folders: list[Path]) -> None:
    """The kernel would read and write past their ends."""
    step = cuda.CudaStep("float16")
    half, single = np.zeros((1, 4), np.float16), np.zeros((1, 4), np.float32)
    told = r"^the network gives float32 and takes float16: this CUDA step wants both as float16, for float16$"
    with pytest.raises(ValueError, match=told):
        step(None, None, single, single[None], single, None, None, None, half)


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``nvcc(version)``: such a compiler and no NVRTC; what it makes is its version."""
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    monkeypatch.setattr(native, "_places", lambda: [tmp_path / "cache"])
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def install(version: str) -> None:
        compiler = tmp_path / "nvcc"
        compiler.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools\nBuild {version}" && exit\n'
            f'[ {version} = slow ] && exec sleep 60\nwhile [ "$1" != -o ]; do shift; done; printf {version} > "$2"\n'
        )
        compiler.chmod(0o755)

    return install


def test_another_nvcc_compiles_anew(nvcc: Callable[[str], None]) -> None:
    nvcc("13.0")
    assert cuda._compiler() == "nvcc Build 13.0"
    assert cuda.cubin("90") == b"13.0"
    nvcc("13.1")
    assert cuda.cubin("90") == b"13.1"


def test_an_nvcc_that_hangs_is_given_up_in_one_line(
    nvcc: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc("slow")
    monkeypatch.setattr(cuda, "NVCC_S", 0.2)
    told = r"^nvcc does not compile cuda\.cu for -arch=sm_90: .* timed out after .*; pip install cuda-bindings"
    with pytest.raises(cuda.CudaError, match=told):
        cuda.cubin("90")


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_compiler", lambda: "")
    with pytest.raises(cuda.CudaError, match=r"pip install cuda-bindings nvidia-cuda-nvrtc, or have nvcc$"):
        cuda.compile_cubin("90", [])


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("network", cuda.NETWORKS)
def test_the_gpu_gives_the_references_bits(network: cuda.Network) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        step = cuda.CudaStep(network)
    except cuda.CudaError as error:
        pytest.skip(str(error))
    stored = np.uint16 if network == "bfloat16" else DTYPES[network]

    def on_gpu(table: Array, *arrays: Array) -> None:
        flat = np.frombuffer(table.tobytes(), np.uint8).reshape(len(table), -1)
        device = [cupy.asarray(a.view(stored) if a.dtype == DTYPES[network] else a) for a in arrays]
        step(cupy.asarray(flat), *device)
        for host, array in zip(arrays, device, strict=True):
            host[...] = cupy.asnumpy(array).view(host.dtype)

    for seed in range(60):
        rng = np.random.default_rng(seed)
        elements, history = int(rng.choice([1, 7, 64, 784, 3072, 12289])), int(rng.choice([1, 2, 4, 8, 11]))
        case = Case(rng, int(rng.integers(1, 9)), elements, history, DTYPES[network])
        for got, wanted in zip(case.run(on_gpu), case.run(step_reference), strict=True):
            assert got.tobytes() == wanted.tobytes()
