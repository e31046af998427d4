"""What a line of Python costs when it was not run for a while: from a loop of its own to once a tick.

    python benchmarks/cold_code.py --json docs/results/cold_code.json

Between two runs of the line the thread either spins, touching no memory, or calls the embedded student's network. A
processor that one has to oneself keeps the line in its caches through the first and loses it in the second; on a host
that is shared, others take the caches in either. What runs once a tick costs what is told for the length of a tick.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from fewstep.bench.report import machine
from fewstep.runtime import Bundle
from fewstep.runtime.backends import OnnxBackend

ROWS = 16
PAUSES_MS = (0.0, 0.3, 1.0, 3.0, 10.0, 25.0)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds: one at least")

    bundle = Bundle.load()
    network = OnnxBackend(bundle.network, ROWS, bundle.manifest.sample_shape)
    row, stop = np.arange(ROWS, dtype=np.int32), np.full(ROWS, 7, np.int32)
    lines: dict[str, Callable[[], object]] = {
        "a function that does nothing": lambda: None,
        "np.flatnonzero(row == stop)": lambda: np.flatnonzero(row == stop),
    }
    assert lines["np.flatnonzero(row == stop)"]().tolist() == [7]  # type: ignore[attr-defined]
    between: dict[str, Callable[[], object]] = {f"{ms:g} ms of spinning": partial(spin, ms / 1000) for ms in PAUSES_MS}
    between[f"a network call of {ROWS} rows"] = partial(network, ROWS)
    took: dict[tuple[str, str], list[int]] = {(pause, line): [] for pause in between for line in lines}
    for _ in range(options.rounds):
        for pause, line in took:
            between[pause]()
            start_ns = time.perf_counter_ns()
            lines[line]()
            took[pause, line].append(time.perf_counter_ns() - start_ns)
    medians = {
        line: {pause: round(statistics.median(took[pause, line]) / 1000, 1) for pause in between} for line in lines
    }
    command = " ".join(["python", "benchmarks/cold_code.py", *sys.argv[1:]])
    report = {"command": command, "machine": machine(), "median_us_after": medians}
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def spin(seconds: float) -> None:
    """Do nothing, awake."""
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        pass


if __name__ == "__main__":
    main()
