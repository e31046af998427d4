"""The engine: step-level continuous batching, in which every row stands on its own table row.

A tick is ``step()``: let go of what nobody wants, admit what waits, one network call over all running rows,
one fused step over all of them, hand out what is finished. Requests of any solver, step count, guidance and
seed share the batch and join or leave at every tick, because nothing of that is a property of the batch.

Tables come and go while it runs. A request holds the table it was made with and ends on that one, whatever is loaded
meanwhile; the packed rows belong to the thread that steps, which moves them only between ticks, and keeps those of
tables that are served or running and no others.
"""

import logging
import math
import os
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ..kernels import pack_rows
from ..kernels.fused_step import Array
from .backends import Backend, OnnxBackend
from .bundle import Bundle, BundleError
from .devices import Step
from .hooks import Output
from .pace import Pace, ticks_to_end, ticks_to_start
from .request import (
    DeadlineExpired,
    DeadlineInfeasible,
    EngineStopped,
    Preview,
    QueueFull,
    Request,
    Sample,
    SampleFailed,
    SampleFuture,
    StepFailed,
    Ticket,
    to_uint8,
)
from .scheduler import AGEING_S, Scheduler, Shares
from .slots import Slots
from .tableau import Tableau, TableauError

log = logging.getLogger("fewstep")

LAST_TICK_S = 5.0  # for the tick that runs when time is up
TOGETHER = 4096  # elements of a sample up to which a tick's become uint8 together: to call numpy takes long
MAX_LOADED = 256  # tables that may be loaded over a bundle's own
DURATIONS_S = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)  # upper bounds of `Counters.durations`
_Key = tuple[str, int]  # a table's name and number of steps


@dataclass(slots=True)
class Counters:
    """What an engine has done; one that follows another may go on counting where that one still does.

    Ticks belong to the thread that steps both. Of the samples' ends each is counted under the lock.
    """

    ticks: int = 0  # network executions
    row_steps: int = 0  # rows moved by one table row; row_steps / ticks is the mean batch
    finished: int = 0
    cancelled: int = 0
    expired: int = 0
    failed: int = 0
    rejected: int = 0
    preempted: int = 0  # times that a running row made room for one of higher priority
    busy_s: float = 0.0  # time spent in ticks
    queue_s: float = 0.0  # of the finished samples: time in line
    run_s: float = 0.0  # and time from their first network call to their end
    last_s: float = 0.0  # when the last one was finished, on time.monotonic()
    durations: list[int] = field(
        default_factory=lambda: [0] * (len(DURATIONS_S) + 1)
    )  # finished samples by queue + run
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, end: str, num: int = 1) -> None:
        """Count samples that came to an end: ``cancelled``, ``expired``, ``failed`` or ``rejected``."""
        with self.lock:
            setattr(self, end, getattr(self, end) + num)


