"""The variants of a student on Triton server, and `fewstep serve` beside them, under the same loads in one run.

    python benchmarks/triton_variants.py --json docs/results/triton.json

Three loads over gRPC: an open loop of requests with 1, 4 and 8 steps (`fewstep bench`, time from when a request was
meant to be sent), a closed loop of the same, and NVIDIA's `perf_analyzer` at the same number of requests under way.
The servers run side by side, and only one is asked at a time; the arms take turns in each round, and the figures are
medians over the rounds.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from fewstep.deploy.perf_analyzer import perf_analyzer
from fewstep.deploy.triton_repository import VARIANTS, write_model
from fewstep.deploy.triton_server import Environment, free_ports, running
from fewstep.runtime import Bundle

MIX = "steps=1:0.3, steps=4:0.4, steps=8:0.3"
INPUTS = [{"STEPS": [steps], "LABEL": [i % 10], "SEED": [i]} for i, steps in enumerate((1, 4, 8, 4, 1, 4, 8, 4, 1, 8))]
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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    bundle = Bundle.load(options.bundle)
    environment = Environment.default()
    environment.make()
    rounds: list[dict[str, dict[str, Figures]]] = []
    with tempfile.TemporaryDirectory() as place:
        repository = Path(place) / "repository"
        for variant in VARIANTS:
            write_model(bundle, repository, variant=variant, name=variant, threads=options.threads)
        log = Path(place) / "log"
        with (
            running(environment, repository, log) as (_, triton),
            standalone(bundle, options.threads) as ours,
        ):
            arms: dict[str, tuple[str, str]] = {
                "standalone": (ours, bundle.name),
                **{variant: (triton, variant) for variant in VARIANTS},
            }
            for i in range(options.rounds):
                order = [*arms][i % len(arms) :] + [*arms][: i % len(arms)]
                made: dict[str, dict[str, Figures]] = {}
                for arm in order:
                    address, model = arms[arm]
                    made[arm] = {
                        "open": bench(address, model, options.seconds, "--rate", str(options.rate)),
                        "closed": bench(address, model, options.seconds, "--clients", str(options.clients)),
                    }
                    if arm != "iterative":  # it would mark each request as a whole sequence, which ends rescheduling
                        seen = perf_analyzer(environment, address, model, INPUTS, clients=options.clients)
                        made[arm]["perf_analyzer"] = asdict(seen)
                    told = {load: {k: round(v, 1) for k, v in each.items()} for load, each in made[arm].items()}
                    print(f"round {i + 1}, {arm}: {told}", flush=True)
                rounds.append({arm: made[arm] for arm in arms})
    medians: dict[str, dict[str, Figures]] = {
        arm: {
            load: {name: statistics.median(one[arm][load][name] for one in rounds) for name in rounds[0][arm][load]}
            for load in rounds[0][arm]
        }
        for arm in arms
    }
    for arm, loads in medians.items():
        print(arm, {load: {k: round(v, 1) for k, v in each.items()} for load, each in loads.items()})
    if options.json:
        result = {
            "command": "python benchmarks/triton_variants.py " + " ".join(sys.argv[1:]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores shared with other work, "
            f"Python {platform.python_version()}",
            "triton": "2.51.0, nvidia-pytriton 0.7.0",
            "bundle": bundle.name,
            "threads": options.threads,
            "mix": MIX,
            "rate": options.rate,
            "clients": options.clients,
            "seconds": options.seconds,
            "medians": medians,
            "rounds": rounds,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


@contextmanager
def standalone(bundle: Bundle, threads: int) -> Iterator[str]:
    """`fewstep serve`; gives the address of gRPC."""
    http, grpc = free_ports(2)
    command = [sys.executable, "-m", "fewstep.cli", "serve", str(bundle.path), "--port", str(http)]
    command += ["--grpc-port", str(grpc), "--threads", str(threads)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        server.stdout.readline()
        yield f"127.0.0.1:{grpc}"
    finally:
        server.terminate()
        server.wait()


def bench(address: str, model: str, seconds: float, *load: str) -> Figures:
    """One run of `fewstep bench`."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "report.json"
        command = [sys.executable, "-m", "fewstep.cli", "bench", "run", f"grpc://{address}", "--model", model]
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
