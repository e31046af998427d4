"""How much of the server's CPU time is the network: bare ONNX Runtime over the whole serving process.

    python benchmarks/cpu_efficiency.py --json docs/results/cpu_efficiency.json

Bare: the student's step graph called in a loop at the batch size the server reached, CPU time per image.
Server: the serving process under 32 clients, one image a request, its whole CPU time (from the operating
system) per image. Both alternate in one run; each load is held against the mean of the bare calls before and
after it, since the machine's pace drifts, and the figure is the median of these ratios. Both are processes that are
launched several times, since where the system puts a process's memory makes its network some hundredths faster or
slower for as long as it lives. 1 would mean that HTTP, JSON, scheduling, the solver step, noise, PNG and base64 cost
nothing. Where the time goes is told by thread: the event loop is the first of the process, the engine is the one that
takes the most, since it runs the network, and the rest are encoders and those that only wait.

What is not the network is Python, so it counts how the interpreter was compiled: ``--python`` takes several, each of
an environment with fewstep, and serves with each by turns. So does ``--max-rows``, since much of it is paid once a
network call.
"""

import argparse
import asyncio
import base64
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np
from server import serving

from fewstep.bench.http_client import HttpClient
from fewstep.bench.observer import counts
from fewstep.bench.report import machine
from fewstep.runtime import Bundle, Engine, Request
from fewstep.runtime.backends import OnnxBackend
from fewstep.runtime.pictures import encode

IMAGES = "/v1/images/generations"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default=None, help="a folder or an embedded name; the embedded student")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--launches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6, help="of each launch")
    parser.add_argument("--seconds", type=float, default=2.5, help="of load in each round")
    parser.add_argument("--threads", type=int, default=1, help="of one network call, in both")
    parser.add_argument("--max-rows", type=int, nargs="+", default=[16], help="rows of a call at most, by turns")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters that serve; this one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    if options.launches * options.rounds < 2:
        parser.error("--rounds: two at least, over all launches: the figure is told with its quartiles")
    if min(options.max_rows) < 1:
        parser.error(f"--max-rows: {min(options.max_rows)}, must be at least 1")

    bundle = Bundle.load(options.bundle)
    variants = list(product(options.python, options.max_rows))
    rounds: list[list[dict[str, float]]] = [[] for _ in variants]
    for launch in range(options.launches):
        with ExitStack() as stack:
            servers = []
            for python, max_rows in variants:
                arguments = [str(bundle.path), "--threads", str(options.threads), "--max-rows", str(max_rows)]
                arguments += ["--set", "request_timeout_s=600"]  # connections stay open while others have their turn
                url, pid, _ = stack.enter_context(serving(*arguments, python=python))
                check(url, bundle)
                clients = stack.enter_context(Clients(url, bundle, options.clients))
                clients.load(1.0)  # warm
                rows = round(batch_of(url, bundle, partial(clients.load, 1.0)))
                servers.append((pid, clients, rows))
            bare = stack.enter_context(Bare(bundle, max(options.max_rows), options.threads))
            turns = list(zip(servers, rounds, strict=True))
            for i in range(options.rounds):
                for (pid, clients, rows), its in turns if i % 2 else turns[::-1]:
                    before_ms = bare.cpu_ms_per_image(rows, options.seconds / 2)
                    served = loaded(pid, clients, options.seconds)
                    bare_ms = (before_ms + bare.cpu_ms_per_image(rows, options.seconds / 2)) / 2
                    its.append({"launch": launch, "rows_per_call": rows, "bare_ms": bare_ms, **served})
                    told = f"bare {bare_ms:.3f} ms, server {served['server_ms']:.3f} ms an image"
                    print(f"{told}: {bare_ms / served['server_ms']:.3f}", flush=True)
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/cpu_efficiency.py", *sys.argv[1:]]),
        "machine": machine(),
        "bundle": bundle.name,
        "clients": options.clients,
        "servers": [
            {"python": version(python), "max_rows": max_rows, **summary(its), "rounds": its}
            for (python, max_rows), its in zip(variants, rounds, strict=True)
        ],
    }
    for server in result["servers"]:
        print(f"Python {server['python']}, {server['max_rows']} rows a call at most")
        print("  " + ", ".join(f"{part} {value:.3f} ms an image" for part, value in server["ms_per_image"].items()))
        told = f"  CPU efficiency {server['cpu_efficiency']:.3f}, half of the rounds {server['quartiles']}"
        print(f"{told}, launches {server['by_launch']}, at {options.clients} clients")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def loaded(pid: int, clients: "Clients", seconds: float) -> dict[str, float]:
    """What a server makes of a load, and what CPU time an image takes in each of its threads."""
    before = cpu_by_thread(pid)
    images, took_s, latencies = clients.load(seconds)
    after = cpu_by_thread(pid)
    taken = {thread: 1000 * (after[thread] - before.get(thread, 0.0)) / images for thread in after}
    server_ms, loop_ms = sum(taken.values()), taken.pop(pid)
    engine_ms = max(taken.values())
    return {
        "server_ms": server_ms,
        "images_per_s": images / took_s,
        "p50_ms": 1000 * statistics.median(latencies),
        "event_loop_ms": loop_ms,
        "engine_ms": engine_ms,
        "others_ms": sum(taken.values()) - engine_ms,
    }


