"""How many replicas a load needs: the smallest number with which a simulation keeps the wanted p99.

A replica's costs are given, or measured by closed loops of the same requests on one of it: a and b are the line through
the mean times of its network calls, what passes between two of them is seen when there is always a next one, and what a
request takes beside them is the overhead. The simulation is `simulation`'s, of
at most `CELL` replicas: of a larger number a cell is simulated, with its share of the requests drawn at random.

A request that is refused or late counts as one that takes forever, so "p99 within 300 ms" means that 99 of 100 requests
are answered, and within 300 ms.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..runtime.simulated import Cost
from .errors import BenchError
from .generator import Records
from .report import Round
from .run import bench
from .simulation import Replica, Routing, simulate
from .targets import Address
from .workload import Kind, Workload

CELL = 16  # replicas that are simulated; more are like these
REQUESTS = 10_000  # that a simulation has at least, on the clock
MOST = 64  # times the replicas that the work alone would need
PERCENT = 99


@dataclass(frozen=True)
class Trial:
    """A number of replicas, and how the load went on them. Milliseconds; infinite: not answered."""

    replicas: int
    utilisation: float  # of what full calls would do
    p50_ms: float
    p99_ms: float
    unanswered: float  # share of the requests: refused, or given up


def needed(load: Workload, replica: Replica, p99_ms: float, routing: Routing = "least-loaded") -> Iterator[Trial]:
    """Try numbers of replicas; the least that keeps to ``p99_ms`` is the smallest tried of those that do.

    Args:
        load: an open loop.
        replica: what each is.
        p99_ms: what 99 % of the requests should keep to.
        routing: see `simulate`.

    Yields:
        The trials, in the order in which they are made; at least one keeps to it.

    Raises:
        BenchError: no number of replicas would do.
    """
    alone_ms = unloaded_ms(load, replica)
    if alone_ms > p99_ms:
        raise BenchError(
            f"--p99-ms: {p99_ms:g} ms are less than the {alone_ms:.4g} ms that a replica takes which has nothing else "
            "to do; ask for fewer steps, or allow more time"
        )
    least = max(1, math.ceil(rate_of(load) / most_of(load, replica)))
    failed, step, replicas = least - 1, max(1, least // 50), least
    while True:
        trial = attempt(load, replica, replicas, routing)
        yield trial
        if trial.p99_ms <= p99_ms:
            break
        if replicas > MOST * least:
            raise BenchError(f"--p99-ms: {p99_ms:g} ms are not kept with {replicas} replicas: {trial.p99_ms:.4g} ms")
        failed, replicas, step = replicas, replicas + step, 2 * step
    kept = replicas
    while kept - failed > max(1, kept // 100):  # nearer than a simulation knows a p99
        replicas = (kept + failed) // 2
        trial = attempt(load, replica, replicas, routing)
        yield trial
        if trial.p99_ms <= p99_ms:
            kept = replicas
        else:
            failed = replicas


def attempt(load: Workload, replica: Replica, replicas: int, routing: Routing = "least-loaded") -> Trial:
    """Simulate a load on some replicas, or on a cell of them."""
    cell = min(replicas, CELL)
    share = cell / replicas
    load = lasting(load, replica, share)
    records = simulate(load, replica, cell, routing, share)
    latency_ms = latencies_ms(load, records)
    p50_ms, p99_ms = np.percentile(latency_ms, (50, PERCENT), method="higher").tolist()
    utilisation = rate_of(load) / most_of(load, replica) / replicas
    return Trial(replicas, utilisation, p50_ms, p99_ms, float(np.isinf(latency_ms).mean()))


def latencies_ms(load: Workload, records: Records) -> NDArray[np.float64]:
    """Of the requests on the clock; infinite where there was no answer."""
    on_clock = records.meant >= load.warmup_s
    if not on_clock.any():
        raise BenchError("--seconds: no request falls into so short a time; allow more, or a higher --rate")
    return np.where(records.error < 0, 1000 * (records.done - records.meant), np.inf)[on_clock]


def lasting(load: Workload, replica: Replica, share: float = 1.0) -> Workload:
    """The load for as long as it takes to know a p99: by the number of requests, since time costs nothing here.

    A trace lasts as long as it does.
    """
    if load.trace:
        return load
    assert load.rate is not None
    unloaded_s = max(_alone_ms(kind, replica) for kind in load.kinds) / 1000
    return replace(load, warmup_s=10 * unloaded_s, seconds=max(30 * unloaded_s, REQUESTS / (load.rate * share)))


def rate_of(load: Workload) -> float:
    """Requests a second."""
    if load.rate is not None:
        return load.rate
    if not load.trace:
        raise BenchError("--rate: needed, the requests a second; or a trace, by --arrivals FILE")
    return len(load.trace) / max(load.trace[-1].at_s, 1e-9)


def most_of(load: Workload, replica: Replica) -> float:
    """Requests a second of one replica whose calls are all full."""
    weights = np.array([kind.weight for kind in load.kinds])
    if load.trace:
        weights = np.bincount([one.kind for one in load.trace], minlength=len(load.kinds)).astype(float)
    rows = np.array([_steps(kind, replica) * kind.num_images for kind in load.kinds])
    a_row_s = replica.period_s(replica.max_rows) / replica.max_rows
    return float(weights.sum() / max(weights @ rows * a_row_s, 1e-12))


def unloaded_ms(load: Workload, replica: Replica) -> float:
    """The p99 on a replica with nothing else to do."""
    alone = np.array([_alone_ms(kind, replica) for kind in load.kinds])
    order = np.argsort(alone)
    share = np.cumsum(np.array([kind.weight for kind in load.kinds])[order])
    return float(alone[order][np.searchsorted(share, PERCENT / 100 * share[-1])])


def _steps(kind: Kind, replica: Replica) -> int:
    """Network calls of an image; the least, where admission chooses."""
    fields = kind.fields
    if "min_steps" in fields or "max_steps" in fields:
        return int(fields.get("min_steps", 1))
    return int(fields.get("steps", replica.default_steps))


def _alone_ms(kind: Kind, replica: Replica) -> float:
    rounds, rest = divmod(kind.num_images, replica.max_rows)
    calls = rounds * replica.period_s(replica.max_rows) + (replica.period_s(rest) if rest else 0.0)
    return replica.overhead_ms + 1000 * _steps(kind, replica) * calls


# --- measuring a replica


def measured(
    address: Address,
    load: Workload,
    *,
    seconds: float = 2.0,
    max_rows: int | None = None,
    max_waiting: int = 1024,
    on_round: Callable[[Round], None] = lambda made: None,
) -> Replica:
    """Measure what a replica costs, by loading one that nobody else uses.

    Args:
        address: a server, or a bundle that runs here.
        load: whose kinds of requests it is asked, without their deadlines.
        seconds: of each loop: one client, a quarter of the rows, and twice as many as there are; three times in turn,
            since a machine that is shared is slower for some time and then quicker.
        max_rows: of the replica to plan with; the measured one's when left out.
        max_waiting: of the replica to plan with.
        on_round: is shown the middle one of each three.

    Raises:
        BenchError: it cannot be measured, or does not tell its network calls.
    """
    plain = Workload(clients=1, warmup_s=0.5, seconds=seconds)
    first = _closed(address, plain)  # warms up, and tells
    have = max_rows or first["server"].get("max_rows")
    if have is None:
        raise BenchError(f"{address.target}: does not tell its rows: give --max-rows")
    mixed = replace(plain, kinds=tuple(map(_without_deadline, load.kinds)), seed=load.seed)
    loops = (plain, replace(mixed, clients=max(2, have // 4)), replace(mixed, clients=2 * have))
    passes = [[_closed(address, loop) for loop in loops] for _ in range(3)]
    alone, some, full = (sorted(made, key=_ms_per_call)[1] for made in zip(*passes, strict=True))
    for made in (alone, some, full):
        on_round(made)
    rows = np.array([made["server"]["rows_per_call"] for made in (alone, some, full)])
    steps = alone["total"]["sample_steps_per_s"] / alone["total"]["images_per_s"]
    between_ms = _ms_per_call(full) * (1 / full["server"]["busy"] - 1)
    return Replica(
        line(rows, np.array([_ms_per_call(made) for made in (alone, some, full)])),
        have,
        max_waiting,
        max(0.0, alone["total"]["latency_ms"]["mean"] - steps * _ms_per_call(alone) - (steps - 1) * between_ms),
        full["server"]["call_deviation_ms"] or 0.0,
        max(0.0, between_ms),
        round(steps),
    )


def line(rows: NDArray[np.float64], took_ms: NDArray[np.float64]) -> Cost:
    """The line of least squares through times of calls; neither part is negative."""
    row_ms, call_ms = np.polyfit(rows, took_ms, 1).tolist() if np.ptp(rows) > 1e-6 else (0.0, float(took_ms.mean()))
    if row_ms <= 0:
        return Cost(float(took_ms.mean()), 0.0)
    return Cost(call_ms, row_ms) if call_ms >= 0 else Cost(0.0, float(rows @ took_ms / (rows @ rows)))


def _without_deadline(kind: Kind) -> Kind:
    return replace(kind, fields={name: value for name, value in kind.fields.items() if name != "deadline_ms"})


def _ms_per_call(made: Round) -> float:
    return float(made["server"]["ms_per_call"])


def _closed(address: Address, loop: Workload) -> Round:
    made = bench(address, loop, is_quiet=True)
    if not made["server"].get("ms_per_call"):
        raise BenchError(
            f"{address.target}: does not tell at /metrics what its network calls take; give the cost, such as 40+1"
        )
    if not made["total"]["sample_steps_per_s"]:
        raise BenchError(f"{address.target}: does not tell the steps of a request that names none, by /v1/models")
    return made
