"""``fewstep capacity``: what is typed in, and what is told."""

import json
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..runtime.simulated import Cost
from .capacity import CELL, PERCENT, Trial, attempt, measured, most_of, needed, rate_of
from .errors import BenchError
from .report import Round
from .run import address_of
from .simulation import ROUTINGS, Replica, Routing
from .workload import Workload, workload

FORMAT = 1
_COST = re.compile(r"[\d.]+(\+[\d.]*)?")


def plan(
    target: str,
    *,
    rate: float | None,
    p99_ms: float | None,
    replicas: int | None,
    mix: str | None,
    arrivals: str,
    burst: int,
    deadline_ms: float | None,
    routing: str,
    max_rows: int | None,
    max_waiting: int,
    overhead_ms: float | None,
    measure_s: float,
    model: str | None,
    key: str | None,
    cafile: Path | None,
    threads: int | None,
    seed: int,
    json_file: Path | None,
) -> None:
    """Find how many replicas a load needs, and print it; the arguments are the command's.

    Raises:
        BenchError: a value is not allowed, the target cannot be measured, or no number of replicas would do.
    """
    if (p99_ms is None) == (replicas is None):
        raise BenchError(
            "--p99-ms: say the latency that is wanted, or --replicas to see that of so many; one of the two"
        )
    if p99_ms is not None and not p99_ms > 0:
        raise BenchError(f"--p99-ms: {p99_ms:g} must be more than 0")
    chosen: Routing | None = next((one for one in ROUTINGS if one == routing), None)
    if chosen is None:
        raise BenchError(f"--routing: {routing!r} is not one of {', '.join(ROUTINGS)}")
    load = workload(mix, rate=rate, arrivals=arrivals, burst=burst, deadline_ms=deadline_ms, seed=seed)
    if load.trace:
        rate = rate or rate_of(load)
        load = replace(load, rate=rate, warmup_s=0.0, seconds=len(load.trace) / rate + 1e-6)
    rate_of(load)
    told = Console(stderr=True)
    if _COST.fullmatch(target):
        replica = Replica(Cost.parse(target), max_rows or 16, max_waiting)
    else:
        address = address_of(target, model=model, key=key, cafile=cafile, max_rows=max_rows or 16, threads=threads)
        told.print(f"Measuring {target}: three loads, each three times {measure_s:g} s")
        replica = measured(
            address,
            load,
            seconds=measure_s,
            max_rows=max_rows,
            max_waiting=max_waiting,
            on_round=lambda made: _tell(told, made),
        )
    if overhead_ms is not None:
        replica = replace(replica, overhead_ms=overhead_ms)
    start_s, trials = time.process_time(), []
    tried = needed(load, replica, p99_ms, chosen) if p99_ms is not None else _one(load, replica, replicas or 1, chosen)
    with told.status("Simulating") as status:
        for trial in tried:
            trials.append(trial)
            status.update(f"Simulated {trial.replicas} replicas: p99 {_ms(trial.p99_ms)} ms")
    cpu_s = time.process_time() - start_s
    kept = min((one.replicas for one in trials if p99_ms is not None and one.p99_ms <= p99_ms), default=None)
    _show(load, replica, trials, chosen, p99_ms, kept, cpu_s)
    if json_file is not None:
        made = {
            "fewstep_capacity": FORMAT, "target": target, "replica": asdict(replica), "load": load.describe(),
            "routing": chosen, "p99_ms": p99_ms, "replicas": kept, "trials": [_finite(asdict(one)) for one in trials],
            "cpu_s": cpu_s,
        }  # fmt: skip
        try:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(made, indent=1) + "\n", "utf-8")
        except OSError as error:
            raise BenchError(f"--json: {json_file}: {error.strerror}") from None


def _one(load: Workload, replica: Replica, replicas: int, routing: Routing) -> list[Trial]:
    return [attempt(load, replica, replicas, routing)]


def _tell(console: Console, made: Round) -> None:
    server, total = made["server"], made["total"]
    console.print(
        f"  clients: {made['load']['clients']}; images/s: {total['images_per_s']:.1f}; "
        f"rows a call: {server['rows_per_call']:.2f}; ms a call: {server['ms_per_call']:.2f}"
    )


def _show(
    load: Workload, replica: Replica, trials: list[Trial], routing: Routing, p99_ms: float | None, kept: int | None,
    cpu_s: float,
) -> None:  # fmt: skip
    console = Console()
    grid = Table(show_header=False, box=None, pad_edge=False)
    noise = f", {replica.deviation_ms:.3g} ms from that in the mean" if replica.deviation_ms else ""
    cost = f"{replica.cost.call_ms:.4g} + {replica.cost.row_ms:.4g} n ms for a call on n rows{noise}; "
    cost += f"{replica.between_ms:.3g} ms between two; " if replica.between_ms else ""
    cost += f"{replica.max_rows} rows; {replica.overhead_ms:.3g} ms a request beside them"
    told = load.describe()
    burst = f" of {told['burst']}" if "burst" in told else ""
    arrivals = "as recorded" if load.trace else told["arrivals"]
    kinds = ", ".join(kind.name for kind in load.kinds)
    if kinds == "all":
        kinds = f"{replica.default_steps} steps each"
    for name, text in (
        ("replica", cost),
        ("at most", f"{most_of(load, replica):.4g} requests/s of this mix, all calls full"),
        ("load", f"{rate_of(load):.6g} requests/s, {arrivals}{burst}: {kinds}"),
        ("routing", routing),
        ("simulated", f"the engine's own scheduler, up to {CELL} replicas, in {cpu_s:.1f} s of CPU"),
    ):
        grid.add_row(name, text)
    table = Table("replicas", "load", "p50 ms", "p99 ms", "not answered", box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for one in sorted(trials, key=lambda one: one.replicas):
        is_kept = one.replicas == kept
        row = (str(one.replicas), f"{100 * one.utilisation:.0f} %", _ms(one.p50_ms), _ms(one.p99_ms))
        table.add_row(*row, f"{100 * one.unanswered:.2g} %", style="bold" if is_kept else None)
    console.print(grid)
    console.print(table)
    if kept is not None:
        plural = "s" if kept > 1 else ""
        console.print(f"[bold]{kept} replica{plural}[/] answer {PERCENT} % of the requests within {p99_ms:g} ms")


def _ms(milliseconds: float) -> str:
    return "never" if milliseconds == float("inf") else f"{milliseconds:.4g}"


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity."""
    return {name: None if value == float("inf") else value for name, value in fields.items()}
