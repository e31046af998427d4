"""Where the state of running rows lives, and what moves it: the CPU, or a CUDA GPU through CuPy.

The engine keeps its books (which row stands where) in numpy, and asks its device for everything as large as a
batch of samples: room, the network's small inputs put in place, the fused step, and finished samples back. So
between the steps nothing but a few numbers a row crosses to a GPU, and only finished samples come back.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..kernels import fused_step
from ..kernels.cuda import CudaStep, Network
from ..kernels.fused_step import Scratch

Array = Any  # numpy's or CuPy's
HostArray = NDArray[Any]


class Device(Protocol):
    """What the engine needs of a device; arrays it made are indexed and assigned among each other as numpy's are."""

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Room on the device."""
        ...

    def put(self, target: Array, values: HostArray) -> None:
        """Copy from the host."""
        ...

    def fetch(self, array: Array) -> HostArray:
        """A copy on the host; waits for what is under way."""
        ...

    def step(
        self, table: HostArray, row: HostArray, x: Array, history: Array, raw: Array, uncond: HostArray,
        guidance: HostArray, seed: HostArray, network_input: Array,
    ) -> None:  # fmt: skip
        """`kernels.fused_step`, with the books on the host and the state on the device."""
        ...


class Cpu:
    """Host memory; the compiled step, or numpy's."""

    def __init__(self) -> None:
        self._scratch: Scratch | None = None

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """See `Device`."""
        return np.zeros(shape, dtype)

    def put(self, target: Array, values: HostArray) -> None:
        """See `Device`."""
        target[...] = values

    def fetch(self, array: Array) -> HostArray:
        """See `Device`."""
        return np.array(array)

    def step(
        self, table: HostArray, row: HostArray, x: Array, history: Array, raw: Array, uncond: HostArray,
        guidance: HostArray, seed: HostArray, network_input: Array,
    ) -> None:  # fmt: skip
        """See `Device`."""
        rows, elements = x.shape
        if self._scratch is None or len(self._scratch.y) < rows or self._scratch.y.shape[1] != elements:
            self._scratch = Scratch(rows, elements)
        fused_step(table, row, x, history, raw, uncond, guidance, seed, network_input, self._scratch)


class Cuda:
    """A GPU's memory, through CuPy, on CuPy's current stream. Not run on a GPU yet.

    Args:
        network: the network's dtype.

    Raises:
        CudaError: see `CudaStep`.
    """

    def __init__(self, network: Network = "float32") -> None:
        self._step = CudaStep(network)
        import cupy

        self._cupy = cupy
        self._table: tuple[HostArray, Array] | None = None  # the packed table, and its copy on the device

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """See `Device`."""
        return self._cupy.zeros(shape, dtype)

    def put(self, target: Array, values: HostArray) -> None:
        """See `Device`."""
        target.set(np.ascontiguousarray(values, target.dtype))

    def fetch(self, array: Array) -> HostArray:
        """See `Device`."""
        host: HostArray = self._cupy.asnumpy(array)
        return host

    def step(
        self, table: HostArray, row: HostArray, x: Array, history: Array, raw: Array, uncond: HostArray,
        guidance: HostArray, seed: HostArray, network_input: Array,
    ) -> None:  # fmt: skip
        """See `Device`."""
        if self._table is None or self._table[0] is not table:  # a table is replaced as a whole, never changed
            flat = np.frombuffer(table.tobytes(), np.uint8).reshape(len(table), table.itemsize)
            self._table = table, self._cupy.asarray(flat)
        row, uncond, guidance, seed = (
            self._cupy.asarray(np.ascontiguousarray(array)) for array in (row, uncond, guidance, seed)
        )
        self._step(self._table[1], row, x, history, raw, uncond, guidance, seed, network_input)
