"""The engine: step-level continuous batching, in which every row stands on its own table row.

A tick is ``step()``: let go of what nobody wants, admit what waits, one network call over all running rows,
one fused step over all of them, hand out what is finished. Requests of any solver, step count, guidance and
seed share the batch and join or leave at every tick, because nothing of that is a property of the batch.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from ..kernels import fused_step, pack_rows
from ..kernels.fused_step import Array, Scratch
from .backends import Backend, OnnxBackend
from .bundle import Bundle, BundleError
from .request import DeadlineExpired, EngineStopped, QueueFull, Request, Sample, SampleFailed, Ticket
from .scheduler import Scheduler
from .slots import Slots
from .tableau import Tableau

log = logging.getLogger("fewstep")


@dataclass(slots=True)
class Counters:
    """What an engine has done since it was made."""

    ticks: int = 0  # network executions
    row_steps: int = 0  # rows moved by one table row; row_steps / ticks is the mean batch
    finished: int = 0
    cancelled: int = 0
    expired: int = 0
    failed: int = 0
    rejected: int = 0
    busy_s: float = 0.0  # time spent in ticks


class Engine:
    """Runs one student. `submit` may be called from any thread, `step` from one at a time.

    Args:
        bundle: the student.
        max_rows: rows that run together; a row is one sample, and guidance without distillation takes two.
        max_waiting: samples that may wait; further ones are refused with `QueueFull`.
        threads: CPU threads of one network call; the machine's cores when left out.
        backend: makes the network from (bundle, rows); ONNX Runtime when left out.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_rows: int = 64,
        max_waiting: int = 1024,
        threads: int | None = None,
        backend: Callable[[Bundle, int], Backend] | None = None,
    ) -> None:
        if max_rows < 1 or max_waiting < 1:
            raise ValueError(f"max_rows {max_rows} and max_waiting {max_waiting} must be at least 1")
        self.bundle = bundle
        self.max_waiting = max_waiting
        self.counters = Counters()
        self.on_submit: Callable[[], None] = lambda: None  # wakes whoever calls step()
        shape = bundle.manifest.sample_shape
        elements = int(np.prod(shape))
        self._has_uncond = bundle.manifest.guidance.mode == "classifier-free"
        outputs = max_rows * (2 if self._has_uncond else 1)
        if backend is None:
            cores = threads or (
                len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            )
            self._backend: Backend = OnnxBackend(bundle.network, outputs, shape, cores)
        else:
            self._backend = backend(bundle, outputs)
        self._refuse_other_inputs()
        self._input = self._backend.inputs["x"].reshape(outputs, elements)
        self._slots = Slots(max_rows, self._input, max(t.num_places for t in bundle.tableaus.values()))
        self._scratch = Scratch(max_rows, elements)
        self._uncond = np.full(max_rows, -1, np.int32)
        self._tableaus: list[Tableau] = []
        self._rows_of: dict[str, range] = {}  # by the table's hash: its rows in self._table
        self._table: Array = pack_rows([], 1)
        for tableau in bundle.tableaus.values():
            self._rows(tableau)
        self._scheduler = Scheduler()
        self._is_closed = False
        self._lock = threading.Lock()  # around the scheduler and the counters; no future is touched under it

    # --- asking

    def submit(self, requests: Sequence[Request]) -> list[Future[Sample]]:
        """Put requests in line, all or none.

        Args:
            requests: one for each sample.

        Returns:
            A future for each. Cancelling it frees its place within one step.

        Raises:
            ValueError: a request does not fit the student; the message names the field.
            QueueFull: there is no room for all of them.
            EngineStopped: the engine was closed.
        """
        for request in requests:
            self._refuse_misfit(request)
        now_s = time.monotonic()
        tickets = [Ticket(request, Future(), now_s) for request in requests]
        over: list[Ticket] = []
        with self._lock:
            if self._is_closed:
                raise EngineStopped(f"{self.bundle.name} is shutting down")
            if len(self._scheduler) + len(tickets) > self.max_waiting:
                over = self._scheduler.drop(now_s)
            waiting = len(self._scheduler)
            is_full = waiting + len(tickets) > self.max_waiting
            if is_full:
                self.counters.rejected += len(tickets)
            else:
                for ticket in tickets:
                    self._scheduler.add(ticket)
        self._end(over, "waiting")
        if is_full:
            raise QueueFull(waiting, self.max_waiting, self._seconds_to_start(waiting))
        self.on_submit()
        return [ticket.future for ticket in tickets]

    def generate(self, requests: Sequence[Request], on_step: Callable[[int], None] | None = None) -> list[Sample]:
        """Make samples here and now, in the calling thread; for scripts, not beside an `EngineThread`.

        Args:
            requests: one for each sample; as many as wanted, they are fed in as there is room.
            on_step: called after each tick with the number of samples finished so far.
        """
        futures: list[Future[Sample]] = []
        while len(futures) < len(requests) or not all(future.done() for future in futures):
            room = self.max_waiting - self.num_waiting
            futures += self.submit(requests[len(futures) : len(futures) + room])
            self.step()
            if on_step:
                on_step(sum(future.done() for future in futures))
        return [future.result() for future in futures]

    def close(self) -> None:
        """Accept nothing more; what was accepted is still made."""
        with self._lock:
            self._is_closed = True

    @property
    def num_waiting(self) -> int:
        """Samples in line."""
        return len(self._scheduler)

    @property
    def num_running(self) -> int:
        """Samples in slots."""
        return len(self._slots)

    # --- working

    def step(self) -> bool:
        """One tick.

        Returns:
            Whether there was anything to run.
        """
        start_s = time.monotonic()
        self._let_go(start_s)
        self._admit(start_s)
        rows = len(self._slots)
        if not rows:
            return False
        try:
            raw = self._network(rows)
            self._update(slice(0, rows), raw)
        except Exception as error:
            log.exception("%s: a step failed; its %d samples are lost", self.bundle.name, rows)
            self._fail_running(SampleFailed(f"the step failed: {error}"))
            return True
        now_s = time.monotonic()
        self._harvest(now_s)
        self.counters.ticks += 1
        self.counters.row_steps += rows
        self.counters.busy_s += now_s - start_s
        return True

    def _let_go(self, now_s: float) -> None:
        over = [i for i, ticket in enumerate(self._slots.tickets) if ticket.is_over(now_s)]
        tickets = [self._slots.tickets[i] for i in over]
        for i in reversed(over):
            self._slots.remove(i)
        self._end(tickets, "running")

    def _admit(self, now_s: float) -> None:
        first = len(self._slots)
        places = self._slots.capacity - first
        if not places or not len(self._scheduler):
            return
        with self._lock:
            tickets, over = self._scheduler.take(places, now_s)
        self._end(over, "waiting")
        guidance = self.bundle.manifest.guidance
        labels = self.bundle.manifest.labels
        for ticket in tickets:
            ticket.started_s = now_s
            request = ticket.request
            null = labels.null if labels and labels.null is not None else 0
            label = null if request.label is None else request.label
            scale = guidance.default if request.guidance is None else request.guidance
            self._slots.add(ticket, self._rows(request.tableau), label, scale)
        if tickets:
            self._update(slice(first, len(self._slots)), self._input)  # the start row reads no network output

    def _network(self, rows: int) -> Array:
        inputs, slots = self._backend.inputs, self._slots
        outputs = rows
        self._uncond[:rows] = -1
        if self._has_uncond:
            labels = self.bundle.manifest.labels
            for i in np.flatnonzero(slots.guidance[:rows] != 1):
                self._uncond[i] = outputs
                self._input[outputs] = self._input[i]
                inputs["label"][outputs] = labels.null if labels else 0
                inputs["t"][outputs] = self._table["t"][slots.table_row[i]]
                outputs += 1
        inputs["t"][:rows] = self._table["t"][slots.table_row[:rows]]
        if "label" in inputs:
            inputs["label"][:rows] = slots.label[:rows]
        if "guidance" in inputs:
            inputs["guidance"][:rows] = slots.guidance[:rows]
        return self._backend(outputs).reshape(outputs, -1)

    def _update(self, part: slice, raw: Array) -> None:
        slots = self._slots
        fused_step(
            self._table, slots.table_row[part], slots.x[part], slots.history[part], raw, self._uncond[part],
            slots.guidance[part], slots.seed[part], self._input[part], self._scratch,
        )  # fmt: skip
        slots.table_row[part] += 1

    def _harvest(self, now_s: float) -> None:
        slots = self._slots
        rows = len(slots)
        for i in np.flatnonzero(slots.table_row[:rows] == slots.end_row[:rows])[::-1]:
            ticket, pixels = slots.tickets[i], slots.x[i].copy()
            slots.remove(i)
            if not np.isfinite(pixels).all():
                self._fail(ticket, SampleFailed("the sample is not finite: the network gave NaN or infinity"))
            elif ticket.future.set_running_or_notify_cancel():
                self._count("finished")
                ticket.future.set_result(
                    Sample(
                        pixels.reshape(self.bundle.manifest.sample_shape),
                        ticket.request,
                        queue_s=ticket.started_s - ticket.submitted_s,
                        run_s=now_s - ticket.started_s,
                    )
                )
            else:
                self._count("cancelled")

    def _fail_running(self, error: Exception) -> None:
        tickets = list(self._slots.tickets)
        self._slots.tickets.clear()
        for ticket in tickets:
            self._fail(ticket, error)

    # --- ends: each ticket comes to exactly one, and is counted there

    def _end(self, over: Sequence[Ticket], state: str) -> None:
        for ticket in over:
            self._fail(ticket, DeadlineExpired(f"the deadline passed while the sample was {state}"), "expired")

    def _fail(self, ticket: Ticket, error: Exception, end: str = "failed") -> None:
        """End a request without a sample; a cancelled one is told to those who wait for its future."""
        if ticket.future.set_running_or_notify_cancel():
            self._count(end)
            ticket.future.set_exception(error)
        else:
            self._count("cancelled")

    def _count(self, end: str) -> None:
        with self._lock:
            setattr(self.counters, end, getattr(self.counters, end) + 1)

    # --- tables and checks

    def _rows(self, tableau: Tableau) -> range:
        """Where a table's rows stand in ``self._table``; a table not seen before is added."""
        known = self._rows_of.get(tableau.sha256)
        if known is None:
            self.bundle.refuse_misfit(tableau)
            self._tableaus.append(tableau)
            history = max(t.num_places for t in self._tableaus)
            packed = [t.step_rows(self.bundle.manifest.output.prediction()) for t in self._tableaus]
            self._table = pack_rows([row for rows in packed for row in rows], history)
            self._slots.deepen(history)
            start = sum(len(rows) for rows in packed[:-1])
            known = self._rows_of[tableau.sha256] = range(start, start + len(packed[-1]))
        return known

    def _refuse_other_inputs(self) -> None:
        manifest, inputs = self.bundle.manifest, self._backend.inputs
        said = {"label": manifest.labels is not None, "guidance": manifest.guidance.mode == "embedded"}
        for name, is_said in said.items():
            if is_said != (name in inputs):
                takes = "takes" if name in inputs else "does not take"
                raise BundleError(f"{self.bundle.path}: the network {takes} {name}, against what the manifest says")

    def _refuse_misfit(self, request: Request) -> None:
        labels, guidance = self.bundle.manifest.labels, self.bundle.manifest.guidance
        name = self.bundle.name
        if not 0 <= request.seed < 2**64:
            raise ValueError(f"seed: {request.seed}, must be 0 to 2**64 - 1")
        if labels is None:
            if request.label is not None:
                raise ValueError(f"label: {name} takes none")
        elif request.label is None:
            if labels.null is None:
                raise ValueError(f"label: {name} needs one, 0 to {len(labels.names) - 1}")
        elif not 0 <= request.label < len(labels.names):
            raise ValueError(f"label: {request.label}, {name} has 0 to {len(labels.names) - 1}")
        scale = request.guidance
        if scale is not None and not guidance.minimum <= scale <= guidance.maximum:
            allowed = f"{guidance.minimum:g} to {guidance.maximum:g}"
            if guidance.minimum == guidance.maximum:
                allowed = f"{guidance.default:g} only: its guidance is fixed"
            raise ValueError(f"guidance: {scale:g}, {name} takes {allowed}")
        if request.tableau.sha256 not in self._rows_of:
            self.bundle.refuse_misfit(request.tableau)

    def _seconds_to_start(self, waiting: int) -> float:
        """When a sample that cannot wait in line may try again: the line's length by the measured pace."""
        done = self.counters
        if not done.row_steps:
            return 1.0
        mean_steps = done.row_steps / max(1, done.finished)
        return max(0.05, waiting * mean_steps * done.busy_s / done.row_steps)


class EngineThread:
    """The thread that owns the device: it steps each engine in turn while any has work, and sleeps else.

    Args:
        engines: the students it runs.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = tuple(engines)
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="fewstep-engine", daemon=True)
        for engine in self._engines:
            engine.on_submit = self._wake.set

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Accept nothing more, finish everything accepted, then end the thread."""
        for engine in self._engines:
            engine.close()
        self._stopping = True
        self._wake.set()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while True:
            self._wake.clear()
            is_last = self._stopping  # read first: what came in before it is seen by the steps below
            worked = [engine.step() for engine in self._engines]  # each has its turn
            if not any(worked):
                if is_last:
                    return
                self._wake.wait()
