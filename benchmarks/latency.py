"""What the protocols add to a call in the process, and how near step-level batching comes to the ceiling.

    python benchmarks/latency.py --json docs/results/latency.json

``added``: one client, one image of four steps at a time, in the process, over OpenAI's HTTP, the Open Inference
Protocol and gRPC, taking turns; what is added is the difference of medians within a round. The network runs on one
thread everywhere, and the answer is encoded in the last three only, which is part of what they add. ``empty_ms`` is a
call that only asks whether the server lives: the connection and the wake-ups of both processes on this machine.

``ceiling``: a mix of 1, 4 and 16 steps on the **simulated** accelerator (40 + n ms a call, 32 rows) in a closed loop
with 128 clients, over the images a second that full calls would give; and the one-step requests' latency in an open
loop at half of that ceiling.
"""

import argparse
import asyncio
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.bench.http_client import HttpClient
from fewstep.bench.report import Round, machine
from fewstep.bench.run import address_of, bench
from fewstep.bench.workload import Kind, workload
from fewstep.runtime import Bundle
from fewstep.runtime.bundle import add_tables
from fewstep.runtime.schedules import karras
from fewstep.runtime.simulated import Cost
from fewstep.runtime.solvers import ddim

MIX = {1: 0.5, 4: 0.3, 16: 0.2}  # share of the requests by number of steps
ROWS = 32
CLIENTS = 128


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each load; simulated ones take five times that")
    parser.add_argument("--simulate", default="40+1")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/latency.py", *sys.argv[1:]]),
        "machine": machine(),
        "added": added(options.rounds, options.seconds),
        "ceiling": ceiling(options.simulate, 5 * options.seconds),
    }
    print(json.dumps({name: result[name] for name in ("added", "ceiling")}, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def added(rounds: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Median latency by protocol, and what it is above the call in the process, in milliseconds."""
    bundle = Bundle.load()
    load = workload(clients=1, seconds=seconds)
    load = replace(load, kinds=(Kind("steps=4", 1.0, {"steps": 4, "prompt": "Sneaker"}),))
    medians: dict[str, list[float]] = {}
    empty: dict[str, list[float]] = {}
    with served(bundle.path, "--threads", "1", grpc=True) as (url, grpc_url):
        addresses = {
            "in-process": address_of(bundle.name, "in-process", threads=1),
            "openai": address_of(url, "openai"),
            "http": address_of(url, "http", model=bundle.name),
            "grpc": address_of(grpc_url, "grpc", model=bundle.name),
        }
        for _ in range(rounds):
            for name, address in addresses.items():
                medians.setdefault(name, []).append(p(bench(address, load, is_quiet=True), "steps=4", "p50"))
            for name, taken_ms in asyncio.run(empty_calls(url, grpc_url)).items():
                empty.setdefault(name, []).append(taken_ms)
    result: dict[str, dict[str, Any]] = {}
    for name, each in medians.items():
        over = [a - b for a, b in zip(each, medians["in-process"], strict=True)]
        result[name] = {"p50_ms": statistics.median(each), "added_ms": statistics.median(over), "rounds_ms": over}
        if name in empty:
            result[name]["empty_ms"] = statistics.median(empty[name])
    return result


async def empty_calls(url: str, grpc_url: str, num: int = 100) -> dict[str, float]:
    """Medians of a call without work, with the pauses that a network of 15 ms makes; in milliseconds."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    client = HttpClient(url, {}, None)
    async with grpc.aio.insecure_channel(grpc_url.removeprefix("grpc://")) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "http": lambda: client.request("GET", "/v2/health/live"),
            "grpc": lambda: stub.ServerLive(service_pb2.ServerLiveRequest()),
        }
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(num):
            for name, call in calls.items():
                await asyncio.sleep(0.015)
                start_s = time.perf_counter()
                await call()
                taken[name].append(1000 * (time.perf_counter() - start_s))
    client.close()
    return {name: statistics.median(each) for name, each in taken.items()}


def ceiling(simulate: str, seconds: float) -> dict[str, Any]:
    """Throughput over that of full calls, and the latency of one step at half of it."""
    cost = Cost.parse(simulate)
    steps = sum(number * share for number, share in MIX.items())
    most = ROWS / cost.seconds(ROWS) / steps  # images a second
    kinds = tuple(Kind(f"steps={n}", share, {"steps": n, "prompt": "Sneaker"}) for n, share in MIX.items())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(Bundle.load().path, Path(folder) / "student"))
        add_tables(path, [ddim(karras(16))])
        with served(path, "--simulate", simulate, "--max-rows", str(ROWS)) as (url, _):
            address = address_of(url, "openai")
            full = replace(workload(clients=CLIENTS, seconds=seconds, warmup_s=5.0), kinds=kinds)
            half = replace(workload(rate=most / 2, seconds=seconds, warmup_s=5.0), kinds=kinds)
            at_full, at_half = (bench(address, load, is_quiet=True) for load in (full, half))
    # The mix that was drawn, not the one that was meant: in half a minute they differ by some per cent.
    made = at_full["total"]["sample_steps_per_s"]
    return {
        "simulated": str(cost),
        "sample_steps_per_s": made,
        "of_the_ceiling": made / (ROWS / cost.seconds(ROWS)),
        "rate_at_half": most / 2,
        "one_step_p50_ms": p(at_half, "steps=1", "p50"),
        "one_step_p99_ms": p(at_half, "steps=1", "p99"),
    }


def p(one: Round, kind: str, percentile: str) -> float:
    """A percentile of the latency of a kind of requests, in milliseconds."""
    milliseconds: float = one["kinds"][kind]["latency_ms"][percentile]
    return milliseconds


@contextmanager
def served(bundle: Path, *flags: str, grpc: bool = False) -> Iterator[tuple[str, str]]:
    """A server: its URL, and that of its gRPC."""
    more = ["--grpc-port", "0"] if grpc else ["--no-grpc"]
    command = [sys.executable, "-m", "fewstep.cli", "serve", str(bundle), "--port", "0", *more, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        url = re.search(r"http://[\d.:]+", said)
        grpc_url = re.search(r"gRPC at ([\d.:]+)", said)
        assert url, said
        yield url[0], f"grpc://{grpc_url[1]}" if grpc_url else ""
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
