"""The CUDA build of the fused step: compiled for the GPU at hand when first used, and kept.

NVRTC compiles ``cuda.cu`` to a cubin (nvcc does where NVRTC is not installed), which stands in the user's cache folder
under the hash of source, options, compiler and architecture, with its own hash behind it: a file that was torn
or altered is compiled again. CuPy holds the arrays, the stream and the loaded module; it is imported when a
`CudaStep` is made and not before.

Not run on a GPU yet. The tests compile it for every architecture that is served, and run the same source with the
same launch plan on the CPU against `step_reference`.
"""

import hashlib
import logging
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .native import cache_folders, keep, read_kept

log = logging.getLogger("fewstep")

Network = Literal["float32", "float16", "bfloat16"]
Noise = Literal["exact", "fast"]

NETWORKS: tuple[Network, ...] = ("float32", "float16", "bfloat16")
STORED: dict[Network, np.dtype[Any]] = {  # how an array of that dtype is given; CuPy has no bfloat16
    "float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16)
}  # fmt: skip
DEPTHS = (1, 2, 4, 8)  # history slots that a kernel loads ahead
THREADS = 256
NVCC_S = 300  # after which nvcc is given up
_FOLDER = Path(__file__).parent
_MAX_ROWS = 65535  # of a grid's second dimension


class CudaError(RuntimeError):
    """The CUDA build cannot be had here. One line: what is missing."""


class Launch(NamedTuple):
    """Which kernel moves a batch, and over which grid."""

    kernel: str
    grid: tuple[int, int]
    threads: int


