"""Networks on a CUDA GPU: ONNX Runtime's CUDA provider, and TensorRT engines of a bundle. Not run on a GPU yet.

    Engine(bundle, backend=OnnxCudaBackend)          Engine(bundle, backend=TensorRTBackend)

Inputs and outputs stay in the GPU's memory, where the fused step reads and writes them. The network runs on a
blocking stream of its own, which CUDA orders against the default stream, on which CuPy and the fused step work.
"""

import importlib
from typing import Any

import numpy as np
import onnxruntime

from ..kernels.cuda import CudaError
from .backends import DTYPES, BackendError
from .bundle import Bundle
from .devices import Array, Cuda, Device


class OnnxCudaBackend:
    """ONNX Runtime with its CUDA provider, bound once to fixed device memory for each batch size.

    Args:
        bundle: the student.
        rows: the largest batch.

    Raises:
        BackendError: there is no GPU, or the installed ONNX Runtime cannot use it.
    """

    def __init__(self, bundle: Bundle, rows: int) -> None:
        self.device, stream = _gpu()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = [("CUDAExecutionProvider", {"user_compute_stream": str(stream.ptr)})]
        self._stream = stream
        self._session = onnxruntime.InferenceSession(str(bundle.network), options, providers=providers)
        if self._session.get_providers()[0] != "CUDAExecutionProvider":  # it falls back without an error
            raise BackendError("ONNX Runtime has no working CUDA provider: pip install onnxruntime-gpu in its place")
        shape = bundle.manifest.sample_shape
        self.inputs: dict[str, Array] = {}
        for node in self._session.get_inputs():
            size = (rows, *shape) if node.name == "x" else (rows,)
            self.inputs[node.name] = self.device.zeros(size, DTYPES[node.type])
        self._raw = self.device.zeros((rows, *shape), np.float32)
        self._bindings: dict[int, Any] = {}

    def __call__(self, rows: int) -> Array:
        """Run the first ``rows`` rows; returns before the GPU is done."""
        binding = self._bindings.get(rows)
        if binding is None:
            binding = self._bindings[rows] = self._session.io_binding()
            for name, array in self.inputs.items():
                shape = (rows, *array.shape[1:])
                binding.bind_input(name, "cuda", 0, array.dtype.type, shape, array.data.ptr)
            name, raw = self._session.get_outputs()[0].name, self._raw
            binding.bind_output(name, "cuda", 0, raw.dtype.type, (rows, *raw.shape[1:]), raw.data.ptr)
        self._session.run_with_iobinding(binding)
        return self._raw[:rows]


class TensorRTBackend:
    """A step engine of the bundle that can run here: the first one, by name, that fits library, GPU and batch.

    Args:
        bundle: the student.
        rows: the largest batch.

    Raises:
        BackendError: there is no GPU, or no engine that can run here; the message says of each why.
    """

    def __init__(self, bundle: Bundle, rows: int) -> None:
        self.device, self._stream = _gpu()
        name, trt = choose_engine(bundle, rows, _capability())
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = self._runtime.deserialize_cuda_engine((bundle.path / name).read_bytes())
        if engine is None:
            raise BackendError(f"{bundle.path / name}: TensorRT {trt.__version__} cannot load it")
        self._context = engine.create_execution_context()
        self._engine = engine  # the context does not keep it
        shape = bundle.manifest.sample_shape
        self.inputs: dict[str, Array] = {}
        self._raw = self.device.zeros((rows, *shape), np.float32)
        for i in range(engine.num_io_tensors):
            tensor = engine.get_tensor_name(i)
            if engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT:
                size = (rows, *shape) if tensor == "x" else (rows,)
                self.inputs[tensor] = self.device.zeros(size, trt.nptype(engine.get_tensor_dtype(tensor)))
                self._context.set_tensor_address(tensor, self.inputs[tensor].data.ptr)
            else:
                self._context.set_tensor_address(tensor, self._raw.data.ptr)
        self._rows = 0

    def __call__(self, rows: int) -> Array:
        """Run the first ``rows`` rows; returns before the GPU is done."""
        if rows != self._rows:
            for name, array in self.inputs.items():
                self._context.set_input_shape(name, (rows, *array.shape[1:]))
            self._rows = rows
        if not self._context.execute_async_v3(self._stream.ptr):
            raise RuntimeError("TensorRT could not start the network")
        return self._raw[:rows]


def choose_engine(bundle: Bundle, rows: int, capability: str) -> tuple[str, Any]:
    """The step engine that runs here, and the TensorRT module that runs it.

    Args:
        bundle: the student.
        rows: the largest batch.
        capability: compute capability of the GPU without the point, such as ``89``.

    Raises:
        BackendError: there is none; the message says of each why.
    """
    refused = []
    for name, entry in sorted(bundle.manifest.engines.items()):
        if entry.graph != "step":
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


def _gpu() -> tuple[Device, Any]:
    try:
        device = Cuda()
    except CudaError as error:
        raise BackendError(str(error)) from None
    import cupy

    return device, cupy.cuda.Stream()


def _capability() -> str:
    import cupy

    capability: str = cupy.cuda.Device().compute_capability
    return capability
