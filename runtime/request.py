"""A request: one sample to make, and what comes back.

Both are frozen. Where a request is, and whether it still wants its sample, is its `concurrent.futures.Future`:
waiting and running requests are pending, cancelling the future is cancelling the request.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .hooks import Hook
from .tableau import Tableau


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to make."""

    seed: int  # 0 to 2**64 - 1; with the rest of the request it decides every bit of the sample
    tableau: Tableau
    label: int | None = None  # None: unconditional, where the student knows that
    guidance: float | None = None  # None: the student's default
    priority: int = 0  # a higher one is started first
    deadline_s: float | None = None  # on time.monotonic(); not started after it, given up when running
    fallbacks: tuple[Tableau, ...] = ()  # what admission may take instead to meet the deadline, the best first
    caller: str = ""  # who asks; callers of one priority share alike
    weight: float = 1.0  # the caller's share
    hooks: tuple[Hook, ...] = ()  # changes of what the network says, in this order; see `hooks`


@dataclass(frozen=True, slots=True)
class Preview:
    """What a running sample is going to be, as far as its network knows: the prediction of the data after one call."""

    pixels: NDArray[np.float32]  # [channels, height, width], data nominally in -1 to 1
    step: int  # network calls so far, 1 to num_steps - 1
    num_steps: int

    def to_uint8(self) -> NDArray[np.uint8]:
        """``[height, width, channels]``; see `to_uint8`."""
        return to_uint8(self.pixels)


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished sample."""

    pixels: NDArray[np.float32]  # [channels, height, width], data nominally in -1 to 1
    request: Request  # with the table that was taken
    queue_s: float  # from submission to the first network call
    run_s: float  # from the first network call to the last update
    ended_s: float = 0.0  # on time.monotonic()
    picture: NDArray[np.uint8] | None = None  # what `to_uint8` gives, where it is there already; goes with pixels

    @property
    def num_steps(self) -> int:
        """Network calls that made it."""
        return self.request.tableau.num_steps

    def to_uint8(self) -> NDArray[np.uint8]:
        """``[height, width, channels]``; see `to_uint8`."""
        return to_uint8(self.pixels) if self.picture is None else self.picture


# float32 already, since to convert a number takes longer than to scale a small image by it
_SCALE, _SHIFT, _BLACK, _WHITE = np.float32(127.5), np.float32(128), np.float32(-1), np.float32(1)


def to_uint8(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """``[..., channels, height, width]`` in -1 to 1 as ``[..., height, width, channels]`` in 0 to 255, rounded.

    What is not a number, as a preview may be of a sample that fails, is black.
    """
    scaled = np.fmax(pixels, _BLACK)
    np.fmin(scaled, _WHITE, out=scaled)
    scaled *= _SCALE
    scaled += _SHIFT
    return np.ascontiguousarray(scaled.astype(np.uint8).swapaxes(-3, -1).swapaxes(-3, -2))


class RequestError(Exception):
    """A request that ended without a sample."""


class QueueFull(RequestError):
    """Not accepted: the waiting line is at its bound. Nothing of the request was kept."""

    def __init__(self, waiting: int, limit: int, retry_after_s: float) -> None:
        super().__init__(f"the queue is full: {waiting} of {limit} samples wait; try again in {retry_after_s:.3g} s")
        self.retry_after_s = retry_after_s


class DeadlineInfeasible(RequestError):
    """Not accepted: by the measured pace it would be finished too late, or it is so already."""

    def __init__(self, left_s: float, needed_s: float, idle_s: float, num_steps: int, ahead: int) -> None:
        self.retry_after_s = max(0.001, needed_s - left_s) if idle_s <= left_s else None  # None: it will never fit
        line = f" behind {ahead} others" if ahead else ""
        advice = "allow more time or fewer steps"
        if self.retry_after_s is None:
            line, needed_s = "", idle_s
            advice += ", since no wait will help"
        else:
            advice += f", or try again in {self.retry_after_s:.3g} s"
        super().__init__(
            f"{max(0.0, 1000 * left_s):.3g} ms are not enough: {num_steps} steps{line} would take "
            f"{1000 * needed_s:.3g} ms; {advice}"
        )


class DeadlineExpired(RequestError):
    """Given up: its deadline passed before it was finished."""


class EngineStopped(RequestError):
    """Not accepted: the engine is shutting down."""


class SampleFailed(RequestError):
    """The network or the update gave no usable sample."""


class StepFailed(SampleFailed):
    """A library raised within the step. What it says is for the server's log, and not for clients."""


class SampleFuture(Future[Sample]):
    """A request's future. To ask it whether it was cancelled takes no lock: it is asked before every step."""

    is_cancelled = False

    def cancel(self) -> bool:
        """See `concurrent.futures.Future.cancel`."""
        self.is_cancelled = True  # first, for the callbacks; once it has its sample nobody asks
        self.is_cancelled = super().cancel()
        return self.is_cancelled


class Paused(NamedTuple):
    """What a request that made room for another takes along, on the device of its slot."""

    x: Any  # [elements]
    network_input: Any  # [elements]
    history: Any  # [places, elements]
    left: int  # table rows to go


@dataclass(slots=True)
class Ticket:
    """A request on its way; owned by the engine."""

    request: Request
    future: SampleFuture
    submitted_s: float
    on_preview: Callable[[Preview], None] | None = None
    started_s: float = 0.0  # 0 until it has
    paused: Paused | None = None  # set while it waits to go on

    @property
    def num_steps_left(self) -> int:
        """Table rows to go, while it waits."""
        return self.paused.left if self.paused else self.request.tableau.num_steps

    def rank(self, now_s: float, ageing_s: float) -> float:
        """Its priority, and a level more for each ``ageing_s`` since it came."""
        return self.request.priority + (now_s - self.submitted_s) / ageing_s

    def is_over(self, now_s: float) -> bool:
        """Whether nobody wants the sample any more: cancelled, or past its deadline."""
        deadline_s = self.request.deadline_s
        return self.future.is_cancelled or (deadline_s is not None and now_s > deadline_s)
