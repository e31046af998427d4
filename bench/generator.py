"""The load: an asynchronous client in a process of its own, which measures itself too.

Each request is a record of four times: when it was meant to be sent, when it was, when it was answered, and how that
ended. Nothing is summarised here. In the open loop a thread of its own wakes the event loop at each arrival, since
event loops count in milliseconds.
"""

import asyncio
import contextlib
import errno
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BenchError
from .observer import Counts
from .targets import About, Address, InProcessTarget, Target, target_of
from .workload import Workload

MAX_IN_FLIGHT = 4096  # of the open loop; what comes above is an error, "not sent"
PATIENCE_S = 5.0  # with what is under way when the load is told to end
NOT_WAITED = "not waited for"
NOT_SENT = "not sent: too many in flight"
SLICES = 20  # of the time on the clock; what comparisons resample
# Refusals of the moment, not of the request: by status over HTTP, by code over gRPC, by class in this process.
_FOR_NOW = {"429", "503", "504", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "QueueFull", "DeadlineInfeasible",
            "DeadlineExpired"}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """All that the process needs to know."""

    address: Address
    workload: Workload
    timeout_s: float


@dataclass(frozen=True)
class Records:
    """What happened, a row for each request; times in seconds from the start of the load."""

    kind: NDArray[np.int64]
    meant: NDArray[np.float64]  # when it was to be sent
    sent: NDArray[np.float64]
    done: NDArray[np.float64]
    error: NDArray[np.int64]  # an index of `errors`; -1: answered
    errors: tuple[str, ...]
    cpu_share: float  # of one core, of this process, on the clock
    counts: Counts | None  # in-process: of the engine, on the clock
    slices: int = SLICES  # that went by; fewer when the load was told to end


def generate(plan: Plan, parent: Connection) -> None:
    """The process: tells ``parent`` the target, then how it goes, then the records. Ends with it.

    A word from ``parent`` ends the load early: nothing more is sent, and what is under way is waited for.
    """
    _allow_many_files()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            parent.send(("done", runner.run(_Load(plan, parent).run())))
    except (KeyboardInterrupt, BrokenPipeError):
        return
    except Exception as error:
        is_ours = isinstance(error, BenchError) or type(error).__module__.startswith("fewstep.")
        message = str(error) if is_ours else f"the load generator failed: {type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            parent.send(("failed", message))


