"""Replicas on a virtual clock: a discrete-event simulation in which the engines are the real ones.

Nothing of scheduling is written a second time. Each replica is an `Engine` with its own waiting line, admission,
slots and pace; its samples are one pixel, its clock is the simulation's, and between the two parts of a tick passes
what a network call is said to cost:

    tick = engine.tick();  rows = next(tick);  later, at now + a + b * rows:  next(tick)                       (1)

and before the next tick passes what a server needs to hand out the answers. Arrivals are those that `generator` would
send. What comes out is what it would have recorded, so the same report is made of both, and the two can be held against
each other.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ..runtime import Bundle, DeadlineExpired, DeadlineInfeasible, Engine, QueueFull, Request, Sample, Tableau
from ..runtime.bundle import NETWORK, Manifest
from ..runtime.schedules import karras
from ..runtime.simulated import Cost, simulated
from ..runtime.solvers import ddim
from .errors import BenchError
from .generator import Records
from .observer import Counts
from .workload import Kind, Workload

Routing = Literal["least-loaded", "two-choices", "random", "round-robin"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)
MAX_STEPS = 128
REFUSAL_S = 1e-3  # that a refusal takes at least, or a client that comes back would be refused for ever in one instant
_ENDS = {QueueFull: "429", DeadlineInfeasible: "429", DeadlineExpired: "504"}  # as the server's HTTP says them


@dataclass(frozen=True)
class Replica:
    """What each replica is."""

    cost: Cost  # of a tick, by its rows
    max_rows: int = 16
    max_waiting: int = 1024
    overhead_ms: float = 0.0  # of a request, beside its time in the engine: protocol, picture
    deviation_ms: float = 0.0  # of a tick from its cost, in the mean
    between_ms: float = 0.0  # from the end of a tick to the start of the next one, while there is work
    default_steps: int = 4  # of a request that names none

    def period_s(self, rows: int) -> float:
        """From the start of a tick to that of the next one."""
        return self.cost.seconds(rows) + self.between_ms / 1000


def simulate(
    load: Workload, replica: Replica, replicas: int, routing: Routing = "least-loaded", share: float = 1.0
) -> Records:
    """Run a load on replicas.

    Args:
        load: what is asked for, and when.
        replica: each of them.
        replicas: how many.
        routing: who gets a request. ``least-loaded``: who has the fewest under way. ``two-choices``: of two at random
            the one that has fewer, as Ray Serve does. ``random``. ``round-robin``.
        share: of an open loop's requests, drawn at random: what some of many replicas get.

    Returns:
        What a load generator would have recorded.

    Raises:
        BenchError: a kind of requests cannot be simulated.
    """
    return _Simulation(load, replica, replicas, routing, share).run()


class _Simulation:
    def __init__(self, load: Workload, replica: Replica, replicas: int, routing: Routing, share: float) -> None:
        self._load, self._replica, self._routing, self._share = load, replica, routing, share
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._rng = np.random.default_rng([load.seed, 2])
        tables = _tables(load.kinds, replica.default_steps)
        self._tables = [_wanted(kind, tables, replica.default_steps) for kind in load.kinds]
        bundle = _student(tables, replica.default_steps)
        self._engines = [self._engine(bundle) for _ in range(replicas)]
        self._under_way = [0] * replicas
        self._is_idle = [True] * replicas
        self._turn = count()
        self._records: list[tuple[int, float, float, int]] = []
        self._error_of: dict[str, int] = {}

    def run(self) -> Records:
        load = self._load
        end_s = load.warmup_s + load.seconds
        if load.loop == "open":
            times, kinds = load.schedule()
            if self._share < 1:
                is_kept = self._rng.random(len(times)) < self._share
                times, kinds = times[is_kept], kinds[is_kept]
            arrivals = iter(zip(times.tolist(), kinds.tolist(), strict=True))
            self._next_arrival(arrivals)
        else:
            drawn = load.draw().tolist()
            numbers = count()

            def ask() -> None:
                if self._now_s < end_s:
                    self._arrive(drawn[next(numbers) % len(drawn)], ask)

            for _ in range(load.clients):
                self._at(0.0, ask)
        while self._events:
            self._now_s, _, happen = heapq.heappop(self._events)
            happen()
        columns = np.array(self._records, float).reshape(-1, 4).T
        kind, meant, done, error = columns
        rows, calls, busy_s = (
            float(sum(getattr(engine.counters, name) for engine in self._engines))
            for name in ("row_steps", "ticks", "busy_s")
        )
        counts = Counts(rows, calls, busy_s, self._now_s, self._replica.max_rows, self._replica.deviation_ms / 1000)
        return Records(
            kind.astype(np.int64), meant, meant, done, error.astype(np.int64), tuple(self._error_of), 0.0, counts
        )

    def _at(self, at_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), happen))

    # --- requests

    def _next_arrival(self, arrivals: Iterator[tuple[float, int]]) -> None:
        found = next(arrivals, None)
        if found is not None:
            self._at(found[0], partial(self._open_arrival, found[1], arrivals))

    def _open_arrival(self, kind: int, arrivals: Iterator[tuple[float, int]]) -> None:
        self._arrive(kind)
        self._next_arrival(arrivals)

    def _arrive(self, kind: int, then: Callable[[], None] | None = None) -> None:
        """A request comes; ``then`` is what its client does when it has the answer."""
        at_s, chosen = self._now_s, self._choose()
        engine, fields = self._engines[chosen], self._load.kinds[kind].fields
        deadline_ms = fields.get("deadline_ms")
        tableau, *fallbacks = self._tables[kind]
        request = Request(
            0, tableau, priority=fields.get("priority", 0), fallbacks=tuple(fallbacks),
            deadline_s=None if deadline_ms is None else at_s + deadline_ms / 1000,
        )  # fmt: skip
        num = self._load.kinds[kind].num_images
        try:
            futures = engine.submit([request] * num)
        except (QueueFull, DeadlineInfeasible) as error:
            self._record(kind, at_s, error, then)
            return
        self._under_way[chosen] += num
        left = [num]
        for future in futures:
            future.add_done_callback(partial(self._ended, chosen, kind, at_s, left, then))
        if self._is_idle[chosen]:
            self._start(chosen)

    def _choose(self) -> int:
        """Which replica gets the next request."""
        num, loads = len(self._engines), self._under_way
        if num == 1:
            return 0
        if self._routing == "round-robin":
            return next(self._turn) % num
        if self._routing == "random":
            return int(self._rng.integers(num))
        if self._routing == "two-choices":
            first, second = int(self._rng.integers(num)), int(self._rng.integers(num - 1))
            second += second >= first
            return first if loads[first] <= loads[second] else second
        least, start = min(loads), next(self._turn) % num
        try:  # of those with the fewest each in turn, or the first ones would get more
            return loads.index(least, start)
        except ValueError:
            return loads.index(least)

    def _ended(
        self, chosen: int, kind: int, at_s: float, left: list[int], then: Callable[[], None] | None,
        future: Future[Sample],
    ) -> None:  # fmt: skip
        self._under_way[chosen] -= 1
        left[0] -= 1
        if left[0] == 0:
            self._record(kind, at_s, future.exception(), then)

    def _record(self, kind: int, at_s: float, error: BaseException | None, then: Callable[[], None] | None) -> None:
        done_s = self._now_s + self._replica.overhead_ms / 1000
        code = -1
        if error is not None:
            name = _ENDS[type(error)]
            code = self._error_of.setdefault(name, len(self._error_of))
            done_s = max(done_s, at_s + REFUSAL_S)
        self._records.append((kind, at_s, done_s, code))
        if then is not None:
            self._at(done_s, then)

    # --- replicas

    def _engine(self, bundle: Bundle) -> Engine:
        replica = self._replica
        engine = Engine(
            bundle,
            max_rows=replica.max_rows,
            max_waiting=replica.max_waiting,
            backend=simulated("0"),
            clock=lambda: self._now_s,
        )
        for rows in (1, replica.max_rows):  # what its warm-up would have measured
            engine.pace.add(rows, replica.cost.seconds(rows))
        return engine

    def _start(self, number: int) -> None:
        """Begin a tick, if there is anything to do."""
        tick = self._engines[number].tick()
        rows = next(tick, 0)
        self._is_idle[number] = not rows
        if rows:
            self._at(self._now_s + self._took_s(rows), partial(self._end, number, tick))

    def _end(self, number: int, tick: Iterator[int]) -> None:
        next(tick, None)
        self._engines[number].hand_out()
        self._at(self._now_s + self._replica.between_ms / 1000, partial(self._start, number))

    def _took_s(self, rows: int) -> float:
        """A tick: its cost, or drawn from a gamma distribution with that mean."""
        seconds, off_s = self._replica.cost.seconds(rows), self._replica.deviation_ms / 1000
        if not off_s or not seconds:
            return seconds
        spread = (1.25 * off_s / seconds) ** 2  # 1.25: from a mean deviation to a standard one
        return seconds * float(self._rng.gamma(1 / spread, spread))


def _tables(kinds: Sequence[Kind], default_steps: int) -> dict[int, Tableau]:
    """A table for each number of steps that may be taken."""
    steps = {default_steps}
    for kind in kinds:
        low, high = kind.fields.get("min_steps"), kind.fields.get("max_steps")
        if low is not None or high is not None:
            steps |= set(range(int(low or 1), int(high or max(default_steps, int(low or 1))) + 1))
        steps.add(int(kind.fields.get("steps", default_steps)))
    if min(steps) < 1 or max(steps) > MAX_STEPS:
        raise BenchError(f"--mix: steps are 1 to {MAX_STEPS}, got {min(steps)} to {max(steps)}")
    return {number: ddim(karras(number)) for number in sorted(steps)}


def _wanted(kind: Kind, tables: dict[int, Tableau], default_steps: int) -> list[Tableau]:
    """The tables of a kind of requests, the best first."""
    low, high = kind.fields.get("min_steps"), kind.fields.get("max_steps")
    if low is None and high is None:
        return [tables[int(kind.fields.get("steps", default_steps))]]
    low = int(low or 1)
    return [tables[number] for number in range(int(high or max(default_steps, low)), low - 1, -1)]


def _student(tables: dict[int, Tableau], default_steps: int) -> Bundle:
    """A student of one pixel: an engine that runs it does all its work, and moves next to nothing."""
    manifest = Manifest.model_validate(
        {
            "format": 1, "name": "simulated", "version": "1", "description": "", "sample_shape": (1, 1, 1),
            "path": "ve", "output": {"type": "x0"}, "licence": "", "provenance": {}, "metrics": {},
            "default_tableau": {"solver": "ddim", "num_steps": default_steps}, "files": {NETWORK: "0" * 64},
        }
    )  # fmt: skip
    return Bundle(manifest, Path("simulated"), {("ddim", steps): table for steps, table in tables.items()})
