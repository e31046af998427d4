"""How much of the server's CPU time is the network: bare ONNX Runtime over the whole serving process.

    python benchmarks/cpu_efficiency.py --json docs/results/cpu_efficiency.json

Bare: the student's step graph called in a loop at the batch size the server reached, CPU time per image.
Server: the serving process under 32 clients, one image a request, its whole CPU time (from the operating
system) per image. Both alternate in one run; each load is held against the mean of the bare calls before and
after it, since the machine's pace drifts, and the figure is the median of these ratios. 1 would mean that HTTP,
JSON, scheduling, the solver step, noise, PNG and base64 cost nothing. Where the time goes is told by thread: the
event loop is the first of the process, the engine is the one that takes the most, since it runs the network, and
the rest are encoders and those that only wait.
"""

import argparse
import asyncio
import base64
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

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
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=2.5, help="of load in each round")
    parser.add_argument("--threads", type=int, default=1, help="of one network call, in both")
    parser.add_argument("--max-rows", type=int, default=None, help="rows of a call at most; the server's default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    bundle = Bundle.load(options.bundle)
    command = [sys.executable, "-m", "fewstep.cli", "serve", str(bundle.path), "--port", "0"]
    command += ["--threads", str(options.threads)]
    if options.max_rows is not None:
        command += ["--max-rows", str(options.max_rows)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = "http://" + server.stdout.readline().split(" at http://")[1].split()[0].rstrip("/")
        check(url, bundle)
        load(url, bundle, options.clients, 1.0)  # warm
        rows = round(batch_of(url, bundle, lambda: load(url, bundle, options.clients, 1.0)))
        bare = Bare(bundle, rows, options.threads)
        rounds = []
        bare_before_ms = bare.cpu_ms_per_image(options.seconds / 2)
        for _ in range(options.rounds):
            before_s, before = cpu_seconds(server.pid), cpu_by_thread(server.pid)
            images, took_s, latencies = load(url, bundle, options.clients, options.seconds)
            server_ms = 1000 * (cpu_seconds(server.pid) - before_s) / images
            after = cpu_by_thread(server.pid)
            bare_after_ms = bare.cpu_ms_per_image(options.seconds / 2)
            bare_ms, bare_before_ms = (bare_before_ms + bare_after_ms) / 2, bare_after_ms
            taken = {thread: 1000 * (after[thread] - before.get(thread, 0.0)) / images for thread in after}
            loop_ms = taken.pop(server.pid)
            engine_ms = max(taken.values())
            rounds.append({"bare_ms": bare_ms, "server_ms": server_ms, "images_per_s": images / took_s,
                           "p50_ms": 1000 * statistics.median(latencies), "event_loop_ms": loop_ms,
                           "engine_ms": engine_ms, "others_ms": sum(taken.values()) - engine_ms})  # fmt: skip
            print(f"bare {bare_ms:.3f} ms, server {server_ms:.3f} ms an image: {bare_ms / server_ms:.3f}", flush=True)
    finally:
        server.terminate()
        server.wait()
    efficiency = statistics.median(r["bare_ms"] / r["server_ms"] for r in rounds)
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/cpu_efficiency.py", *sys.argv[1:]]),
        "machine": machine(),
        "bundle": bundle.name,
        "clients": options.clients,
        "rows_per_call": rows,
        "cpu_efficiency": round(efficiency, 4),
        "ms_per_image": {
            "network": median(r["bare_ms"] for r in rounds),
            "engine beside the network": median(r["engine_ms"] - r["bare_ms"] for r in rounds),
            "event loop": median(r["event_loop_ms"] for r in rounds),
            "encoder and others": median(r["others_ms"] for r in rounds),
        },
        "rounds": rounds,
    }
    print(", ".join(f"{part} {value:.3f} ms an image" for part, value in result["ms_per_image"].items()))
    print(f"CPU efficiency {efficiency:.3f} at {options.clients} clients, {rows} rows a call")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


class Bare:
    """The network alone."""

    def __init__(self, bundle: Bundle, rows: int, threads: int) -> None:
        self.steps = bundle.manifest.default_tableau.num_steps
        self.rows = rows
        self.backend = OnnxBackend(bundle.network, rows, bundle.manifest.sample_shape, threads)
        rng = np.random.default_rng(0)
        self.backend.inputs["x"][:] = rng.standard_normal(self.backend.inputs["x"].shape)
        self.backend(rows)

    def cpu_ms_per_image(self, seconds: float) -> float:
        """CPU time of one image's network calls."""
        calls, start_s, end_s = 0, time.process_time(), time.perf_counter() + seconds
        while time.perf_counter() < end_s:
            self.backend(self.rows)
            calls += 1
        return 1000 * (time.process_time() - start_s) / (calls * self.rows) * self.steps


def load(url: str, bundle: Bundle, clients: int, seconds: float) -> tuple[int, float, list[float]]:
    """Closed-loop load: images made, seconds taken, latency of each request.

    One thread with the benchmark's own client, since every CPU cycle and cache line of a client on the same machine is
    one that the server does not have.
    """
    latencies: list[float] = []
    prompt = bundle.manifest.labels.names[0] if bundle.manifest.labels else ""
    start_s = time.perf_counter()

    async def client(http: HttpClient, number: int) -> None:
        body = json.dumps({"prompt": prompt, "seed": number}).encode()
        while (asked_s := time.perf_counter()) < start_s + seconds:
            answer = await http.request("POST", IMAGES, body)
            assert answer.status == 200, answer.body
            latencies.append(time.perf_counter() - asked_s)

    async def clients_together() -> None:
        http = HttpClient(url)
        await asyncio.gather(*(client(http, number) for number in range(clients)))
        http.close()

    asyncio.run(clients_together())
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
    """To the microsecond."""
    return round(statistics.median(values), 3)


def cpu_by_thread(pid: int) -> dict[int, float]:
    """Seconds on a core of each thread of a process, from the kernel, by the thread's number."""
    return {int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9
            for task in Path(f"/proc/{pid}/task").iterdir()}  # fmt: skip


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all threads, from the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