def plan(rows: int, elements: int, slots: int, network: Network, pointers: tuple[int, ...]) -> Launch:
    """The launch for a batch.

    Args:
        rows: batch rows, at least 1.
        elements: of a row.
        slots: history slots of a row.
        network: the network's dtype.
        pointers: addresses of x, history, raw and network_input; 16-byte accesses need all of them aligned.

    Raises:
        ValueError: more rows than a grid has.
    """
    if not 0 < rows <= _MAX_ROWS:
        raise ValueError(f"{rows} rows: a launch takes 1 to {_MAX_ROWS}")
    width = 4 if network == "float32" else 8
    is_whole = elements % width == 0 and all(pointer % 16 == 0 for pointer in pointers)
    depth = next((depth for depth in DEPTHS if depth >= slots), DEPTHS[-1])
    threads = min(THREADS, 32 * -(-elements // (32 * width)))
    grid = (-(-elements // (threads * width)), rows)
    return Launch(f"fewstep_step_{depth}_{'whole' if is_whole else 'any'}", grid, threads)


class CudaStep:
    """`fused_step` on the current CUDA device and stream, for a network of one dtype.

    Args:
        network: dtype of ``raw`` and ``network_input``, which are given as `STORED` says.
        noise: ``exact`` gives the bits of `noise.normals`. ``fast`` takes the processor's own logarithm, sine and
            cosine on the same words; how far its normals are from the exact ones was not measured on a GPU yet.

    Raises:
        CudaError: no CuPy, no driver or one that is too old, no GPU or no compiler.
    """

    def __init__(self, network: Network = "float32", noise: Noise = "exact") -> None:
        try:
            import cupy
        except ImportError:
            raise CudaError("the CUDA step needs CuPy: pip install 'fewstep[gpu]'") from None
        runtime = cupy.cuda.runtime
        try:
            capability = cupy.cuda.Device().compute_capability
        except runtime.CUDARuntimeError as error:
            raise CudaError(f"no CUDA device: {error}") from None
        self.network = network
        self._stored = STORED[network]
        compiled = cubin(capability, network, noise)
        module = cupy.cuda.Module()
        try:
            module.load(compiled)
            names = [f"fewstep_step_{depth}_{access}" for depth in DEPTHS for access in ("whole", "any")]
            self._kernels = {name: module.get_function(name) for name in names}
        except (cupy.cuda.driver.CUDADriverError, runtime.CUDARuntimeError) as error:
            major, minor = divmod(runtime.driverGetVersion() // 10, 100)
            raise CudaError(
                f"the GPU's driver, of CUDA {major}.{minor}, does not load the kernels: {error}; if it is older than "
                f"their compiler, {_compiler()}, update it, or: pip install 'nvidia-cuda-nvrtc<{major}.{minor + 1}'"
            ) from None

    def __call__(
        self,
        table: Any,
        row: Any,
        x: Any,
        history: Any,
        raw: Any,
        uncond: Any,
        guidance: Any,
        seed: Any,
        network_input: Any,
    ) -> None:
        """Move each batch row by one table row; returns before the device is done.

        Args:
            table: ``[table rows, row bytes]`` uint8: the packed table's bytes, since CuPy has no structured dtypes.
            row: see `fused_step.step_reference`, as are the others; all C-contiguous on the device.
            x: see there.
            history: see there.
            raw: see there.
            uncond: see there.
            guidance: see there.
            seed: see there.
            network_input: see there.

        Raises:
            ValueError: raw or network_input is not of the network's dtype.
        """
        if not raw.dtype == network_input.dtype == self._stored:
            told = f"the network gives {raw.dtype} and takes {network_input.dtype}"
            raise ValueError(f"{told}: this CUDA step wants both as {self._stored}, for {self.network}")
        (rows, elements), slots = x.shape, history.shape[1]
        if not rows:
            return
        pointers = tuple(array.data.ptr for array in (x, history, raw, network_input))
        launch = plan(rows, elements, slots, self.network, pointers)
        arguments = (
            table, np.int64(table.shape[1]), row, np.int64(elements), np.int32(slots), x, history, raw, uncond,
            guidance, seed, network_input,
        )  # fmt: skip
        self._kernels[launch.kernel](launch.grid, (launch.threads,), arguments)


def cubin(capability: str, network: Network = "float32", noise: Noise = "exact") -> bytes:
    """The compiled kernels, from the cache or compiled now.

    Args:
        capability: compute capability without the point, such as ``90``.
        network: dtype of the network.
        noise: see `CudaStep`.

    Raises:
        CudaError: there is no compiler, or it refuses.
    """
    options = defines(network, noise)
    key = hashlib.sha256(" ".join([capability, _compiler(), *options]).encode())
    for source in ("cuda.cu", "fewstep_step.h"):
        key.update((_FOLDER / source).read_bytes())
    name = f"fewstep-cuda-{capability}-{key.hexdigest()[:24]}.cubin"
    folders = list(cache_folders())
    for folder in folders:
        kept = read_kept(folder / name)
        if kept is not None:
            return kept
    made = compile_cubin(capability, options)[0]
    for folder in folders:
        try:
            keep(folder / name, made)
            return made
        except OSError as error:  # a folder that cannot be written: try the next, at last keep nothing
            log.info("%s is not kept: %s", name, error)
    return made


def defines(network: Network, noise: Noise) -> list[str]:
    """The compiler's options that choose a build of ``cuda.cu``."""
    return [f"-DFEWSTEP_NETWORK={NETWORKS.index(network)}", f"-DFEWSTEP_FAST_NOISE={int(noise == 'fast')}"]


def compile_cubin(capability: str, options: list[str], source: str = "cuda.cu") -> tuple[bytes, str]:
    """Compile a source of this folder for one architecture.

    Returns:
        The cubin, and what the compiler said of registers and spills.

    Raises:
        CudaError: there is no compiler, or it refuses.
    """
    return _compiled("cubin", source, [f"-arch=sm_{capability}", *options])


def compile_ptx(capability: str, source: str) -> bytes:
    """Compile a source of this folder to PTX, which runs on GPUs of this compute capability and later ones.

    A driver older than the compiler does not know its PTX.

    Raises:
        CudaError: there is no compiler, or it refuses.
    """
    return _compiled("ptx", source, [f"-arch=compute_{capability}"])[0].rstrip(b"\0")


def _compiled(kind: Literal["cubin", "ptx"], source: str, options: list[str]) -> tuple[bytes, str]:
    compiler = _compiler()
    if not compiler:
        raise CudaError("the CUDA step needs a compiler: pip install cuda-bindings nvidia-cuda-nvrtc, or have nvcc")
    return _by_nvcc(kind, source, options) if compiler.startswith("nvcc") else _by_nvrtc(kind, source, options)


def _compiler() -> str:
    """Which compiler there is, with its version; empty if none."""
    try:
        if find_spec("cuda.bindings.nvrtc") is not None:
            from cuda.bindings import nvrtc

            error, *version = nvrtc.nvrtcVersion()
            if not int(error):
                return f"nvrtc {'.'.join(map(str, version))}"
    except (ImportError, RuntimeError):  # the bindings without the library raise RuntimeError
        pass
    try:
        told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # there is none, or one that does not run
        return ""
    return f"nvcc {told.strip().splitlines()[-1]}"


def _by_nvrtc(kind: str, source: str, options: list[str]) -> tuple[bytes, str]:
    from cuda.bindings import nvrtc

    header, text = ((_FOLDER / name).read_bytes() for name in ("fewstep_step.h", source))
    program = _checked(nvrtc.nvrtcCreateProgram(text, source.encode(), 1, [header], [b"fewstep_step.h"]))
    get_size, get = nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN
    if kind == "ptx":
        get_size, get = nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX
    with _destroyed(program):
        every = [option.encode() for option in [*options, "--ptxas-options=-v"]]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(every), every)
        said = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, said)
        told = said.rstrip(b"\0 ").decode(errors="replace")
        if int(status):
            raise CudaError(f"NVRTC does not compile {source} for {options[0]}: {told or status.name}")
        made = b" " * _checked(get_size(program))
        get(program, made)
        return made, told


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if int(status):
        raise CudaError(f"NVRTC: {status.name}")
    return values[0] if values else None


@contextmanager
def _destroyed(program: Any) -> Iterator[None]:
    from cuda.bindings import nvrtc

    try:
        yield
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _by_nvcc(kind: str, source: str, options: list[str]) -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"made.{kind}"
        command = ["nvcc", f"-{kind}", "-O3", "-Xptxas", "-v", *options, "-o", str(out), str(_FOLDER / source)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=NVCC_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            instead = "pip install cuda-bindings nvidia-cuda-nvrtc compiles in its place"
            raise CudaError(f"nvcc does not compile {source} for {options[0]}: {error}; {instead}") from None
        if done.returncode:
            raise CudaError(f"nvcc does not compile {source} for {options[0]}: {done.stderr.strip()}")
        return out.read_bytes(), done.stderr
