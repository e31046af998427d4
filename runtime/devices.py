"""Where the state of running rows lives, and what moves it: the CPU, or a CUDA GPU through CuPy.

The engine keeps its books (which row stands where) in numpy, and asks its device for everything as large as a
batch of samples: room, the network's small inputs put in place, the fused step, and finished samples back. So
between the steps nothing but a few numbers a row crosses to a GPU, and only finished samples come back.

A GPU does what it is asked later, in the order in which it was asked: all of a student's work is on one stream, which
is current during the engine's turn, and a turn ends when the stream is empty. So the time of a turn is the time it
took, an error of the GPU ends the requests that it concerns, and what was sent up may be overwritten in the next turn.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..kernels import BoundStep
from ..kernels.cuda import STORED, CudaStep

Array = Any  # numpy's or CuPy's
HostArray = NDArray[Any]
Step = Callable[[int, int, Array], None]  # moves the rows from one to before another, given the network's output,
# each by the table row it stands on, and on to the next

_PINNED = 1 << 20  # bytes of pinned memory for what goes up in a turn


class Device(Protocol):
    """What the engine needs of a device; arrays it made are indexed and assigned among each other as numpy's are."""

    turn: AbstractContextManager[Any]  # entered around all that is done with the device
    lags: bool  # whether it is still at work when a call returns, so that the host has time until `wait` does

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Room on the device."""
        ...

    def put(self, target: Array, values: HostArray) -> None:
        """Copy from the host."""
        ...

    def fetch(self, array: Array) -> HostArray:
        """A copy on the host; waits for what is under way."""
        ...

    def wait(self) -> None:
        """Wait for what is under way."""
        ...

    def bind(
        self, table: HostArray, row: HostArray, x: Array, history: Array, uncond: HostArray, guidance: HostArray,
        seed: HostArray, network_input: Array,
    ) -> Step:  # fmt: skip
        """`kernels.BoundStep`, with the books on the host and the state on the device."""
        ...


class Cpu:
    """Host memory; the compiled step, or numpy's. It does at once what it is asked."""

    lags = False

    def __init__(self) -> None:
        self.turn: AbstractContextManager[Any] = nullcontext()

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """See `Device`."""
        return np.zeros(shape, dtype)

    def put(self, target: Array, values: HostArray) -> None:
        """See `Device`."""
        target[...] = values

    def fetch(self, array: Array) -> HostArray:
        """See `Device`."""
        return np.array(array)

    def wait(self) -> None:
        """See `Device`."""

    def bind(
        self, table: HostArray, row: HostArray, x: Array, history: Array, uncond: HostArray, guidance: HostArray,
        seed: HostArray, network_input: Array,
    ) -> Step:  # fmt: skip
        """See `Device`."""
        return BoundStep(table, row, x, history, uncond, guidance, seed, network_input)


class Cuda:
    """A GPU's memory and one stream, through CuPy. Not run on a GPU yet.

    What goes up is copied into pinned memory, which the GPU reads by itself, and is good until `wait`; what has no room
    there goes from ordinary memory, which CUDA copies before it returns. The step is compiled for the dtype of the
    network's input, when it is first asked for; for float32 at once, which also tells whether it can be.

    Raises:
        CudaError: see `CudaStep`.
    """

    lags = True

    def __init__(self) -> None:
        self._steps = {STORED["float32"]: CudaStep()}
        import cupy
        import cupyx

        self._cupy = cupy
        # Not ordered after the default stream, so that what others do there is nothing to a capture.
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.turn: AbstractContextManager[Any] = self.stream
        self._pinned: HostArray = cupyx.empty_pinned(_PINNED, np.uint8)
        self._used = 0
        self._books = self.zeros((0,), np.uint8)  # seed, row, uncond and guidance of the rows, one after the other

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """See `Device`."""
        with self.stream:
            return self._cupy.zeros(shape, dtype)

    def put(self, target: Array, values: HostArray) -> None:
        """See `Device`."""
        staged = self._stage(values.size * target.dtype.itemsize).view(target.dtype).reshape(values.shape)
        staged[...] = values
        target.set(staged, self.stream)

    def fetch(self, array: Array) -> HostArray:
        """See `Device`."""
        host: HostArray = self._cupy.asnumpy(array, self.stream)
        return host

    def wait(self) -> None:
        """See `Device`."""
        self.stream.synchronize()
        self._used = 0

    def bind(
        self, table: HostArray, row: HostArray, x: Array, history: Array, uncond: HostArray, guidance: HostArray,
        seed: HostArray, network_input: Array,
    ) -> Step:  # fmt: skip
        """See `Device`."""
        kernel = self._step_for(network_input.dtype)
        flat = np.frombuffer(table.tobytes(), np.uint8).reshape(len(table), table.itemsize)
        on_device = self.zeros(flat.shape, np.uint8)
        on_device.set(flat, self.stream)

        def step(first: int, last: int, raw: Array) -> None:
            books = [array[first:last] for array in (seed, row, uncond, guidance)]  # in one copy
            ends = np.cumsum([array.nbytes for array in books]).tolist()
            staged = self._stage(ends[-1])
            if self._books.size < staged.size:
                self._books = self.zeros((staged.size,), np.uint8)
            starts = [0, *ends[:-1]]
            for array, start, end in zip(books, starts, ends, strict=True):
                staged[start:end].view(array.dtype)[...] = array
            self._books[: staged.size].set(staged, self.stream)
            seed_, row_, uncond_, guidance_ = (
                self._books[start:end].view(array.dtype) for array, start, end in zip(books, starts, ends, strict=True)
            )
            part = slice(first, last)
            kernel(on_device, row_, x[part], history[part], raw, uncond_, guidance_, seed_, network_input[part])
            row[part] += 1

        return step

    def _step_for(self, dtype: np.dtype[Any]) -> CudaStep:
        if dtype not in self._steps:
            network = next((network for network, stored in STORED.items() if stored == dtype), None)
            if network is None:
                raise ValueError(f"the network takes {dtype}: the CUDA step writes {', '.join(STORED)}")
            self._steps[dtype] = CudaStep(network)
        return self._steps[dtype]

    def _stage(self, size: int) -> HostArray:
        """Room on the host for so many bytes on their way up."""
        start, self._used = self._used, self._used + -(-size // 16) * 16
        if self._used <= _PINNED:
            return self._pinned[start : start + size]
        self._used = start
        return np.empty(size, np.uint8)