class Engine:
    """Runs one student. `submit` may be called from any thread, `step` from one at a time.

    Args:
        bundle: the student.
        max_rows: rows that run together; a row is one sample, and guidance without distillation takes two.
        max_waiting: samples that may wait; further ones are refused with `QueueFull`.
        threads: CPU threads of one network call; the machine's cores when left out.
        precision: which of the bundle's networks the CPU runs; see `Bundle.network_in`. A backend is told by itself.
        backend: makes the network from (bundle, rows); ONNX Runtime on the CPU when left out.
        ageing_s: time in line that is worth one level of priority.
        weight: its share of the device, of those that an `EngineThread` steps.
        clock: seconds; one that is not ``time.monotonic`` is for whoever drives `tick` by it.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_rows: int = 64,
        max_waiting: int = 1024,
        threads: int | None = None,
        precision: str = "float32",
        backend: Callable[[Bundle, int], Backend] | None = None,
        ageing_s: float = AGEING_S,
        weight: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_rows < 1 or max_waiting < 1:
            raise ValueError(f"max_rows {max_rows} and max_waiting {max_waiting} must be at least 1")
        if not 0 < weight < math.inf:
            raise ValueError(f"weight: {weight}, must be above 0 and finite")
        self.bundle = bundle
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.weight = weight
        self._clock = clock
        self.counters = Counters()
        self.pace = Pace()
        self.recent: deque[tuple[float, float, int]] = deque(maxlen=1024)  # ticks: start, end, rows
        self.load_s = 0.0  # how long loading took; told by who did
        self.others_s = 0.0  # since its last tick: the turns of others; told by who calls step()
        self.on_submit: Callable[[], None] = lambda: None  # wakes whoever calls step()
        self.on_wait: Callable[[], None] = self.hand_out  # what to do before waiting for the network
        shape = bundle.manifest.sample_shape
        elements = int(np.prod(shape))
        self._has_uncond = bundle.manifest.guidance.mode == "classifier-free"
        outputs = max_rows * (2 if self._has_uncond else 1)
        if backend is None:
            cores = threads or (
                len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            )
            self._backend: Backend = OnnxBackend(bundle.network_in(precision), outputs, shape, cores)
        else:
            self._backend = backend(bundle, outputs)
        self._refuse_other_inputs()
        self._device = self._backend.device
        self._input = self._backend.inputs["x"].reshape(outputs, elements)
        self._said = {  # the network's small inputs, on the host
            name: np.zeros(outputs, array.dtype) for name, array in self._backend.inputs.items() if name != "x"
        }
        places = max(t.num_places for t in bundle.tableaus.values())
        self._slots = Slots(max_rows, self._input, places, self._device)
        self._uncond = np.full(max_rows, -1, np.int32)
        self._loaded: Mapping[_Key, Tableau] = {}  # over the bundle's own; replaced as a whole, never changed
        self._served = bundle  # with those loaded
        self._are_tables_stale = False  # whether served tables changed since they were packed
        self._packed: dict[str, Array] = {}  # by hash: the rows as the kernel reads them
        self._rows_of: dict[str, range] = {}  # by hash: where they stand in the packed table
        self._times: Array  # what the network is told before each row of the table
        self._step: Step  # bound to the table and the slots
        self._lock = threading.Lock()  # around the scheduler; no future is touched under it
        self._pack()
        self._scheduler = Scheduler(ageing_s)
        self._made: list[tuple[Ticket, Sample]] = []  # finished, and not handed out yet
        self._is_closed = False
        self._why_closed = f"{bundle.name} is shutting down"

    # --- asking

    def submit(
        self, requests: Sequence[Request], on_preview: Callable[[int, Preview], None] | None = None
    ) -> list[Future[Sample]]:
        """Put requests in line, all or none.

        Those with a deadline are accepted only if they should meet it. Of the tables of a request, the first one is
        taken with which all of them should; the sample's request says which.

        Args:
            requests: one for each sample.
            on_preview: called with a request's number among these and a preview, after each of its network calls but
                the last; by the thread that steps, so it must be quick. Only those who ask for previews pay for them.

        Returns:
            A future for each. Cancelling it frees its place within one step.

        Raises:
            ValueError: a request does not fit the student; the message names the field.
            QueueFull: there is no room for all of them.
            DeadlineInfeasible: they would be late, whatever their tables.
            EngineStopped: the engine was closed, or nothing steps it any more.
        """
        for request in requests:
            self._refuse_misfit(request)
        now_s = self._clock()
        tickets: list[Ticket] = []
        over: list[Ticket] = []
        refusal: QueueFull | DeadlineInfeasible | None = None
        with self._lock:
            if self._is_closed:
                raise EngineStopped(self._why_closed)
            if len(self._scheduler) + len(requests) > self.max_waiting:
                over = self._scheduler.drop(now_s)
            waiting = len(self._scheduler)
            if waiting + len(requests) > self.max_waiting:
                refusal = QueueFull(waiting, self.max_waiting, self.seconds_to_start(waiting))
            else:
                try:
                    requests = self._in_time(requests, now_s)
                except DeadlineInfeasible as error:
                    refusal = error
            if refusal:
                self.counters.add("rejected", len(requests))
            else:
                for i, request in enumerate(requests):
                    show = partial(on_preview, i) if on_preview else None
                    tickets.append(Ticket(request, SampleFuture(), now_s, show))
                    self._scheduler.add(tickets[-1])
        self._end(over, "waiting")
        if refusal:
            raise refusal
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

    def abandon(self, why: str | None = None) -> None:
        """Accept nothing more, and end what was accepted with `EngineStopped`; for the thread that steps, or none."""
        with self._lock:
            self._is_closed, self._why_closed = True, why or self._why_closed
            waiting, over = self._scheduler.take(len(self._scheduler), self._clock())
        stopped = EngineStopped(self._why_closed)
        self.hand_out()
        self._fail_running(stopped)
        for ticket in (*waiting, *over):
            self._fail(ticket, stopped)

    @property
    def is_done(self) -> bool:
        """Whether it was closed and has made everything it accepted."""
        return self._is_closed and not self.has_work

    @property
    def has_work(self) -> bool:
        """Whether a tick would have anything to do."""
        return bool(len(self._slots) or len(self._scheduler) or self._made)

    def place(self, future: Future[Sample]) -> int | None:
        """How many start before a request that waits; None when it does not wait any more."""
        with self._lock:
            return self._scheduler.place(future)

    def places(self) -> dict[Future[Sample], int]:
        """The same of all that wait, at once."""
        with self._lock:
            return self._scheduler.places()

    @property
    def num_waiting(self) -> int:
        """Samples in line."""
        return len(self._scheduler)

    def num_waiting_of(self, caller: str) -> int:
        """Of them, a caller's."""
        return self._scheduler.num_of(caller)

    @property
    def waiting_by_priority(self) -> dict[int, int]:
        """Samples in line, by priority."""
        return self._scheduler.lengths()

    @property
    def num_running(self) -> int:
        """Samples in slots."""
        return len(self._slots)

    # --- tables

    @property
    def tableaus(self) -> Mapping[_Key, Tableau]:
        """What is served now, by solver name and number of steps: the bundle's tables, and over them those loaded."""
        return self._served.tableaus

    @property
    def loaded(self) -> Mapping[_Key, Tableau]:
        """The tables that were loaded into this engine, over those of the bundle."""
        return self._loaded

    def tableau(self, solver: str | None = None, num_steps: int | None = None) -> Tableau:
        """The table that a request asks for, of those served now; see `Bundle.tableau`."""
        return self._served.tableau(solver, num_steps)

    def load_table(self, tableau: Tableau) -> Tableau | None:
        """Serve a table from now on, in the place of the one with its name and number of steps.

        Requests that were accepted before end on the table they were accepted with.

        Returns:
            The table it replaces, the same one if it was served already.

        Raises:
            TableauError: it does not fit the student, or there are `MAX_LOADED` already; nothing was changed.
        """
        self.bundle.refuse_misfit(tableau)
        key = tableau.name, tableau.num_steps
        with self._lock:
            if key not in self._loaded and len(self._loaded) >= MAX_LOADED:
                raise TableauError(f"{tableau.name}: {MAX_LOADED} tables are loaded already; remove one first")
            replaced = self.tableaus.get(key)
            self._serve({**self._loaded, key: tableau})
        return replaced

    def unload_table(self, solver: str, num_steps: int, sha256: str | None = None) -> Tableau:
        """Serve a loaded table no more; one of the bundle's that it stood over is served again.

        Args:
            solver: its name.
            num_steps: its number of steps.
            sha256: unload it only if it is this one.

        Returns:
            The table.

        Raises:
            KeyError: there is none.
        """
        with self._lock:
            tableau = self._loaded[solver, num_steps]
            if sha256 not in (None, tableau.sha256):
                raise KeyError((solver, num_steps))
            self._serve({key: table for key, table in self._loaded.items() if table is not tableau})
        return tableau

    def _serve(self, loaded: Mapping[_Key, Tableau]) -> None:
        self._loaded = loaded
        self._served = replace(self.bundle, tableaus={**self.bundle.tableaus, **loaded})
        self._are_tables_stale = True

    # --- working

    def warm_up(self) -> None:
        """Run the network on nothing, so that the first requests find it ready and its pace known."""
        with self._device.turn:
            for rows in dict.fromkeys((1, self._slots.capacity)):
                for _ in range(3):  # the first call of a size sets it up
                    start_s = self._clock()
                    self._backend(rows)
                    self._device.wait()
                self.pace.add(rows, self._clock() - start_s)

    def step(self) -> bool:
        """One tick. Whatever goes wrong in it, it ends the requests that it concerns, and never raises.

        Returns:
            Whether there was anything to run.
        """
        has_run = sum(1 for _ in self.tick()) > 0
        self.hand_out()
        return has_run

    def tick(self) -> Iterator[int]:
        """The same in two parts, for who has a clock of their own: it stops once, while the device is at work.

        What that takes may pass before it goes on; requests may be submitted meanwhile, as by other threads. What is
        finished is handed out in the next tick, or by `hand_out`.

        Yields:
            Rows of the call. Nothing, if there is nothing to run.
        """
        try:
            with self._device.turn:
                yield from self._tick()
        except Exception as error:
            log.exception("%s: a tick failed; its %d samples are lost", self.bundle.name, len(self._slots))
            self.hand_out()
            self._fail_running(StepFailed(f"the step failed: {error}"))

    def _tick(self) -> Iterator[int]:
        start_s = self._clock()
        if self._are_tables_stale:
            self._pack()
        self._let_go(start_s)
        self._admit(start_s)
        rows = len(self._slots)
        if not rows:
            self.hand_out()
            return
        outputs, is_whole = rows, True
        if not self._device.lags:
            self.on_wait()
        try:
            outputs = self._gather(rows)
            raw = self._network(outputs)
        except Exception:
            log.exception("%s: a network call failed; its %d rows are run one by one", self.bundle.name, rows)
            self._one_by_one(rows)
            is_whole = False
        else:
            if self._device.lags:
                self.on_wait()
            self._correct(rows, raw)
            self._show(rows, raw)
            self._step(0, rows, raw)
        yield outputs
        self._device.wait()
        now_s = self._clock()
        self.recent.append((start_s, now_s, rows))
        self._harvest(now_s)
        self.counters.ticks += 1
        self.counters.row_steps += rows
        self.counters.busy_s += now_s - start_s
        if is_whole:
            self.pace.add(outputs, now_s - start_s, self.others_s)
        self.others_s = 0.0

    def _one_by_one(self, rows: int) -> None:
        """Find the rows that a network call fails on, end those, and do the step of the others."""
        slots = self._slots
        lost: dict[int, Exception] = {}
        for i in range(rows):
            slots.swap(0, i)  # a network call is over the first rows
            behind = self._input[1].copy() if self._has_uncond else None
            try:
                raw = self._network(self._gather(1))
            except Exception as error:
                lost[id(slots.tickets[0])] = error
            else:
                self._correct(1, raw)
                self._show(1, raw)
                self._step(0, 1, raw)
            if behind is not None:
                self._input[1] = behind
        failed = [i for i, ticket in enumerate(slots.tickets) if id(ticket) in lost]
        tickets = [slots.tickets[i] for i in failed]
        slots.remove(failed)
        for ticket in tickets:
            self._fail(ticket, StepFailed(f"the step failed: {lost[id(ticket)]}"))

    def _let_go(self, now_s: float) -> None:
        over = [i for i, ticket in enumerate(self._slots.tickets) if ticket.is_over(now_s)]
        if over:
            tickets = [self._slots.tickets[i] for i in over]
            self._slots.remove(over)
            self._end(tickets, "running")

    def _admit(self, now_s: float) -> None:
        if not len(self._scheduler):
            return
        slots = self._slots
        with self._lock:
            tickets, over = self._scheduler.take(slots.capacity - len(slots), now_s)
            while len(slots) + len(tickets) == slots.capacity:
                i = self._scheduler.outranked(slots.tickets, slots.left, now_s)
                if i is None:
                    break
                self._scheduler.put_back(slots.pause(i))
                self.counters.preempted += 1
                more, gone = self._scheduler.take(1, now_s)
                tickets += more
                over += gone
        self._end(over, "waiting")
        guidance = self.bundle.manifest.guidance
        labels = self.bundle.manifest.labels
        tickets.sort(key=lambda ticket: ticket.paused is None)
        first = len(slots) + sum(ticket.paused is not None for ticket in tickets)
        for ticket in tickets:
            ticket.started_s = ticket.started_s or now_s
            request = ticket.request
            null = labels.null if labels and labels.null is not None else 0
            label = null if request.label is None else request.label
            scale = guidance.default if request.guidance is None else request.guidance
            try:
                rows = self._rows(request.tableau)
            except Exception as error:
                log.exception("%s: %s cannot be packed", self.bundle.name, request.tableau.name)
                self._fail(ticket, StepFailed(f"its table cannot be run: {error}"))
                first -= ticket.paused is not None
                continue
            slots.add(ticket, rows, label, scale)
        if len(slots) > first:
            self._step(first, len(slots), self._input)  # the start row reads no network output

    def _gather(self, rows: int) -> int:
        """Say the network's small inputs for the first rows; how many rows its call takes, guidance included."""
        said, slots = self._said, self._slots
        outputs = rows
        if self._has_uncond:
            self._uncond[:rows] = -1
            labels = self.bundle.manifest.labels
            guided = np.flatnonzero(slots.guidance[:rows] != 1)
            outputs += len(guided)
            if len(guided):
                self._uncond[guided] = np.arange(rows, outputs)
                self._input[rows:outputs] = self._input[guided]
                said["label"][rows:outputs] = labels.null if labels else 0
                said["t"][rows:outputs] = self._times.take(slots.table_row[guided])
        said["t"][:rows] = self._times.take(slots.table_row[:rows])
        if "label" in said:
            said["label"][:rows] = slots.label[:rows]
        if "guidance" in said:
            said["guidance"][:rows] = slots.guidance[:rows]
        for name, values in said.items():
            self._device.put(self._backend.inputs[name][:outputs], values[:outputs])
        return outputs

    def _network(self, outputs: int) -> Array:
        return self._backend(outputs).reshape(outputs, -1)

    def _output(self, i: int, raw: Array) -> Output:
        """What the network said of row ``i``, on the host; before the update, which moves ``x`` on."""
        slots, tableau = self._slots, self._slots.tickets[i].request.tableau
        step = tableau.num_steps - slots.left(i)
        conditional = guided = self._device.fetch(raw[i]).astype(np.float32, copy=False)
        if self._uncond[i] >= 0:
            uncond = self._device.fetch(raw[self._uncond[i]]).astype(np.float32, copy=False)
            guided = uncond + slots.guidance[i] * (conditional - uncond)
        try:
            prediction = self.bundle.manifest.output.prediction()
            to_x0 = prediction.to_form("x0", float(tableau.alpha[step]), float(tableau.sigma[step]))
        except ValueError:  # at pure noise some networks know nothing of the data yet
            to_x0 = None
        return Output(guided, conditional, self._device.fetch(slots.x[i]), to_x0)

    def _correct(self, rows: int, raw: Array) -> None:
        """Let the hooks of those who have any change what the network said, guidance included."""
        for i, ticket in enumerate(self._slots.tickets[:rows]):
            if ticket.request.hooks:
                output = self._output(i, raw)
                for hook in ticket.request.hooks:
                    output = hook(output)
                self._device.put(raw[i], output.raw)
                self._uncond[i] = -1  # it is guided already

    def _show(self, rows: int, raw: Array) -> None:
        """Give previews to those who asked for them."""
        slots = self._slots
        for i, ticket in enumerate(slots.tickets[:rows]):
            if ticket.on_preview is None or slots.left(i) == 1:  # what comes next is the sample itself
                continue
            pixels, num_steps = self._output(i, raw).x0, ticket.request.tableau.num_steps
            if pixels is None:
                continue
            try:
                shape = self.bundle.manifest.sample_shape
                preview = Preview(pixels.reshape(shape), num_steps - slots.left(i) + 1, num_steps)
                ticket.on_preview(preview)
            except Exception:
                log.exception("%s: a preview was not taken; its request gets no more", self.bundle.name)
                ticket.on_preview = None

    def _harvest(self, now_s: float) -> None:
        slots = self._slots
        finished = slots.finished
        if not finished:
            return
        pixels = self._device.fetch(slots.x.take(finished, axis=0))
        is_finite = np.asarray(np.isfinite(pixels).all(axis=1))
        pixels = pixels.reshape(-1, *self.bundle.manifest.sample_shape)
        tickets = [slots.tickets[i] for i in finished]
        slots.remove(finished)
        pictures = to_uint8(pixels) if pixels[0].size <= TOGETHER else [None] * len(pixels)
        for i, ticket in enumerate(tickets):
            if is_finite[i]:
                queue_s, run_s = ticket.started_s - ticket.submitted_s, now_s - ticket.started_s
                self._made.append((ticket, Sample(pixels[i], ticket.request, queue_s, run_s, now_s, pictures[i])))
            else:
                self._fail(ticket, SampleFailed("the sample is not finite: the network gave NaN or infinity"))

    def hand_out(self) -> None:
        """Give the finished samples to those who wait for them; for the thread that steps.

        Where the next call waits for the network, that is just before it: the threads that this wakes then find the
        interpreter's lock free. A device that lags leaves time for it while it works.
        """
        finished, self._made = self._made, []
        made = [(ticket, sample) for ticket, sample in finished if ticket.future.set_running_or_notify_cancel()]
        if not finished:
            return
        done = self.counters
        with done.lock:
            done.cancelled += len(finished) - len(made)
            done.finished += len(made)
            done.queue_s += sum(sample.queue_s for _, sample in made)
            done.run_s += sum(sample.run_s for _, sample in made)
            done.last_s = made[-1][1].ended_s if made else done.last_s
            for _, sample in made:
                done.durations[bisect_left(DURATIONS_S, sample.queue_s + sample.run_s)] += 1
        for ticket, sample in made:
            ticket.future.set_result(sample)

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
            self.counters.add(end)
            ticket.future.set_exception(error)
        else:
            self.counters.add("cancelled")

    # --- packed rows and checks

    def _rows(self, tableau: Tableau) -> range:
        """Where a table's rows stand in the packed one; a table not seen before is added."""
        if tableau.sha256 not in self._rows_of:
            self._pack(tableau)
        return self._rows_of[tableau.sha256]

    def _pack(self, *wanted: Tableau) -> None:
        """Pack the rows of the tables that are served, running or wanted, and show running rows where theirs went.

        Only between ticks. The history is never made shallower, so what running rows keep there stays in place.
        """
        self._are_tables_stale = False  # first: what is loaded meanwhile is seen next time
        running = (ticket.request.tableau for ticket in self._slots.tickets)
        kept = {tableau.sha256: tableau for tableau in (*self.tableaus.values(), *running, *wanted)}
        self._slots.deepen(max(tableau.num_places for tableau in kept.values()))
        depth = self._slots.history.shape[1]
        prediction = self.bundle.manifest.output.prediction()
        packed: dict[str, Array] = {}
        for sha256, tableau in kept.items():
            known = self._packed.get(sha256)
            is_same = known is not None and known["b"].shape[1] == depth
            packed[sha256] = known if known is not None and is_same else pack_rows(tableau.step_rows(prediction), depth)
        rows_of: dict[str, range] = {}
        stop = 0
        for sha256, rows in packed.items():
            rows_of[sha256] = range(stop, stop := stop + len(rows))
        slots, table = self._slots, np.concatenate(list(packed.values()))
        step = self._device.bind(
            table, slots.table_row, slots.x, slots.history, self._uncond, slots.guidance, slots.seed, self._input
        )
        with self._lock:  # who submits reckons with the difference of the two
            for i, ticket in enumerate(slots.tickets):
                sha256 = ticket.request.tableau.sha256
                moved = rows_of[sha256].start - self._rows_of[sha256].start
                slots.table_row[i] += moved
                slots.stop[i] += moved
        self._times, self._step = table["t"].copy(), step
        self._packed, self._rows_of = packed, rows_of

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
        for hook in request.hooks:
            if reason := hook.refusal(self.bundle.manifest):
                raise ValueError(reason)
        for tableau in (request.tableau, *request.fallbacks):
            if tableau.sha256 not in self._rows_of:
                self.bundle.refuse_misfit(tableau)

    # --- admission

    def _in_time(self, requests: Sequence[Request], now_s: float) -> Sequence[Request]:
        """The requests, with the first of their tables with which all should meet the earliest of their deadlines."""
        deadlines = [request.deadline_s for request in requests if request.deadline_s is not None]
        if not deadlines:
            return requests
        left_s = min(deadlines) - now_s
        ahead = list(self._scheduler.ahead(requests[0]))
        first = requests[0]
        running = [
            0 if self._scheduler.gives_way(ticket, first.priority, first.priority, now_s) else self._slots.left(i)
            for i, ticket in enumerate(self._slots.tickets)
        ]
        capacity = self._slots.capacity
        free = ticks_to_start(running, (ticket.request.tableau.num_steps for ticket in ahead), capacity)
        company = [*(ticket.request for ticket in (*self._slots.tickets, *ahead)), *requests]
        tick_s = self._tick_s(company)
        for i in range(1 + max(len(request.fallbacks) for request in requests)):
            taken = [
                replace(request, tableau=(request.tableau, *request.fallbacks)[min(i, len(request.fallbacks))])
                for request in requests
            ]
            steps = [request.tableau.num_steps for request in taken]
            ticks = ticks_to_end(free, steps) + bool(running)  # the one that runs now has to end first
            needed_s = ticks * tick_s + self.pace.reserve_s(ticks)
            if needed_s <= left_s:
                return taken
        ticks = ticks_to_end([0] * capacity, steps)
        idle_s = ticks * self._tick_s(requests) + self.pace.reserve_s(ticks)
        raise DeadlineInfeasible(left_s, needed_s, idle_s, max(steps), len(ahead))

    def _tick_s(self, company: Sequence[Request]) -> float:
        """What a tick will take while these are there; no less than by the measured mean, since more may join."""
        outputs = sum(map(self._outputs, company)) / len(company) * min(self._slots.capacity, len(company))
        return self.pace.seconds(max(outputs, self.pace.rows))

    def _outputs(self, request: Request) -> int:
        """Rows of a network call that a request takes."""
        default = self.bundle.manifest.guidance.default
        scale = default if request.guidance is None else request.guidance
        return 2 if self._has_uncond and scale != 1 else 1

    def seconds_to_start(self, waiting: int) -> float:
        """When so many of those in line will have started, by their mean steps and the measured pace of full ticks."""
        rows, in_line = self._slots.capacity, len(self._scheduler)
        if not self.pace.num or not in_line:
            return 1.0
        mean_steps = self._scheduler.num_steps / in_line
        return max(0.05, waiting * mean_steps * self.pace.seconds(max(rows, self.pace.rows)) / rows)


