"""A GPU's stand-in: enough of CuPy for `runtime.devices.Cuda`, in host memory, that does everything as late as it may.

What is asked of a stream is put in line, and done when somebody waits for it. So a host buffer that is written again
before the device has read it, an answer fetched from the wrong stream and work on the default stream all show: as
wrong numbers or as errors. A capture takes what is asked in between, as CUDA does, and waiting during one is an error.

The kernels are ``cuda.cu`` itself, compiled by g++ and run over the launch's grid; see `emulate`.
"""

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from fewstep.kernels import cuda

HostArray = NDArray[Any]
KERNELS = Path(cuda.__file__).parent

STAND_INS = r"""
#include <cstring>
#define __device__
#define __global__
#define __launch_bounds__(n)
#define __forceinline__ inline
struct Three { long x, y, z; };
static Three blockIdx, threadIdx, blockDim;
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
#define RUN(NAME, ...) \
  if (!strcmp(name, #NAME)) \
    for (blockIdx.y = 0; blockIdx.y < rows; blockIdx.y++) \
      for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) \
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) NAME(__VA_ARGS__);
"""

STEP = r"""
#include "cuda.cu"
#define STEP(NAME) \
  RUN(NAME, table, row_bytes, row, elements, slots, x, history, raw, uncond, guidance, seed, network_input)
extern "C" void launch(const char* name, long blocks, long rows, long threads, FEWSTEP_ARGUMENTS) {
  blockDim.x = threads;
  STEP(fewstep_step_1_whole) STEP(fewstep_step_2_whole) STEP(fewstep_step_4_whole) STEP(fewstep_step_8_whole)
  STEP(fewstep_step_1_any) STEP(fewstep_step_2_any) STEP(fewstep_step_4_any) STEP(fewstep_step_8_any)
}
"""

UPDATE = r"""
#include "update.cu"
extern "C" void launch(const char* name, long blocks, long rows, long threads, const float* x, const float* raw,
                       const float* noise, const float* history, const float* weights, int elements, int slots,
                       float* x_out, float* history_out, float* network_input) {
  blockDim.x = threads;
  RUN(fewstep_update, x, raw, noise, history, weights, elements, slots, x_out, history_out, network_input)
}
"""

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_longlong
GRID = [ctypes.c_char_p, ctypes.c_long, ctypes.c_long, ctypes.c_long]


def emulate(folder: Path, network: cuda.Network, fast: bool = False) -> Any:
    """``launch(name, blocks, rows, threads, *arguments of the kernel)`` of one build of the CUDA source, on the CPU."""
    launch = _built(folder, f"{network}-{fast}", STEP, cuda.defines(network, "fast" if fast else "exact"))
    launch.argtypes = [*GRID, POINTER, NUMBER, POINTER, NUMBER, ctypes.c_int, *[POINTER] * 7]
    return launch


def emulate_update(folder: Path) -> Any:
    """The same of the plugin's kernel."""
    launch = _built(folder, "update", UPDATE, [])
    launch.argtypes = [*GRID, *[POINTER] * 5, ctypes.c_int, ctypes.c_int, *[POINTER] * 3]
    return launch


def _built(folder: Path, name: str, text: str, defines: list[str]) -> Any:
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    if not library.exists():
        source.write_text(STAND_INS + text)
        flags = ["-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", f"-I{KERNELS}"]
        subprocess.run(["g++", *flags, *defines, str(source), "-o", str(library)], check=True, timeout=120)
    launch = ctypes.CDLL(str(library)).launch
    launch.restype = None
    return launch


class Stream:
    """Work in line. ``Stream.by_ptr`` finds one by the number that it gives to libraries."""

    by_ptr: ClassVar[dict[int, "Stream"]] = {}
    current: ClassVar[list["Stream"]] = []

    def __init__(self, non_blocking: bool = False) -> None:
        assert non_blocking, "one ordered after the default stream breaks captures of others"
        self.ptr = 1000 + len(Stream.by_ptr)
        Stream.by_ptr[self.ptr] = self
        self.line: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.replayed = 0  # graphs launched

    def __enter__(self) -> "Stream":
        Stream.current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        Stream.current.pop()

    def ask(self, work: Callable[[], None]) -> None:
        (self.line if self.captured is None else self.captured).append(work)

    def synchronize(self) -> None:
        assert self.captured is None, "waiting is not allowed in a capture"
        line, self.line = self.line, []
        for work in line:
            work()

    def begin_capture(self) -> None:
        assert self.captured is None
        self.captured = []

    def end_capture(self) -> "Graph":
        assert self.captured is not None
        work, self.captured = self.captured, None
        return Graph(work)


class Graph:
    """What a capture made."""

    def __init__(self, work: list[Callable[[], None]]) -> None:
        self._work = work

    def launch(self, stream: Stream) -> None:
        stream.replayed += 1
        for work in self._work:
            stream.ask(work)


def now() -> Stream:
    """The current stream; there is none by default, since that would be CUDA's default stream."""
    assert Stream.current, "work on the default stream"
    return Stream.current[-1]


class Pointer:
    """Where device memory begins."""

    def __init__(self, memory: HostArray) -> None:
        self.ptr, self._memory = memory.ctypes.data, memory

    def copy_from_device_async(self, source: "Pointer", size: int, stream: "Stream") -> None:
        assert self._memory.nbytes == size
        stream.ask(lambda: np.copyto(self._memory, source._memory))


class Event:
    """A moment on a stream."""

    def record(self, stream: Stream) -> None:
        self._stream = stream
        stream.ask(self._pass)

    def _pass(self) -> None:
        self.passed_s = time.perf_counter()

    def synchronize(self) -> None:
        self._stream.synchronize()


