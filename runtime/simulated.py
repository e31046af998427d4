"""A simulated accelerator: a network call on n rows takes a + b * n milliseconds, whatever the machine.

    Engine(bundle, backend=simulated("40+1"))          fewstep serve --simulate 40+1

A large network on a GPU costs much for the call and little for a row more; a small one on a CPU is all rows. Which
scheduler is best depends on that curve, so schedulers are compared on it, on any machine. What is simulated is time
alone, spent asleep: requests, tables, slots, the fused step and every protocol are real. In the network's place stands
one line of exact arithmetic,

    raw = x / (1 + |t|) + label / 100

so answers depend on all their inputs, are bit-identical in any company and can be checked, and mean nothing as
pictures. Every report of such a server says that it is simulated.
"""

import ctypes
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import Backend, BackendError
from .bundle import Bundle
from .devices import Array, Cpu, Device, HostArray

_PR_SET_TIMERSLACK = 29


@dataclass(frozen=True)
class Cost:
    """What a network call costs."""

    call_ms: float  # a
    row_ms: float  # b

    @classmethod
    def parse(cls, text: str) -> "Cost":
        """From ``"A+B"``, in milliseconds.

        Raises:
            BackendError: it is not that.
        """
        call, _, row = text.partition("+")
        try:
            cost = cls(float(call), float(row or 0))
        except ValueError:
            raise BackendError(f"simulate: {text!r} is not A+B, milliseconds of a call and of each row in it") from None
        if not (0 <= cost.call_ms < math.inf and 0 <= cost.row_ms < math.inf):
            raise BackendError(f"simulate: {text!r} must be finite and not negative")
        return cost

    def seconds(self, rows: int) -> float:
        """Of one call."""
        return (self.call_ms + self.row_ms * rows) / 1000

    def __str__(self) -> str:
        return f"{self.call_ms:g} + {self.row_ms:g} n ms a network call"


def simulated(cost: str) -> Callable[[Bundle, int], Backend]:
    """What `Engine` takes as its backend, for a cost such as ``"40+1"``.

    Raises:
        BackendError: see `Cost.parse`.
    """
    parsed = Cost.parse(cost)
    return lambda bundle, rows: SimulatedBackend(bundle, rows, parsed)


class _Accelerator(Cpu):
    """The CPU, which does at once what it is asked, and has it ready only when the accelerator would.

    What is asked of it between two waits takes what its network calls take.
    """

    lags = True

    def __init__(self) -> None:
        super().__init__()
        self._ready_s = 0.0  # on time.perf_counter()

    def work(self, seconds: float) -> None:
        """Be at work so much longer."""
        self._ready_s = max(self._ready_s, time.perf_counter()) + seconds

    def fetch(self, array: Array) -> HostArray:
        """See `Device`."""
        self.wait()
        return super().fetch(array)

    def wait(self) -> None:
        """See `Device`."""
        _sleep_until(self._ready_s)


class SimulatedBackend:
    """The one-line network, each call of which takes its time.

    Args:
        bundle: whose samples and conditions it takes the shapes of.
        max_rows: the largest batch.
        cost: of a call.
    """

    def __init__(self, bundle: Bundle, max_rows: int, cost: Cost) -> None:
        manifest = bundle.manifest
        shape = (max_rows, *manifest.sample_shape)
        self.cost = cost
        self._accelerator = _Accelerator()
        self.device: Device = self._accelerator if cost.seconds(max_rows) else Cpu()
        self.inputs: dict[str, NDArray[Any]] = {"x": np.zeros(shape, np.float32), "t": np.zeros(max_rows, np.float32)}
        if manifest.labels is not None:
            self.inputs["label"] = np.zeros(max_rows, np.int64)
        if manifest.guidance.mode == "embedded":
            self.inputs["guidance"] = np.zeros(max_rows, np.float32)
        self._raw = np.zeros(shape, np.float32)

    def __call__(self, rows: int) -> NDArray[Any]:
        """Start the first ``rows`` rows."""
        self._accelerator.work(self.cost.seconds(rows))
        gain = np.float32(1) / (np.float32(1) + np.abs(self.inputs["t"][:rows]))
        raw: NDArray[Any] = np.multiply(self.inputs["x"][:rows], gain[:, None, None, None], out=self._raw[:rows])
        if "label" in self.inputs:
            raw += (self.inputs["label"][:rows].astype(np.float32) / np.float32(100))[:, None, None, None]
        return raw


_precise = threading.local()


def _sleep_until(end_s: float) -> None:
    """Sleep to a moment on ``time.perf_counter()``; wakes some 70 microseconds after it."""
    if sys.platform == "linux" and not hasattr(_precise, "asked"):
        _precise.asked = True  # Linux wakes a thread up to 50 microseconds late, to wake several at once
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)
    remaining_s = end_s - time.perf_counter()
    if remaining_s > 0:
        time.sleep(remaining_s)