def version(python: str) -> str:
    """What an interpreter says of itself: its version, and when and by what it was compiled."""
    asked = [python, "-c", "import sys; print(' '.join(sys.version.split()))"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """The figure, and where the time of an image goes."""
    ratios = [r["bare_ms"] / r["server_ms"] for r in rounds]
    low, efficiency, high = statistics.quantiles(ratios)
    launches = sorted({r["launch"] for r in rounds})
    return {
        "cpu_efficiency": round(efficiency, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "by_launch": [
            median(ratio for ratio, r in zip(ratios, rounds, strict=True) if r["launch"] == launch)
            for launch in launches
        ],
        "ms_per_image": {
            "network": median(r["bare_ms"] for r in rounds),
            "engine beside the network": median(r["engine_ms"] - r["bare_ms"] for r in rounds),
            "event loop": median(r["event_loop_ms"] for r in rounds),
            "encoder and others": median(r["others_ms"] for r in rounds),
        },
    }


class Bare:
    """The network alone, in a process of its own."""

    def __init__(self, bundle: Bundle, max_rows: int, threads: int) -> None:
        self._ours, theirs = get_context("spawn").Pipe()
        arguments = (theirs, bundle.path, max_rows, threads)
        self._process = get_context("spawn").Process(target=call_the_network, args=arguments, daemon=True)
        self._process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.join()

    def cpu_ms_per_image(self, rows: int, seconds: float) -> float:
        """CPU time of one image's network calls, with so many in each."""
        self._ours.send((rows, seconds))
        took_ms: float = self._ours.recv()
        return took_ms


def call_the_network(
    told: "Connection[float, tuple[int, float]]", bundle_path: Path, max_rows: int, threads: int
) -> None:
    """Call it with the rows and for the seconds that are told, and tell an image's CPU time in ms; again and again."""
    bundle = Bundle.load(bundle_path)
    backend = OnnxBackend(bundle.network, max_rows, bundle.manifest.sample_shape, threads)
    x = backend.inputs["x"]
    x[:] = np.random.default_rng(0).standard_normal(x.shape)
    while True:
        rows, seconds = told.recv()
        backend(rows)
        calls, end_s = 0, seconds + time.perf_counter()
        start_s = time.process_time()
        while time.perf_counter() < end_s:
            backend(rows)
            calls += 1
        took_ms = 1000 * (time.process_time() - start_s) / (calls * rows)
        told.send(took_ms * bundle.manifest.default_tableau.num_steps)


class Clients:
    """Closed-loop load: each client asks for its next image when it has the last one, on a connection that stays open.

    One thread with the benchmark's own client, since every CPU cycle and cache line of a client on the same machine is
    one that the server does not have.
    """

    def __init__(self, url: str, bundle: Bundle, num: int) -> None:
        self._http = HttpClient(url)
        self._num = num
        self._prompt = bundle.manifest.labels.names[0] if bundle.manifest.labels else ""
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()
        self._runner.close()

    def load(self, seconds: float) -> tuple[int, float, list[float]]:
        """Images made, seconds taken, latency of each request."""
        return self._runner.run(self._together(seconds))

    async def _together(self, seconds: float) -> tuple[int, float, list[float]]:
        latencies: list[float] = []
        start_s = time.perf_counter()

        async def client(number: int) -> None:
            body = json.dumps({"prompt": self._prompt, "seed": number}).encode()
            while (asked_s := time.perf_counter()) < start_s + seconds:
                answer = await self._http.request("POST", IMAGES, body)
                assert answer.status == 200, answer.body
                latencies.append(time.perf_counter() - asked_s)

        await asyncio.gather(*map(client, range(self._num)))
        return len(latencies), time.perf_counter() - start_s, latencies


def check(url: str, bundle: Bundle) -> None:
    """The server must make what the engine makes before it is timed."""
    label = 0 if bundle.manifest.labels else None
    (sample,) = Engine(bundle, threads=1).generate([Request(5, bundle.tableau(), label)])
    prompt = bundle.manifest.labels.names[0] if bundle.manifest.labels else ""
    body = json.dumps({"prompt": prompt, "seed": 5}).encode()
    with urllib.request.urlopen(urllib.request.Request(url + IMAGES, body)) as answer:
        image = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
    assert image == encode(sample.to_uint8())


def batch_of(url: str, bundle: Bundle, work: Callable[[], Any]) -> float:
    """Mean rows of a network call while ``work`` runs."""
    before = counts(f"{url}/metrics", bundle.name)
    work()
    after = counts(f"{url}/metrics", bundle.name)
    assert before is not None
    assert after is not None
    done = after.since(before)
    return done.rows / done.calls


def median(values: Iterable[float]) -> float:
    """To three places."""
    return round(statistics.median(values), 3)


def cpu_by_thread(pid: int) -> dict[int, float]:
    """Seconds on a core of each thread of a process, from the kernel, by the thread's number."""
    return {int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9
            for task in Path(f"/proc/{pid}/task").iterdir()}  # fmt: skip


if __name__ == "__main__":
    main()
