"""A student's own torch module as the engine's backend: in torch on the CPU, as CUDA graphs on a GPU.

    Engine(bundle, backend=torch_backend(network, "cuda"))

A bundle holds its network as ONNX, and nothing in it is unpickled, so the module comes from whoever has it: the caller
who exported it, or a checkpoint. That it is the bundle's network is not believed but tried: on random inputs it must
say what the bundle's graph says. For those who train and compare: serving needs no torch.

The GPU part was not run on a GPU yet.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from ..runtime import Bundle
from ..runtime.backends import BackendError, OnnxBackend
from ..runtime.devices import Array, Cpu, Cuda, Device
from ..runtime.gpu_backends import Buckets, gpu

_TOLERANCE = 0.02  # root mean square over that of the output: half-precision weights, TF32; other weights are near 1


def torch_backend(
    network: torch.nn.Module, device: Literal["cpu", "cuda"] = "cuda", has_graphs: bool = True
) -> Callable[[Bundle, int], "TorchBackend"]:
    """What `Engine` takes as its backend.

    Args:
        network: as it was exported; see `step_graph.export_step_graph`. It is moved to the device.
        device: where it runs.
        has_graphs: whether CUDA graphs are made.
    """
    return lambda bundle, rows: TorchBackend(network, bundle, rows, device, has_graphs)


class TorchBackend:
    """A torch module over the engine's arrays, which it shares.

    Args:
        network: see `torch_backend`, as are device and has_graphs.
        bundle: the student.
        rows: the largest batch.
        device: see there.
        has_graphs: see there.

    Raises:
        BackendError: there is no GPU that torch and CuPy can use, or the module is not the bundle's network.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        bundle: Bundle,
        rows: int,
        device: Literal["cpu", "cuda"] = "cuda",
        has_graphs: bool = True,
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError("torch has no CUDA device here")
        self.device: Device = gpu() if device == "cuda" else Cpu()
        self._network = network.to(device).eval()
        manifest = bundle.manifest
        named: dict[str, Any] = {"x": np.float32, "t": np.float32}
        if manifest.labels is not None:
            named["label"] = np.int64
        if manifest.guidance.mode == "embedded":
            named["guidance"] = np.float32
        shape = (rows, *manifest.sample_shape)
        self.inputs: dict[str, Array] = {
            name: self.device.zeros(shape if name == "x" else (rows,), dtype) for name, dtype in named.items()
        }
        self._raw = self.device.zeros(shape, np.float32)
        self._stream: AbstractContextManager[Any] = nullcontext()
        self._sizes: Buckets | None = None
        with self.device.turn:
            self._tensors = [from_dlpack(self.inputs[name]) for name in named]
            self._said = from_dlpack(self._raw)
        if isinstance(self.device, Cuda):
            self._external = torch.cuda.ExternalStream(self.device.stream.ptr)  # type: ignore[no-untyped-call]
            self._stream = torch.cuda.stream(self._external)
            self._memory = torch.cuda.graph_pool_handle()
            self._sizes = Buckets(1, rows, self._start, self._capture if has_graphs else None)
            with self.device.turn, self._stream:
                self._sizes.prepare(self.device.wait)
        self._refuse_other_network(bundle, min(rows, 4))

    def __call__(self, rows: int) -> Array:
        """Start the first ``rows`` rows; on a GPU it returns before they are done."""
        with self._stream:
            (self._sizes or self._start)(rows)
        return self._raw[:rows]

    def _start(self, rows: int) -> None:
        with torch.inference_mode():
            self._said[:rows].copy_(self._network(*(tensor[:rows] for tensor in self._tensors)))

    def _capture(self, start: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # One memory for all: they run one after the other, and what one says is copied out before the next.
        with torch.cuda.graph(graph, self._memory, self._external, capture_error_mode="thread_local"):
            start()
        return graph.replay

    def _refuse_other_network(self, bundle: Bundle, rows: int) -> None:
        rng = np.random.default_rng(0)
        stated = OnnxBackend(bundle.network, rows, bundle.manifest.sample_shape)
        labels, guidance = bundle.manifest.labels, bundle.manifest.guidance
        with self.device.turn:
            for name, array in stated.inputs.items():
                if name == "label" and labels is not None:
                    array[...] = np.arange(rows) % len(labels.names)
                elif name == "guidance":
                    array[...] = rng.uniform(guidance.minimum, guidance.maximum, rows)
                else:
                    array[...] = rng.standard_normal(array.shape) if name == "x" else np.linspace(0.1, 0.9, rows)
                self.device.put(self.inputs[name][:rows], array)
            ours, theirs = self.device.fetch(self(rows)), stated(rows)
        difference = float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))
        if not difference <= _TOLERANCE:  # NaN is no small difference
            raise BackendError(f"the module is not the network of {bundle.name}: it differs by {difference:.2g}")
