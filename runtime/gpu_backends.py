"""Networks on a CUDA GPU: ONNX Runtime's CUDA provider, and TensorRT engines of a bundle. Not run on a GPU yet.

    Engine(bundle, backend=OnnxCudaBackend)          Engine(bundle, backend=TensorRTBackend)

Inputs and outputs stay in the GPU's memory, where the fused step reads and writes them. Network, fused step and copies
share one stream, the device's, so nothing waits for anything but its turn; the engine waits once, at the end of a tick.
"""

import importlib
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime

from ..kernels.cuda import CudaError
from .backends import DTYPES, Backend, BackendError
from .bundle import Bundle
from .devices import Array, Cuda

log = logging.getLogger("fewstep")

_EXACT = ("float32", "float16", "bfloat16", "int8")  # of an engine, the most exact first

DeviceName = Literal["cpu", "cuda", "tensorrt"]
DEVICES: tuple[DeviceName, ...] = get_args(DeviceName)


def backend_on(device: DeviceName, precision: str = "float32") -> Callable[[Bundle, int], Backend] | None:
    """What makes the networks of an `Engine` on a device; None is ONNX Runtime on the CPU, by the engine itself."""
    if device == "cpu":
        return None
    return partial(OnnxCudaBackend if device == "cuda" else TensorRTBackend, precision=precision)


class OnnxCudaBackend:
    """ONNX Runtime with its CUDA provider, bound once to fixed device memory for each batch size.

    Args:
        bundle: the student.
        rows: the largest batch.
        precision: which of the bundle's networks; see `Bundle.network_in`.

    Raises:
        BackendError: there is no GPU, or the installed ONNX Runtime cannot use it.
        BundleError: the bundle has no such precision.
    """

    def __init__(self, bundle: Bundle, rows: int, precision: str = "float32") -> None:
        network = bundle.network_in(precision)
        self.device = gpu()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if hasattr(onnxruntime, "preload_dlls"):  # CUDA's libraries from pip's packages
            onnxruntime.preload_dlls()
        stream = {"user_compute_stream": str(self.device.stream.ptr)}
        providers = [("CUDAExecutionProvider", stream)]
        self._session = onnxruntime.InferenceSession(str(network), options, providers=providers)
        if self._session.get_providers()[0] != "CUDAExecutionProvider":  # it falls back without an error
            raise BackendError("ONNX Runtime has no working CUDA provider: pip install onnxruntime-gpu in its place")
        shape = bundle.manifest.sample_shape
        self.inputs: dict[str, Array] = {}
        for node in self._session.get_inputs():
            size = (rows, *shape) if node.name == "x" else (rows,)
            self.inputs[node.name] = self.device.zeros(size, DTYPES[node.type])
        self._raw = self.device.zeros((rows, *shape), DTYPES[self._session.get_outputs()[0].type])
        self._bindings: dict[int, Any] = {}
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the fused step follows

    def __call__(self, rows: int) -> Array:
        """Start the first ``rows`` rows; returns before the GPU is done."""
        binding = self._bindings.get(rows)
        if binding is None:
            binding = self._bindings[rows] = self._session.io_binding()
            for name, array in self.inputs.items():
                shape = (rows, *array.shape[1:])
                binding.bind_input(name, "cuda", 0, array.dtype.type, shape, array.data.ptr)
            name, raw = self._session.get_outputs()[0].name, self._raw
            binding.bind_output(name, "cuda", 0, raw.dtype.type, (rows, *raw.shape[1:]), raw.data.ptr)
        self._session.run_with_iobinding(binding, self._options)
        return self._raw[:rows]


class TensorRTBackend:
    """A step engine of the bundle that can run here: it fits precision, library, GPU and batch.

    Each batch bucket has an execution context of its own, all on one piece of working memory, since they run one after
    the other. On the full TensorRT a bucket's work is replayed as a CUDA graph, captured when the backend is made;
    TensorRT for RTX, which goes on compiling kernels for the shapes it sees, is told to make the graphs itself.

    Args:
        bundle: the student.
        rows: the largest batch.
        has_graphs: whether CUDA graphs are made.
        precision: of the engine; left out, the most exact one that fits.

    Raises:
        BackendError: there is no GPU, or no engine that can run here; the message says of each why.
    """

    def __init__(self, bundle: Bundle, rows: int, has_graphs: bool = True, precision: str | None = None) -> None:
        self.device = gpu()
        name, self._trt = choose_engine(bundle, rows, capability(), precision)
        trt, entry = self._trt, bundle.manifest.engines[name]
        self._name = bundle.path / name
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(self._name.read_bytes())
        if self._engine is None:
            raise BackendError(f"{self._name}: TensorRT {trt.__version__} cannot load it")
        least, most = entry.batch[0], max(rows, entry.batch[0])
        shape = bundle.manifest.sample_shape
        self._tensors: dict[str, Array] = {}  # [most, ...] by name
        self._names: list[str] = []  # of the inputs
        for i in range(self._engine.num_io_tensors):
            tensor = self._engine.get_tensor_name(i)
            if self._engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT:
                self._names.append(tensor)
            else:
                output = tensor
            size = (most,) if tensor in ("t", "label", "guidance") else (most, *shape)
            dtype = trt.nptype(self._engine.get_tensor_dtype(tensor))
            self._tensors[tensor] = self.device.zeros(size, dtype)
        self.inputs: dict[str, Array] = {name: self._tensors[name][:rows] for name in self._names}
        self._raw = self._tensors[output]
        self._memory = self.device.zeros((max(1, self._engine.device_memory_size_v2),), np.uint8)
        self._contexts: dict[int, Any] = {}
        self._makes_graphs = has_graphs and entry.flavour == "rtx"  # TensorRT itself
        capture = partial(record, self.device.stream) if has_graphs and entry.flavour == "full" else None
        self._graphs = Buckets(least, most, self._start, capture)
        with self.device.turn:
            self._graphs.prepare(self.device.wait)

    def __call__(self, rows: int) -> Array:
        """Start the first ``rows`` rows; returns before the GPU is done."""
        self._graphs(rows)
        return self._raw[:rows]

    def _start(self, rows: int) -> None:
        if rows not in self._contexts:
            self._contexts[rows] = self._context(rows)
        if not self._contexts[rows].execute_async_v3(self.device.stream.ptr):
            raise RuntimeError("TensorRT could not start the network")

    def _context(self, rows: int) -> Any:
        alone = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._makes_graphs:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(alone)
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(alone)
        if context is None:
            raise BackendError(f"{self._name}: TensorRT has no memory for {rows} rows")
        context.set_device_memory(self._memory.data.ptr, self._memory.nbytes)
        for name in self._names:
            shape = (rows, *self._tensors[name].shape[1:])
            if not context.set_input_shape(name, shape):
                raise BackendError(f"{self._name}: TensorRT does not take {name} of shape {shape}")
        for name, array in self._tensors.items():
            context.set_tensor_address(name, array.data.ptr)
        return context


