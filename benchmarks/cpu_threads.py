"""How the CPU runs a network: threads within operators, rows divided among threads, and unsigned int8.

    python benchmarks/cpu_threads.py --json docs/results/cpu_threads.json

All ways take turns in one run, on the same rows; each figure is the median over the rounds, per sample of the default
table (its network calls). ``default`` is the session that ONNX Runtime makes when it is told nothing: a thread for each
core, which spins between operators. What computes in float32 must give the same bits before anything is timed.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fewstep.bench.report import machine
from fewstep.export.additions import add_precisions
from fewstep.runtime import Bundle
from fewstep.runtime.backends import OnnxBackend

Array = NDArray[Any]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default=None, help="a folder or an embedded name; the embedded student")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of those that use several")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bundle = Bundle.load(options.bundle)
    steps = bundle.manifest.default_tableau.num_steps
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        small, report = add_precisions(bundle, Path(folder) / "bundle", ["int8-cpu"])
        for rows in options.rows:
            ways = ways_of(bundle, small, rows, options.threads)
            (wanted, *others) = [run() for name, run in ways.items() if "int8" not in name]
            assert all(np.array_equal(wanted, other) for other in others)
            taken = measure(ways, options.rounds, options.seconds)
            scale = 1000 * steps / rows
            results[str(rows)] = {
                name: {"cpu_ms": scale * cpu_s, "wall_ms": scale * wall_s} for name, (cpu_s, wall_s) in taken.items()
            }
            for name, figures in results[str(rows)].items():
                print(
                    f"{rows:3} rows, {name:18} CPU {figures['cpu_ms']:6.2f} ms, {figures['wall_ms']:6.2f} ms a sample"
                )
    if options.json:
        about = {
            "command": " ".join(["python", "benchmarks/cpu_threads.py", *sys.argv[1:]]),
            "machine": machine(),
            "onnxruntime": onnxruntime.__version__,
            "bundle": bundle.name,
            "threads": options.threads,
            "network_calls": steps,
            "int8_samples_relative_error": report["against_float32"]["int8-cpu"]["samples"],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**about, "rows": results}, indent=2) + "\n")


def ways_of(bundle: Bundle, small: Bundle, rows: int, threads: int) -> dict[str, Callable[[], Array]]:
    """One network call, in each way, on the same inputs."""
    shape = bundle.manifest.sample_shape
    backends = {
        "one thread": OnnxBackend(bundle.network, rows, shape, 1),
        "rows divided": OnnxBackend(bundle.network, rows, shape, threads),
        "int8, one thread": OnnxBackend(small.network_in("int8-cpu"), rows, shape, 1),
        "int8, rows divided": OnnxBackend(small.network_in("int8-cpu"), rows, shape, threads),
    }
    given = backends["one thread"].inputs
    rng = np.random.default_rng(0)
    given["x"][:] = rng.standard_normal(given["x"].shape)
    given["t"][:] = rng.uniform(-1, 1, rows)
    for backend in backends.values():
        for name, array in given.items():
            backend.inputs[name][:] = array
    quiet = onnxruntime.SessionOptions()
    quiet.intra_op_num_threads = threads
    quiet.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = {
        name: onnxruntime.InferenceSession(str(bundle.network), settings, providers=["CPUExecutionProvider"])
        for name, settings in (("default", onnxruntime.SessionOptions()), ("operators divided", quiet))
    }

    def of_session(session: onnxruntime.InferenceSession) -> Callable[[], Array]:
        return lambda: session.run(None, given)[0]

    def of_backend(backend: OnnxBackend) -> Callable[[], Array]:
        return lambda: backend(rows)

    return {name: of_session(session) for name, session in sessions.items()} | {
        name: of_backend(backend) for name, backend in backends.items()
    }


def measure(ways: dict[str, Callable[[], Array]], rounds: int, seconds: float) -> dict[str, tuple[float, float]]:
    """CPU and wall time of a call, the median over rounds in which all take turns."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            calls, cpu_s, start_s = 0, time.process_time(), time.perf_counter()
            while time.perf_counter() < start_s + seconds:
                run()
                calls += 1
            taken[name].append(((time.process_time() - cpu_s) / calls, (time.perf_counter() - start_s) / calls))
    return {
        name: (statistics.median(c for c, _ in each), statistics.median(w for _, w in each))
        for name, each in taken.items()
    }


if __name__ == "__main__":
    main()
