"""The server from outside: cold start, resident memory, and how cost grows.

    python benchmarks/server.py --json docs/results/server.json

Cold start is from the start of the process to the first image over HTTP, which must be the very one that the engine
makes. Growth is measured where the network's own cost is taken out (a simulated accelerator of 0 + 0 n ms: SIMULATED),
so that what grows is ours: with the rows in flight and the depth of the solver's history in the engine alone, with the
size of images over HTTP. With the number of students it is measured on the real network, over HTTP.
"""

import argparse
import base64
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fewstep.bench.observer import ProcessTree
from fewstep.bench.page import draw
from fewstep.bench.report import Round, machine
from fewstep.bench.run import address_of, bench
from fewstep.bench.workload import Kind, workload
from fewstep.runtime import Bundle, Engine, Request
from fewstep.runtime.bundle import MANIFEST, add_tables
from fewstep.runtime.pictures import encode
from fewstep.runtime.schedules import karras
from fewstep.runtime.simulated import simulated
from fewstep.runtime.solvers import ddim, ipndm

ROWS = (1, 4, 16, 64, 256, 1024, 4096)
HISTORIES = (1, 2, 3, 4)
SIZES = (28, 64, 128, 256)
STUDENTS = (1, 5, 10, 25, 50)
FREE = "0+0"
SECTIONS = ["cold-start", "memory", "growth"]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of load for each figure")
    parser.add_argument("--sections", nargs="*", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--starts", type=int, default=7, help="cold starts")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, default=Path("docs/images"), help="folder for the plots")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    if options.json and options.json.exists():  # what is not measured now stays as it was
        result |= json.loads(options.json.read_text())
    command = " ".join(["python", "benchmarks/server.py", *sys.argv[1:]])
    result["command"] = result.get("command", {}) | dict.fromkeys(options.sections, command)
    result["machine"] = machine()
    if "cold-start" in options.sections:
        result["cold_start"] = cold_start(options.starts)
    if "memory" in options.sections:
        result["memory_mb"] = memory(options.seconds)
    if "growth" in options.sections:
        result["growth"] = growth(options.seconds)
        save_plots(options.plots, result["growth"])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def growth(seconds: float) -> dict[str, list[dict[str, Any]]]:
    """How cost grows with each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            "rows in flight (engine, SIMULATED free network)": [rows(r, seconds) for r in ROWS],
            "history (engine, SIMULATED free network)": histories(folder, seconds),
            "image size (HTTP, SIMULATED free network)": [size(folder, s, seconds) for s in SIZES],
            "students (HTTP, real network)": [students(folder, n, seconds) for n in STUDENTS],
        }


class Serving(NamedTuple):
    """Where a server that runs is found."""

    url: str
    pid: int
    grpc: str  # host:port; empty without gRPC


@contextmanager
def serving(*arguments: str | Path, python: str = sys.executable) -> Iterator[Serving]:
    """A server with these arguments, until the block ends."""
    command = [python, "-m", "fewstep", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        url, grpc = re.search(r" at (http://[\d.]+:\d+) ", said), re.search(r"gRPC at ([\d.:]+)", said)
        assert url, said
        yield Serving(url[1], process.pid, grpc[1] if grpc else "")
    finally:
        process.terminate()
        process.wait()


def first_image(url: str, model: str | None = None) -> bytes:
    """Asked with what any client has."""
    body = json.dumps({"prompt": "Sneaker", "seed": 5} | ({"model": model} if model else {})).encode()
    with urllib.request.urlopen(f"{url}/v1/images/generations", body, timeout=60) as answer:
        return base64.b64decode(json.load(answer)["data"][0]["b64_json"])


def right_image(bundle: Bundle, **engine: Any) -> bytes:
    """What the engine makes of it, which is what the server has to send before anything is timed."""
    assert bundle.manifest.labels is not None
    label = bundle.manifest.labels.parse("Sneaker")
    (sample,) = Engine(bundle, threads=1, **engine).generate([Request(5, bundle.tableau(), label)])
    return encode(sample.to_uint8())


def cold_start(starts: int) -> dict[str, Any]:
    """Seconds from nothing to listening, and to the first image."""
    right = right_image(Bundle.load())
    listening, imaged, cpu = [], [], []
    for _ in range(starts):
        start_s = time.perf_counter()
        with serving("--no-grpc") as (url, pid, _):
            listening.append(time.perf_counter() - start_s)
            image = first_image(url)
            imaged.append(time.perf_counter() - start_s)
            cpu.append(ProcessTree(pid).cpu_s())
        assert image == right
    told = {
        "listening_s": statistics.median(listening),
        "first_image_s": statistics.median(imaged),
        "cpu_s": statistics.median(cpu),
        "all_s": imaged,
    }
    print(
        f"cold start: first image after {told['first_image_s']:.2f} s, {told['cpu_s']:.2f} s of CPU time; "
        f"median of {starts}, the quickest {min(imaged):.2f} s",
        flush=True,
    )
    return told


def memory(seconds: float) -> dict[str, float]:
    """Resident memory of the serving process."""
    told: dict[str, float] = {}
    for flag in ("--no-grpc", "--grpc"):
        extra = [flag] if flag == "--no-grpc" else [flag, "--grpc-port", "0"]
        with serving("--threads", "2", *extra) as (url, pid, _):
            tree = ProcessTree(pid)
            first_image(url)
            told[f"{flag[2:]}, after one image"] = tree.memory_mb()
            bench(address_of(url), workload(clients=64, seconds=2 * seconds), is_quiet=True)
            told[f"{flag[2:]}, after 64 clients"] = tree.memory_mb()
    print(f"resident memory in MB: {told}", flush=True)
    return told


def row_of(what: dict[str, Any], made: Round) -> dict[str, Any]:
    """The figures of one point."""
    total = made["total"]
    told = {
        **what,
        "images_per_s": total["images_per_s"],
        "sample_steps_per_s": total["sample_steps_per_s"],
        "p50_ms": total["latency_ms"]["p50"],
        "p99_ms": total["latency_ms"]["p99"],
        "cpu_ms_per_image": made["server"]["cpu_ms_per_image"],
        "memory_mb": made["server"]["memory_mb"],
        "rows_per_call": made["server"]["rows_per_call"],
        "errors": total["errors"],
    }
    said = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in told.items()}
    print(", ".join(f"{name} {value}" for name, value in said.items()), flush=True)
    return told


def rows(number: int, seconds: float) -> dict[str, Any]:
    """So many samples in one engine at once, from the first step to the last; times are of all of them together."""
    bundle = Bundle.load()
    engine = Engine(bundle, max_rows=number, max_waiting=number, threads=1, backend=simulated(FREE))
    requests = [Request(seed, bundle.tableau(), seed % 10) for seed in range(number)]
    engine.generate(requests)
    took_ms: list[float] = []
    cpu_s, start_s = time.process_time(), time.perf_counter()
    while time.perf_counter() < start_s + seconds:
        before_s = time.perf_counter()
        engine.generate(requests)
        took_ms.append(1000 * (time.perf_counter() - before_s))
    images = number * len(took_ms)
    told = {
        "rows": number,
        "images_per_s": images / (sum(took_ms) / 1000),
        "p50_ms": float(np.percentile(took_ms, 50)),
        "p99_ms": float(np.percentile(took_ms, 99)),
        "cpu_ms_per_image": 1000 * (time.process_time() - cpu_s) / images,
    }
    print(", ".join(f"{name} {value:.4g}" for name, value in told.items()), flush=True)
    return told


def histories(folder: Path, seconds: float) -> list[dict[str, Any]]:
    """The same network calls with tables that read further back."""
    path = folder / "histories"
    shutil.copytree(Bundle.load().path, path)
    tables = [ddim(karras(6, 0.25, 40.0)), *(ipndm(karras(6, 0.25, 40.0), order) for order in HISTORIES[1:])]
    tables = [replace(table, name=f"history-{depth}") for depth, table in zip(HISTORIES, tables, strict=True)]
    add_tables(path, tables)
    told = []
    for table in tables:
        load = workload(f"steps=6 solver={table.name}", clients=64, seconds=seconds)
        made = bench(address_of(str(path), max_rows=64, threads=1, simulate=FREE), load, is_quiet=True)
        told.append(row_of({"history": table.history}, made))
    return told


def size(folder: Path, pixels: int, seconds: float) -> dict[str, Any]:
    """Images of so many pixels a side: latents, solver step, noise, PNG, base64, HTTP."""
    path = folder / f"size-{pixels}"
    shutil.copytree(Bundle.load().path, path)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["sample_shape"] = [1, pixels, pixels]
    (path / MANIFEST).write_text(json.dumps(manifest))
    with serving(path, "--simulate", FREE, "--no-grpc") as (url, *_):
        assert first_image(url) == right_image(Bundle.load(path), backend=simulated(FREE))
        return row_of({"pixels": pixels}, bench(address_of(url), workload(clients=32, seconds=seconds), is_quiet=True))


def students(folder: Path, number: int, seconds: float) -> dict[str, Any]:
    """So many students in one process, asked in turn."""
    paths = []
    for i in range(number):
        path = folder / f"student-{i}"
        if not path.exists():
            shutil.copytree(Bundle.load().path, path)
            manifest = json.loads((path / MANIFEST).read_text())
            manifest["name"] = f"student-{i}"
            (path / MANIFEST).write_text(json.dumps(manifest))
        paths.append(path)
    with serving(*paths, "--threads", str(os.cpu_count() or 1), "--no-grpc") as (url, *_):
        right = right_image(Bundle.load())
        assert all(first_image(url, f"student-{i}") == right for i in range(number))
        kinds = tuple(Kind(f"student-{i}", 1.0, {"model": f"student-{i}"}) for i in range(number))
        load = replace(workload(clients=32, seconds=seconds), kinds=kinds)
        return row_of({"students": number}, bench(address_of(url), load, is_quiet=True))


def save_plots(folder: Path, growth: dict[str, Any]) -> None:
    """Throughput and p99 over each, an SVG file for both."""
    for title, points in growth.items():
        name = next(iter(points[0]))
        marks = [one[name] for one in points]

        def scale(x: float, is_wide: bool = max(marks) > 40) -> float:
            return math.log2(x) if is_wide else x

        for figure, unit in (("images_per_s", "images/s"), ("p99_ms", "p99, ms")):
            line = [(float(one[name]), float(one[figure])) for one in points]
            drawn = draw({figure: line}, title, unit, x_scale=scale, x_marks=marks, is_log=True)
            (folder / f"growth-{name}-{figure.split('_')[0]}.svg").write_text(drawn + "\n")


if __name__ == "__main__":
    main()