def _allow_many_files() -> None:
    """A connection is a file, and the usual limit of 1,024 is below what an open loop may have under way."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:  # Windows
        return None
    return uvloop.new_event_loop


# What a client may hear at once, however often it asks.
_GONE = {"connection refused", "disconnected", "UNAVAILABLE"}


def _named(failure: OSError) -> str:
    """What a failed connection is called in a report; without addresses, so that like ones are counted together."""
    if isinstance(failure, ConnectionRefusedError):
        return "connection refused"
    if failure.errno in (errno.EMFILE, errno.ENFILE):
        return "not sent: too many open files"
    return "disconnected"


class _Load:
    def __init__(self, plan: Plan, parent: Connection) -> None:
        self._plan = plan
        self._parent = parent
        self._records: list[tuple[int, float, float, float, int]] = []
        self._error_of: dict[str, int] = {}
        self._in_flight = 0
        self._target: Target = target_of(plan.address)
        self._all_sent = asyncio.Event()
        self._is_ending = False
        self._start_s = 0.0
        self._end_s = plan.workload.warmup_s + plan.workload.seconds

    async def run(self) -> Records:
        await self._target.open()
        try:
            await self._try_each_kind()
            self._parent.send(("about", self._target.about))
            self._start_s = time.perf_counter()
            cpu_share, counts, slices = await self._load_by_the_clock()
        finally:
            await self._target.close()
        columns = zip(*self._records, strict=True) if self._records else ([], [], [], [], [])
        kind, meant, sent, done, error = (np.array(column) for column in columns)
        kind, error, errors = kind.astype(np.int64), error.astype(np.int64), tuple(self._error_of)
        return Records(kind, meant, sent, done, error, errors, cpu_share, counts, slices)

    async def _try_each_kind(self) -> None:
        """One request of each kind before the clock: a mix that cannot be served measures nothing."""
        workload = self._plan.workload
        first_of = {one.kind: number for number, one in reversed(list(enumerate(workload.trace)))}
        for i, kind in enumerate(workload.kinds):
            number = first_of.get(i, i)
            try:
                async with asyncio.timeout(self._plan.timeout_s):
                    error = await self._target.send(workload.request(i, number), number)
            except TimeoutError:
                error = f"no answer in {self._plan.timeout_s:g} s"
            except OSError as failure:
                error = failure.strerror or str(failure)
            if error is not None and error not in _FOR_NOW:
                told = f"{error}: {self._target.detail}" if self._target.detail else error
                raise BenchError(f"a request of kind {kind.name!r} fails: {told}")

    async def _load_by_the_clock(self) -> tuple[float, Counts | None, int]:
        """The load, until it is over or the parent says that it is."""
        clock = asyncio.ensure_future(self._clock())
        load = asyncio.ensure_future(self._open_loop() if self._plan.workload.loop == "open" else self._closed_loop())
        while not (clock.done() and load.done()):
            await asyncio.wait((clock, load), timeout=0.1, return_when=asyncio.FIRST_EXCEPTION)
            for task in (clock, load):
                if task.done() and not task.cancelled():
                    task.result()
            if self._parent.poll():
                self._parent.recv()
                self._is_ending, self._end_s = True, self._now()
                self._all_sent.set()
            if self._is_ending and self._now() > self._end_s + PATIENCE_S:
                load.cancel()
        return clock.result()

    # --- the two loops

    async def _closed_loop(self) -> None:
        drawn = self._plan.workload.draw().tolist()
        number = 0

        async def client() -> None:
            nonlocal number
            meant_s = self._now()
            while meant_s < self._end_s:
                mine, number = number, number + 1
                await self._one(drawn[mine % len(drawn)], mine, meant_s)
                meant_s = self._now()

        await asyncio.gather(*(client() for _ in range(self._plan.workload.clients)))

    async def _open_loop(self) -> None:
        loop = asyncio.get_running_loop()
        times, kinds = (array.tolist() for array in self._plan.workload.schedule())
        tasks: set[asyncio.Task[None]] = set()

        def launch(number: int) -> None:
            if times[number] >= self._end_s:  # told to end meanwhile
                return
            if self._in_flight >= MAX_IN_FLIGHT:
                self._record(kinds[number], times[number], self._now(), self._now(), NOT_SENT)
                return
            task = loop.create_task(self._one(kinds[number], number, times[number]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        def pace() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                for number, at_s in enumerate(times):
                    wait_s = at_s - self._now()
                    if wait_s > 0:
                        time.sleep(wait_s)
                    loop.call_soon_threadsafe(launch, number)
                loop.call_soon_threadsafe(self._all_sent.set)

        threading.Thread(target=pace, daemon=True).start()
        await self._all_sent.wait()
        if tasks:
            await asyncio.gather(*tasks)

    async def _one(self, kind: int, number: int, meant_s: float) -> None:
        sent_s = self._now()
        self._in_flight += 1
        try:
            async with asyncio.timeout(self._plan.timeout_s):
                error = await self._target.send(self._plan.workload.request(kind, number), number)
        except TimeoutError:
            error = "timeout"
        except OSError as failure:
            error = _named(failure)
        except asyncio.CancelledError:
            self._record(kind, meant_s, sent_s, self._now(), NOT_WAITED)
            raise
        finally:
            self._in_flight -= 1
        if error in _GONE and self._plan.workload.loop == "closed":
            await asyncio.sleep(0.01)  # else a client that nobody answers asks for all it is worth
        self._record(kind, meant_s, sent_s, self._now(), error)

    def _record(self, kind: int, meant_s: float, sent_s: float, done_s: float, error: str | None) -> None:
        code = -1 if error is None else self._error_of.setdefault(error, len(self._error_of))
        self._records.append((kind, meant_s, sent_s, done_s, code))

    def _now(self) -> float:
        return time.perf_counter() - self._start_s

    # --- telling

    async def _clock(self) -> tuple[float, Counts | None, int]:
        """Tell the parent of each slice's edge, which then looks at the server; and measure this process."""
        workload = self._plan.workload
        edges = workload.warmup_s + np.linspace(0, workload.seconds, SLICES + 1)
        told, past = 0, 0
        cpu_s, start_s = 0.0, 0.0
        counts: Counts | None = None
        for number, edge_s in enumerate(edges.tolist()):
            while (wait_s := edge_s - self._now()) > 0 and not self._is_ending:
                await asyncio.sleep(min(wait_s, 0.25))
                self._tell_progress(told)
                told = len(self._records)
            if wait_s > 0:
                break
            self._parent.send(("edge", number))
            past = number
            if number == 0:
                cpu_s, start_s, counts = time.process_time(), self._now(), self._counts()
        cpu_s, took_s = time.process_time() - cpu_s, max(self._now() - start_s, 1e-9)
        after = self._counts()
        return cpu_s / took_s, after.since(counts) if after and counts else None, past

    def _counts(self) -> Counts | None:
        return self._target.counts if isinstance(self._target, InProcessTarget) else None

    def _tell_progress(self, told: int) -> None:
        fresh = [done - meant for _, meant, _, done, error in self._records[told:] if error < 0]
        middle_ms = 1000 * float(np.median(fresh)) if fresh else None
        errors = sum(1 for record in self._records[told:] if record[4] >= 0)
        self._parent.send(("progress", (self._now(), len(self._records), errors, self._in_flight, middle_ms)))


__all__ = ["SLICES", "About", "Plan", "Records", "generate"]
