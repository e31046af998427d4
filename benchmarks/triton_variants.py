"""The variants of a student on Triton server, and `fewstep serve` beside them, under the same loads in one run.

    python benchmarks/triton_variants.py --json docs/results/triton.json

Two loads over gRPC: an open loop of requests with 1, 4 and 8 steps (`fewstep bench`, time from when a request was
meant to be sent) and a closed loop of the same. Two more by NVIDIA's `perf_analyzer` over HTTP, with the same number of
requests under way: the same mix, and four steps each, which is all that a graph has. It asks through
`without_sequences`, every arm alike, so that `iterative` reschedules. The CPU time of an image is that of the server's
processes over the requests that went through there.

The servers run side by side, and only one is asked at a time; the arms take turns in each round, and the figures are
medians over the rounds. `--add` adds rounds to those of the file. The graph needs an onnxruntime backend in the Triton
server, see docs/triton.md; where there is none it is left out, and said so.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server import serving

from fewstep.bench.observer import ProcessTree, listener
from fewstep.bench.report import machine
from fewstep.deploy.perf_analyzer import perf_analyzer, without_sequences
from fewstep.deploy.triton_graph import graph_inputs, write_graph_model
from fewstep.deploy.triton_repository import VARIANTS, write_model
from fewstep.deploy.triton_server import Environment, running
from fewstep.runtime import Bundle, Request

MIX = "steps=1:0.3, steps=4:0.4, steps=8:0.3"
STEPS = (1, 4, 8, 4, 1, 4, 8, 4, 1, 8, 4, 1, 4, 8, 4, 1, 4, 8, 4, 1, 8)  # 21: nothing in common with the clients
MIXED = [{"STEPS": [steps], "LABEL": [i % 10], "SEED": [i]} for i, steps in enumerate(STEPS)]
FIXED = [{**one, "STEPS": [4]} for one in MIXED]
GRAPH = "graph"
Figures = dict[str, float]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default=None, help="a folder or an embedded name; the embedded student")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="of each load")
    parser.add_argument("--rate", type=float, default=30, help="requests a second of the open loop")
    parser.add_argument("--clients", type=int, default=16, help="of the closed loops")
    parser.add_argument("--threads", type=int, default=1, help="of one network call")
    parser.add_argument("--environment", type=Path, help="folder of the Triton server; in the user's cache")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--add", action="store_true", help="to the rounds of that file")
    options = parser.parse_args()

    bundle = Bundle.load(options.bundle)
    environment = Environment(options.environment.absolute()) if options.environment else Environment.default()
    environment.make()
    rounds: list[dict[str, dict[str, Figures]]] = []
    if options.add:
        rounds = json.loads(options.json.read_text())["rounds"]
    with tempfile.TemporaryDirectory() as place:
        repository = Path(place) / "repository"
        for variant in VARIANTS:
            write_model(bundle, repository, variant=variant, name=variant, threads=options.threads)
        tableau = bundle.tableau(None, 4)
        if environment.has_backend("onnxruntime"):
            write_graph_model(bundle, repository, steps=4, name=GRAPH, threads=options.threads)
        else:
            print("no onnxruntime backend: the graph is left out")
        requests = [Request(one["SEED"][0], tableau, one["LABEL"][0]) for one in FIXED]
        given = graph_inputs(bundle, tableau, requests)
        of_graph: list[dict[str, Any]] = [
            {
                name: {"content": array[i].ravel().tolist(), "shape": list(array[i].shape) or [1]}
                for name, array in given.items()
            }
            for i in range(len(requests))
        ]
        log = Path(place) / "log"
        with (
            running(environment, repository, log) as triton,
            serving(bundle.path, "--grpc-port", "0", "--threads", str(options.threads)) as ours,
        ):
            arms: dict[str, tuple[tuple[str, str], str]] = {
                "standalone": ((ours.url.removeprefix("http://"), ours.grpc), bundle.name)
            }
            arms |= {variant: (triton, variant) for variant in VARIANTS}
            if (repository / GRAPH).exists():
                arms[GRAPH] = triton, GRAPH
            for i in range(options.rounds):
                first = len(rounds) % len(arms)
                order = [*arms][first:] + [*arms][:first]
                made: dict[str, dict[str, Figures]] = {}
                for arm in order:
                    (http, grpc), model = arms[arm]
                    made[arm] = {}
                    if arm != GRAPH:
                        made[arm] = {
                            "open": bench(grpc, model, options.seconds, "--rate", str(options.rate)),
                            "closed": bench(grpc, model, options.seconds, "--clients", str(options.clients)),
                            "perf_analyzer": analyzed(environment, http, model, MIXED, options.clients),
                        }
                    fixed = of_graph if arm == GRAPH else FIXED
                    made[arm]["perf_analyzer, 4 steps"] = analyzed(environment, http, model, fixed, options.clients)
                    told = {load: {k: round(v, 1) for k, v in each.items()} for load, each in made[arm].items()}
                    print(f"round {i + 1}, {arm}: {told}", flush=True)
                rounds.append({arm: made[arm] for arm in arms})
                if options.json:
                    write(options, bundle, rounds)
    for arm, loads in medians(rounds).items():
        print(arm, {load: {k: round(v, 1) for k, v in each.items()} for load, each in loads.items()})


def medians(rounds: list[dict[str, dict[str, Figures]]]) -> dict[str, dict[str, Figures]]:
    """By arm and load, over the rounds."""
    return {
        arm: {
            load: {name: statistics.median(one[arm][load][name] for one in rounds) for name in rounds[0][arm][load]}
            for load in rounds[0][arm]
        }
        for arm in rounds[0]
    }


def write(options: argparse.Namespace, bundle: Bundle, rounds: list[dict[str, dict[str, Figures]]]) -> None:
    """All that is known after a round."""
    command = [one for one in sys.argv[1:] if one not in ("--environment", str(options.environment))]
    result = {
        "command": "python benchmarks/triton_variants.py " + " ".join(command),
        "machine": machine(),
        "triton": "2.51.0, nvidia-pytriton 0.7.0",
        "bundle": bundle.name,
        "threads": options.threads,
        "mix": MIX,
        "rate": options.rate,
        "clients": options.clients,
        "seconds": options.seconds,
        "medians": medians(rounds),
        "rounds": rounds,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")


def analyzed(
    environment: Environment, address: str, model: str, inputs: Sequence[dict[str, Any]], clients: int
) -> Figures:
    """One run of `perf_analyzer`."""
    pid = listener(address)
    assert pid is not None
    server = ProcessTree(pid)
    with without_sequences(address) as relay:
        cpu_s = server.cpu_s()
        seen = perf_analyzer(environment, relay.address, model, inputs, protocol="http", clients=clients)
        cpu_s = server.cpu_s() - cpu_s
    return {**asdict(seen), "cpu_ms_per_image": 1000 * cpu_s / relay.inferences}


def bench(address: str, model: str, seconds: float, *load: str) -> Figures:
    """One run of `fewstep bench`."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "report.json"
        command = [sys.executable, "-m", "fewstep", "bench", "run", f"grpc://{address}", "--model", model]
        command += ["--mix", MIX, "--seconds", str(seconds), "--json", str(file), *load]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (report,) = json.loads(file.read_text())["rounds"]
    total = report["total"]
    figures: Figures = {
        "images_per_s": total["images_per_s"],
        "sample_steps_per_s": total["sample_steps_per_s"],
        "p50_ms": total["latency_ms"]["p50"],
        "p99_ms": total["latency_ms"]["p99"],
        "one_step_p50_ms": next(v for k, v in report["kinds"].items() if "1" in k)["latency_ms"]["p50"],
        "cpu_ms_per_image": report["server"]["cpu_ms_per_image"],
        "errors": float(sum(total["errors"].values())),
    }
    return figures


if __name__ == "__main__":
    main()
