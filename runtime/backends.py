"""Backends: the network as a callable over batch arrays that stay where they are.

A backend owns its input arrays, ``[max_rows, ...]`` each, and is called with a number of rows:

    backend.inputs["x"][:n] = ...
    raw = backend(n)                # [n, channels, height, width]; valid until the next call

So one call moves no data, and the caller writes the next input in place. `OnnxBackend` is the CPU's;
others keep to the same two names.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .devices import Cpu, Device

Array = NDArray[Any]

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


_INPUTS = ("x", "t", "label", "guidance")


class Backend(Protocol):
    """What the engine needs of a network."""

    inputs: dict[str, Array]  # [max_rows, ...] by input name, on the device

    @property
    def device(self) -> Device:
        """Where the arrays are."""
        ...

    def __call__(self, rows: int) -> Array:
        """Run the network on the first ``rows`` rows of the inputs."""
        ...


class BackendError(RuntimeError):
    """A network that the backend cannot take. One line that names the file and what is wrong."""


def _takes(declared: list[int | str | None], shape: tuple[int, ...]) -> bool:
    """Whether a declared shape lets any number of rows of this shape pass."""
    if len(declared) != len(shape) or isinstance(declared[0], int):
        return False
    return all(size in (actual, None) or isinstance(size, str) for size, actual in zip(declared, shape, strict=True))


class OnnxBackend:
    """ONNX Runtime on the CPU, bound once to fixed memory for each batch size.

    A batch is divided among the threads, each of which runs its rows through one session that has no threads of its
    own. That beats a session that divides every operator among its threads, where all wait for the slowest at the end
    of each operator (``docs/results/cpu_threads.json``). Only a batch with fewer rows than threads goes to a session
    of that other kind. Which of the two it is changes no bit.

    Args:
        path: the step graph.
        max_rows: the largest batch.
        sample_shape: channels, height, width.
        threads: threads of one call. They sleep between calls (`allow_spinning=0`): a spinning pool takes
            twice the CPU time at small batches.

    Raises:
        BackendError: the file is no model that ONNX Runtime takes, or its inputs are not a step graph's.
    """

    def __init__(self, path: Path, max_rows: int, sample_shape: tuple[int, ...], threads: int = 1) -> None:
        self._threads = threads
        self._by_rows = _session(path, 1)
        self._by_operator = self._by_rows if threads == 1 else _session(path, threads)
        self._others = ThreadPoolExecutor(threads - 1, "fewstep-network") if threads > 1 else None
        self.device: Device = Cpu()
        self.inputs: dict[str, Array] = {}
        for node in self._by_rows.get_inputs():
            shape = (max_rows, *sample_shape) if node.name == "x" else (max_rows,)
            if node.name not in _INPUTS or node.type not in DTYPES or not _takes(node.shape, shape):
                raise BackendError(f"{path}: input {node.name} is {node.type}{node.shape}, not what a step graph has")
            self.inputs[node.name] = np.zeros(shape, DTYPES[node.type])
        output = self._by_rows.get_outputs()[0]
        if not {"x", "t"} <= set(self.inputs):
            raise BackendError(f"{path}: a step graph has the inputs x and t, this one has {', '.join(self.inputs)}")
        if output.type not in DTYPES or not _takes(output.shape, (max_rows, *sample_shape)):
            said = f"output {output.name} is {output.type}{output.shape}"
            raise BackendError(f"{path}: {said}, not what a step graph has")
        self._raw = np.zeros((max_rows, *sample_shape), DTYPES[output.type])
        self._output = output.name
        self._bound: dict[int, tuple[list[Callable[[], None]], Array]] = {}

    def __call__(self, rows: int) -> Array:
        """Run the first ``rows`` rows."""
        if rows not in self._bound:
            self._bound[rows] = self._bind(rows), self._raw[:rows]
        parts, raw = self._bound[rows]
        if self._others is None or len(parts) == 1:
            parts[0]()
        else:
            others = [self._others.submit(part) for part in parts[1:]]
            try:
                parts[0]()
            finally:
                wait(others)  # even after an error: they write into the arrays of the next call
            for other in others:
                other.result()
        return raw

    def _bind(self, rows: int) -> list[Callable[[], None]]:
        """What to run for so many rows, each in a thread of its own."""
        if rows < self._threads:
            return [self._part(self._by_operator, 0, rows)]
        bounds = [rows * i // self._threads for i in range(self._threads + 1)]
        return [self._part(self._by_rows, start, stop) for start, stop in pairwise(bounds)]

    def _part(self, session: onnxruntime.InferenceSession, start: int, stop: int) -> Callable[[], None]:
        binding = session.io_binding()
        for name, whole in self.inputs.items():
            array = whole[start:stop]
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        raw = self._raw[start:stop]
        binding.bind_output(self._output, "cpu", 0, raw.dtype.type, raw.shape, raw.ctypes.data)
        return partial(session.run_with_iobinding, binding)


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions share no base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackendError(f"{path}: ONNX Runtime cannot load it: {reason}") from None