def elapsed_ms(start: Event, stop: Event) -> float:
    return 1000 * (stop.passed_s - start.passed_s)


class Array:
    """Device memory. Only basic indexing gives a view; whatever moves data is put in line."""

    def __init__(self, memory: HostArray) -> None:
        self.memory = memory
        self.shape, self.dtype, self.nbytes, self.size = memory.shape, memory.dtype, memory.nbytes, memory.size
        self.data = Pointer(memory)

    def __len__(self) -> int:
        return len(self.memory)

    def reshape(self, *shape: Any) -> "Array":
        return Array(self.memory.reshape(*shape))

    def view(self, dtype: Any) -> "Array":
        return Array(self.memory.view(dtype))

    def __getitem__(self, key: Any) -> "Array":
        if not isinstance(key, np.ndarray | list):
            return Array(self.memory[key])
        index, source = np.array(key), self.memory
        made = np.full_like(source[index], 77)
        now().ask(lambda: np.copyto(made, source[index]))
        return Array(made)

    def take(self, indices: list[int], axis: int) -> "Array":
        assert axis == 0
        return self[indices]

    def __setitem__(self, key: Any, value: Any) -> None:
        assert isinstance(value, Array), "an array of numpy into one of the device"
        index = np.array(key) if isinstance(key, list) else key
        target, source = self.memory, value.memory
        now().ask(lambda: target.__setitem__(index, source))

    def copy(self) -> "Array":
        source, made = self.memory, np.full_like(self.memory, 77)
        now().ask(lambda: np.copyto(made, source))
        return Array(made)

    def set(self, values: HostArray, stream: Stream) -> None:
        assert values.shape == self.shape
        assert values.dtype == self.dtype
        is_pinned = any(np.shares_memory(values, memory) for memory in PINNED)
        source = values if is_pinned else values.copy()  # ordinary memory is copied before CUDA returns
        stream.ask(lambda: np.copyto(self.memory, source))


PINNED: list[HostArray] = []


def empty_pinned(shape: Any, dtype: Any) -> HostArray:
    PINNED.append(np.empty(shape, dtype))
    return PINNED[-1]


def zeros(shape: Any, dtype: Any) -> Array:
    memory = np.full(shape, 77, dtype)
    now().ask(lambda: memory.fill(0))
    return Array(memory)


def asarray(values: HostArray) -> Array:
    made = zeros(values.shape, values.dtype)
    made.set(values, now())
    return made


def asnumpy(array: Array, stream: Stream) -> HostArray:
    assert isinstance(array, Array)
    stream.synchronize()
    return array.memory.copy()


class Module:
    """The compiled kernels; what is loaded says which build of the source is meant."""

    folder: ClassVar[Path]

    def load(self, cubin: bytes) -> None:
        network, noise = cubin.decode().split()
        self._launch = emulate(self.folder, network, noise == "fast")  # type: ignore[arg-type]

    def get_function(self, name: str) -> Callable[..., None]:
        def call(grid: tuple[int, int], threads: tuple[int], arguments: tuple[Any, ...]) -> None:
            values = [a.data.ptr if isinstance(a, Array) else a.item() for a in arguments]
            now().ask(lambda: self._launch(name.encode(), *grid, *threads, *values))

        return call


RealSession = onnxruntime.InferenceSession


class CudaSession:
    """ONNX Runtime with a CUDA provider whose device is the stand-in; asked for the CPU's, it is as ever."""

    def __new__(cls, path: str, options: Any = None, providers: Any = ()) -> Any:
        return (
            RealSession(path, options, providers=providers)
            if "CPUExecutionProvider" in providers
            else super().__new__(cls)
        )

    def __init__(self, path: str, options: Any, providers: Any) -> None:
        ((name, settings),) = providers
        assert name == "CUDAExecutionProvider"
        self._stream = Stream.by_ptr[int(settings["user_compute_stream"])]
        self._session = RealSession(path, options, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> Any:
        binding = self._session.io_binding()

        def bind(method: Any) -> Any:
            def on_host(name: str, device: str, *others: Any) -> None:
                assert device == "cuda"
                method(name, "cpu", *others)

            return on_host

        return SimpleNamespace(bind_input=bind(binding.bind_input), bind_output=bind(binding.bind_output), real=binding)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        # What is not turned off would wait for the stream at the end of each call.
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self._stream.ask(lambda: self._session.run_with_iobinding(binding.real))


@contextmanager
def installed(folder: Path, capability: str = "90") -> Iterator[ModuleType]:
    """Stand in for CuPy; ``folder`` keeps the emulated kernels."""
    module, cupyx = ModuleType("cupy"), ModuleType("cupyx")
    device = SimpleNamespace(compute_capability=capability, id=0)
    Module.folder = folder
    contents = {
        "zeros": zeros, "asarray": asarray, "asnumpy": asnumpy, "ndarray": Array,
        "cuda": SimpleNamespace(
            Device=lambda: device, Stream=Stream, Event=Event, get_elapsed_time=elapsed_ms, Module=Module,
            driver=SimpleNamespace(CUDADriverError=RuntimeError),
            runtime=SimpleNamespace(
                CUDARuntimeError=RuntimeError, driverGetVersion=lambda: 13000,
                getDeviceProperties=lambda device: {"name": b"a stand-in", "totalGlobalMem": 1},
            ),
        ),
    }  # fmt: skip
    for name, value in contents.items():
        setattr(module, name, value)
    cupyx.empty_pinned = empty_pinned  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", module)
        patch.setitem(sys.modules, "cupyx", cupyx)
        patch.setattr(cuda, "cubin", lambda capability, network, noise: f"{network} {noise}".encode())
        yield module
    Stream.by_ptr.clear()
    PINNED.clear()
