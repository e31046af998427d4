"""Does the simulation that plans replicas agree with a server: the same requests at the same times, on both.

    python benchmarks/capacity.py --json docs/results/capacity.json

``simulated``: a server with the **simulated** accelerator of 40 + n ms a call, asked by HTTP. ``student``: the embedded
student on one thread of the CPU. Each is measured as `fewstep capacity URL` does, by closed loops; the
simulation knows these figures and nothing else. Then come the loads of `LOADS`, their rates as shares of what full
calls would do, each on the server and in the simulation; the p50 and the p99 of the two are compared. A round
measures anew.

On a machine that is shared the cost of a call is not the same from one minute to the next, least of all the student's.
So there are two comparisons: ``before``, with the cost as it was measured, and ``during``, with that line stretched to
the mean time of a call in the very run. Every round is in the file, with the medians of the differences.

``million``: the number of replicas for a million requests a minute, and the CPU time it took to find it.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from server import serving

from fewstep.bench.capacity import attempt, latencies_ms, measured, most_of, needed
from fewstep.bench.report import machine
from fewstep.bench.run import address_of, bench
from fewstep.bench.simulation import Replica, Routing, simulate
from fewstep.bench.workload import Workload, workload
from fewstep.runtime.simulated import Cost

MIX = "steps=1:0.3, steps=4:0.4, steps=8:0.3"  # the median is well inside a kind, not on the jump between two
LOADS: dict[str, tuple[float, dict[str, Any]]] = {  # by name: share of the most, and what else
    "poisson, half": (0.5, {}),
    "poisson, three quarters": (0.75, {}),
    "bursts of 12, half": (0.5, {"arrivals": "burst", "burst": 12}),
    "closed loop, 24 clients": (0.0, {"clients": 24}),
}
PERCENTILES = ("p50", "p99")
FLAGS = {"simulated": ("--simulate", "40+1"), "student": ("--threads", "1")}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load")
    parser.add_argument("--server", action="append", choices=[*FLAGS], help="all of them, when left out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    flags = {name: more for name, more in FLAGS.items() if not options.server or name in options.server}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in flags}
    for number in range(options.rounds):
        for name, more in flags.items():
            with serving("--no-grpc", *more) as (url, *_):
                rounds[name].append(one_round(url, options.seconds, number))
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/capacity.py", *sys.argv[1:]]),
        "machine": machine(),
        "mix": MIX,
        "seconds": options.seconds,
        "median_off": {name: medians(held) for name, held in rounds.items()},
        **({} if options.server else {"million": million()}),
        "rounds": rounds,
    }
    print(json.dumps({name: result[name] for name in result if name != "rounds"}, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def one_round(url: str, seconds: float, seed: int) -> dict[str, Any]:
    """A server measured, and each load on it and in the simulation."""
    address = address_of(url)
    replica = measured(address, workload(MIX, rate=1))
    most = most_of(workload(MIX, rate=1), replica)
    held: dict[str, Any] = {"replica": dataclasses.asdict(replica), "most_per_s": most, "loads": {}}
    for name, (share, more) in LOADS.items():
        load = workload(MIX, rate=share * most or None, warmup_s=3, seconds=seconds, seed=seed, **more)
        made = bench(address, load, is_quiet=True)
        server, real = made["server"], made["total"]["latency_ms"]
        slower = server["ms_per_call"] / 1000 / replica.cost.seconds(server["rows_per_call"])
        cost = Cost(replica.cost.call_ms * slower, replica.cost.row_ms * slower)
        told = {
            "before": percentiles(load, replica),
            "during": percentiles(load, dataclasses.replace(replica, cost=cost)),
        }
        held["loads"][name] = {
            "rate": load.rate, "requests": made["total"]["requests"], "errors": made["total"]["errors"],
            "generator_late_p99_ms": made["generator"]["late_p99_ms"],
            "calls_slower_than_measured_before": slower - 1,
            "server_ms": {p: real[p] for p in PERCENTILES},
            "simulation_ms": told,
            "off": {when: {p: one[p] / real[p] - 1 for p in PERCENTILES} for when, one in told.items()},
        }  # fmt: skip
        print(name, held["loads"][name]["server_ms"], slower, held["loads"][name]["off"], flush=True)
    return held


def percentiles(load: Workload, replica: Replica) -> dict[str, float]:
    """The simulation's, of the requests that the report of a server counts."""
    records = simulate(load, replica, 1)
    latency = latencies_ms(load, records)
    meant = records.meant[records.meant >= load.warmup_s]
    found = np.percentile(latency[meant < load.warmup_s + load.seconds], [float(p[1:]) for p in PERCENTILES])
    return dict(zip(PERCENTILES, found.tolist(), strict=True))


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """By load, by when the cost was measured, and by percentile: over the rounds."""
    return {
        name: {
            when: {p: statistics.median(one["loads"][name]["off"][when][p] for one in rounds) for p in PERCENTILES}
            for when in ("before", "during")
        }
        for name in LOADS
    }


def million() -> dict[str, Any]:
    """How many replicas of an accelerator answer a million requests a minute within half a second."""
    load, replica = workload(MIX, rate=1e6 / 60), Replica(Cost(40, 1), 32)
    held: dict[str, Any] = {}
    routings: tuple[Routing, ...] = ("least-loaded", "random")
    for routing in routings:
        start_s = time.process_time()
        trials = list(needed(load, replica, 500, routing))
        took_s = time.process_time() - start_s
        best = min((one for one in trials if one.p99_ms <= 500), key=lambda one: one.replicas)
        held[routing] = {**dataclasses.asdict(best), "simulations": len(trials), "cpu_s": took_s}
    half = attempt(load, replica, 2 * held["random"]["replicas"], "random")
    return {"rate": load.rate, "cost": str(replica.cost), "max_rows": replica.max_rows, "p99_ms": 500, **held,
            "random, twice as many": dataclasses.asdict(half)}  # fmt: skip


if __name__ == "__main__":
    main()