class Buckets:
    """A network at a few batch sizes, the next larger of which runs a batch, as a CUDA graph where there can be one.

    The sizes are ``least`` times powers of two, and ``most``. What stands in the rows between is run along and not
    looked at: rows of an eval-mode network know nothing of each other.

    Args:
        least: the smallest size.
        most: the largest.
        start: starts the network on so many rows.
        capture: makes of what starts something a thing that replays it; None runs without graphs.
    """

    def __init__(
        self,
        least: int,
        most: int,
        start: Callable[[int], None],
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None,
    ) -> None:
        self.sizes = [least]
        while self.sizes[-1] < most:
            self.sizes.append(min(2 * self.sizes[-1], most))
        self._start, self._capture = start, capture
        self._replays: dict[int, Callable[[], None]] = {}

    def prepare(self, wait: Callable[[], None]) -> None:
        """Run each size once, which lets libraries set themselves up, and capture it.

        Args:
            wait: waits for what was started.
        """
        for size in self.sizes:
            start = partial(self._start, size)
            self._replays[size] = start
            start()
            wait()
            if self._capture is None:
                continue
            try:
                self._replays[size] = self._capture(start)
            except Exception as error:
                log.warning("no CUDA graph for %d rows, the network is started call by call: %s", size, error)

    def __call__(self, rows: int) -> None:
        """Start the network on at least so many rows."""
        self._replays[next(size for size in self.sizes if size >= rows)]()


def record(stream: Any, start: Callable[[], None]) -> Callable[[], None]:
    """Capture what a call starts on a stream; what comes back replays it there."""
    stream.begin_capture()
    try:
        start()
    except BaseException:
        with suppress(Exception):  # the stream leaves the capture even if what it captured is void
            stream.end_capture()
        raise
    graph = stream.end_capture()
    return partial(graph.launch, stream)


def choose_engine(bundle: Bundle, rows: int, capability: str, precision: str | None = None) -> tuple[str, Any]:
    """The step engine that runs here, and the TensorRT module that runs it.

    Args:
        bundle: the student.
        rows: the largest batch.
        capability: compute capability of the GPU without the point, such as ``89``.
        precision: of the engine; left out, the most exact one that fits.

    Raises:
        BackendError: there is none; the message says of each why.
    """
    if precision is not None:
        refuse_lack(bundle, precision)
    refused = []
    exact_first = sorted(bundle.manifest.engines.items(), key=lambda item: (_EXACT.index(item[1].precision), item[0]))
    for name, entry in exact_first:
        if entry.graph != "step" or precision not in (None, entry.precision):
            continue
        module = "tensorrt_rtx" if entry.flavour == "rtx" else "tensorrt"
        try:
            trt = importlib.import_module(module)
        except ImportError:
            refused.append(f"{name}: {module} is not installed")
            continue
        reason = entry.refusal(str(trt.__version__), capability)
        if reason is None and rows > entry.batch[2]:
            reason = f"it takes {entry.batch[2]} rows at most, {rows} are asked for"
        if reason is None:
            return name, trt
        refused.append(f"{name}: {reason}")
    told = "; ".join(refused) or "it has none; fewstep export --tensorrt builds them"
    raise BackendError(f"{bundle.name} has no TensorRT engine that runs here: {told}")


def refuse_lack(bundle: Bundle, precision: str) -> None:
    """Check that a bundle has a step engine of a precision, wherever that runs.

    Raises:
        BackendError: it has none; the message says what it has.
    """
    have = {entry.precision for entry in bundle.manifest.engines.values() if entry.graph == "step"}
    if precision not in have:
        told = f"--precision chooses {' or '.join(sorted(have))}" if have else "it has none"
        how = f"fewstep export {bundle.name} -o FOLDER --tensorrt --precision {precision} builds one"
        raise BackendError(f"precision: {bundle.name} has no step engine in {precision}: {told}; {how}")


def gpu() -> Cuda:
    """The GPU.

    Raises:
        BackendError: there is none that can be used; the message says what is missing.
    """
    try:
        return Cuda()
    except CudaError as error:
        raise BackendError(str(error)) from None


def capability() -> str:
    """Compute capability of the GPU, without the point."""
    import cupy

    found: str = cupy.cuda.Device().compute_capability
    return found
