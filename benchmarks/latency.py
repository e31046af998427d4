"""What the protocols add to a call in the process, and how near step-level batching comes to the ceiling.

    python benchmarks/latency.py --json docs/results/latency.json

``added``: one image of four steps at a time, in the process, over OpenAI's HTTP, the Open Inference Protocol and gRPC,
by turns from request to request, in an order drawn anew each time. What is added is the median, over the turns, of the
difference to the call in the process of the same turn: what a machine that is shared does for a second, it does to all
of them. The network runs on one thread everywhere, and the answer is encoded in the last three only, which is part of
what they add. The clients block, and do as little as they can: the standard library's HTTP, and gRPC's own stub of
Triton's service. ``empty_ms`` is a call that only asks whether the server lives: the connection and the wake-ups of
both processes on this machine; ``bare_ms`` the same of a gRPC server that has nothing behind it.

``ceiling``: a mix of 1, 4 and 16 steps on the **simulated** accelerator (40 + n ms a call, 32 rows) in a closed loop
with 128 clients, over the images a second that full calls would give; and the one-step requests' latency in an open
loop at half of that ceiling.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import shutil
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
from server import serving

from fewstep.bench.report import Round, machine
from fewstep.bench.run import address_of, bench
from fewstep.bench.workload import Kind, workload
from fewstep.runtime import Bundle, Engine, EngineThread, Request
from fewstep.runtime.bundle import add_tables
from fewstep.runtime.schedules import karras
from fewstep.runtime.simulated import Cost
from fewstep.runtime.solvers import ddim

MIX = {1: 0.5, 4: 0.3, 16: 0.2}  # share of the requests by number of steps
STEPS, PROMPT = 4, "Sneaker"
WARM_UP = 20  # turns
ROUNDS = 3  # of the simulated loads; the middle figures count
ROWS = 32
CLIENTS = 128


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=500, help="requests of each protocol")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each simulated load, three times")
    parser.add_argument("--simulate", default="40+1")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/latency.py", *sys.argv[1:]]),
        "machine": machine(),
        "added": added(options.turns),
        "ceiling": ceiling(options.simulate, options.seconds),
    }
    print(json.dumps({name: result[name] for name in ("added", "ceiling")}, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def added(turns: int) -> dict[str, dict[str, Any]]:
    """Median latency by protocol, and what it is above the call in the process, in milliseconds."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    bundle = Bundle.load()
    model, labels = bundle.name, bundle.manifest.labels
    assert labels is not None
    engine = Engine(bundle, threads=1)
    tableau, label = engine.tableau(None, STEPS), labels.parse(PROMPT)
    thread = EngineThread([engine])
    thread.start()
    with serving("--threads", "1", "--grpc-port", "0") as (url, _, grpc_address):
        http = HTTPConnection(url.removeprefix("http://"))
        http.connect()
        http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channel = grpc.insecure_channel(grpc_address)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=bare_server, args=(theirs,))
        process.start()
        bare_channel = grpc.insecure_channel(ours.recv())
        bare = service_pb2_grpc.GRPCInferenceServiceStub(bare_channel)

        def ask(method: str, path: str, body: Any = None) -> None:
            http.request(method, path, json.dumps(body) if body else None)
            answer = http.getresponse()
            said = answer.read()
            assert answer.status == 200, said

        def in_process(seed: int) -> None:
            engine.submit([Request(seed, tableau, label)])[0].result()

        def openai(seed: int) -> None:
            body = {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": seed}
            ask("POST", "/v1/images/generations", body)

        def kserve(seed: int) -> None:
            values = (("PROMPT", "BYTES", PROMPT), ("STEPS", "INT32", STEPS), ("SEED", "UINT64", seed))
            inputs = [{"name": name, "datatype": kind, "shape": [1], "data": [value]} for name, kind, value in values]
            ask("POST", f"/v2/models/{model}/infer", {"inputs": inputs})

        def kserve_grpc(seed: int) -> None:
            request = service_pb2.ModelInferRequest(model_name=model)
            inputs = [request.inputs.add(name=name, shape=[1]) for name in ("PROMPT", "STEPS", "SEED")]
            for tensor, kind in zip(inputs, ("BYTES", "INT32", "UINT64"), strict=True):
                tensor.datatype = kind
            inputs[0].contents.bytes_contents.append(PROMPT.encode())
            inputs[1].contents.int_contents.append(STEPS)
            inputs[2].contents.uint64_contents.append(seed)
            stub.ModelInfer(request)

        def live(_: int) -> None:
            ask("GET", "/v2/health/live")

        def live_grpc(_: int) -> None:
            stub.ServerLive(service_pb2.ServerLiveRequest())

        def live_bare(_: int) -> None:
            bare.ServerLive(service_pb2.ServerLiveRequest())

        calls = {
            "in-process": in_process, "openai": openai, "http": kserve, "grpc": kserve_grpc,
            "empty http": live, "empty grpc": live_grpc, "empty bare": live_bare,
        }  # fmt: skip
        taken: dict[str, list[float]] = {name: [] for name in calls}
        order, rng = list(calls), random.Random(0)
        for turn in range(-WARM_UP, turns):
            rng.shuffle(order)
            for name in order:
                if name.startswith("empty"):
                    time.sleep(0.015)  # as long as the others wait for the network
                start_s = time.perf_counter()
                calls[name](turn + WARM_UP)
                if turn >= 0:
                    taken[name].append(1000 * (time.perf_counter() - start_s))
        for opened in (http, channel, bare_channel):
            opened.close()
        ours.send("leave")
        process.join()
    thread.stop()
    result: dict[str, dict[str, Any]] = {}
    for name in ("in-process", "openai", "http", "grpc"):
        over = [one - other for one, other in zip(taken[name], taken["in-process"], strict=True)]
        result[name] = {
            "turns": turns, "p50_ms": statistics.median(taken[name]), "added_ms": statistics.median(over),
            "fifths_ms": [statistics.median(part) for part in np.array_split(over, 5)],
        }  # fmt: skip
    for name in ("http", "grpc"):
        result[name]["empty_ms"] = statistics.median(taken[f"empty {name}"])
    result["grpc"]["bare_ms"] = statistics.median(taken["empty bare"])
    return result


def bare_server(connection: Any) -> None:
    """Tells its address, and lives until it is told to leave."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # the stubs are untyped
        async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802  # gRPC's name
            return service_pb2.ServerLiveResponse(live=True)

    async def live() -> None:
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
        connection.send(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        await asyncio.to_thread(connection.recv)
        await server.stop(None)

    asyncio.run(live())


def ceiling(simulate: str, seconds: float) -> dict[str, Any]:
    """Throughput over that of full calls, and the latency of one step at half of it."""
    cost = Cost.parse(simulate)
    steps = sum(number * share for number, share in MIX.items())
    most = ROWS / cost.seconds(ROWS) / steps  # images a second
    kinds = tuple(Kind(f"steps={n}", share, {"steps": n, "prompt": PROMPT}) for n, share in MIX.items())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(Bundle.load().path, Path(folder) / "student"))
        add_tables(path, [ddim(karras(16))])
        with serving(path, "--simulate", simulate, "--max-rows", str(ROWS), "--no-grpc") as (url, *_):
            address = address_of(url, "openai")
            full = replace(workload(clients=CLIENTS, seconds=seconds, warmup_s=3.0), kinds=kinds)
            half = replace(workload(rate=most / 2, seconds=seconds, warmup_s=3.0), kinds=kinds)
            rounds = [tuple(bench(address, load, is_quiet=True) for load in (full, half)) for _ in range(ROUNDS)]
    # The mix that was drawn, not the one that was meant: in half a minute they differ by some per cent.
    made = [at_full["total"]["sample_steps_per_s"] / (ROWS / cost.seconds(ROWS)) for at_full, _ in rounds]
    p50, p99 = ([p(at_half, "steps=1", percentile) for _, at_half in rounds] for percentile in ("p50", "p99"))
    return {
        "simulated": str(cost),
        "of_the_ceiling": statistics.median(made),
        "rate_at_half": most / 2,
        "one_step_p50_ms": statistics.median(p50),
        "one_step_p99_ms": statistics.median(p99),
        "rounds": {"of_the_ceiling": made, "one_step_p50_ms": p50, "one_step_p99_ms": p99},
    }


def p(one: Round, kind: str, percentile: str) -> float:
    """A percentile of the latency of a kind of requests, in milliseconds."""
    milliseconds: float = one["kinds"][kind]["latency_ms"][percentile]
    return milliseconds


if __name__ == "__main__":
    main()