class EngineThread:
    """The thread that owns the device: it steps the engines that have work, and sleeps when none has.

    Next is the one that was given the least time by its weight, as callers share a waiting line; see `Shares`.

    Args:
        engines: the students it runs.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines: tuple[Engine, ...] = ()
        self._has_ended = False
        self._why: str | None = None  # set where it ended by an error
        self._lock = threading.Lock()  # around changes of the engines
        self._wake = threading.Event()
        self._stopping = False
        self._until_s = math.inf  # on time.monotonic(): when what is left is ended
        self._thread = threading.Thread(target=self._run, name="fewstep-engine", daemon=True)
        for engine in engines:
            self.add(engine)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def add(self, engine: Engine) -> None:
        """Run one more; one that is closed leaves by itself when it has made what it accepted."""
        engine.on_submit, engine.on_wait = self.wake, self._hand_out
        with self._lock:
            has_ended = self._has_ended
            self._engines = (*self._engines, engine)
        if has_ended:
            engine.abandon(self._why)
        self.wake()

    def wake(self) -> None:
        """Look again at what there is to do: an engine was closed, for one."""
        if not self._wake.is_set():  # `set` takes a lock, and most of the time somebody was here before
            self._wake.set()

    def stop(self, timeout_s: float | None = None) -> None:
        """Accept nothing more, finish what was accepted, then end the thread.

        Args:
            timeout_s: what is not finished by then ends with `EngineStopped`; None: there is no hurry. A tick is not
                broken off: a device that never answers is waited for a few seconds longer, and left behind.
        """
        for engine in self._engines:
            engine.close()
        if timeout_s is not None:
            self._until_s = time.monotonic() + timeout_s
        self._stopping = True
        self._wake.set()
        self._thread.join(None if timeout_s is None else timeout_s + LAST_TICK_S)

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Those that it runs, and of those that were closed the ones that still have work."""
        return self._engines

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._step_all()
        except BaseException:
            self._why = "the engine failed and takes no more requests; its log says why"
            log.exception("the engine thread ended; no student takes requests any more, only a restart helps")
        with self._lock:
            self._has_ended = True
        for engine in self._engines:
            engine.abandon(self._why)

    def _hand_out(self) -> None:
        """Before the thread waits for an engine's network, what all of them have finished finds its way."""
        for engine in self._engines:
            engine.hand_out()

    def _step_all(self) -> None:
        shares = Shares()
        while time.monotonic() < self._until_s:
            self._wake.clear()
            is_last = self._stopping  # read first: what came in before it is seen by the steps below
            engines = self._engines
            busy = [engine for engine in engines if engine.has_work]
            if busy:
                engine = min(busy, key=shares.due)
                start_s, due = time.monotonic(), shares.due(engine)
                for _ in engine.tick():
                    pass
                took_s = time.monotonic() - start_s
                shares.charge(engine, due, took_s / engine.weight)
                shares.serve(due)
                for other in busy:
                    if other is not engine:
                        other.others_s += took_s
            elif is_last:
                return
            if len(busy) < len(engines) and any(engine.is_done for engine in engines):
                with self._lock:
                    self._engines = tuple(engine for engine in self._engines if not engine.is_done)
                for gone in set(engines) - set(self._engines):
                    shares.forget(gone)
            elif not busy:
                self._wake.wait()
