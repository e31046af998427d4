"""What it costs that a request has the same bits in any company.

    python benchmarks/exactness.py --json docs/results/exactness.json

The promise asks for three things. Noise is counted and not drawn, so it is made anew where a generator would go on. The
fused step rounds each product and each sum once, in the order written, so the compiler may neither fuse nor reorder
them. The network's rows must not see each other, which ONNX Runtime's do not on a CPU. So the cost lies in the step:
the same source compiled without these rules (-Ofast, contraction) against the build that serves, alternating, in CPU
time a row; beside it the network's own time a row, of which the difference is a part.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fused_step import cpu_ms

import fewstep.kernels
from fewstep.kernels import StepRow, native_step, pack_rows
from fewstep.kernels.native import NativeStep
from fewstep.runtime import Bundle
from fewstep.runtime.backends import OnnxBackend

FREE = ("-Ofast", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
ROWS = 16


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    exact = native_step()
    if exact is None:
        raise SystemExit("there is no compiled build here: no C++ compiler")
    bundle = Bundle.load()
    elements = int(np.prod(bundle.manifest.sample_shape))
    network = OnnxBackend(bundle.network, ROWS, bundle.manifest.sample_shape)
    report: dict[str, Any] = {
        "command": "python benchmarks/exactness.py",
        "machine": {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "bundle": bundle.name,
        "rows": ROWS,
    }
    with tempfile.TemporaryDirectory() as place:
        free = NativeStep(ctypes.CDLL(str(build(Path(place)))))
        for noise in (False, True):
            arrays = batch(elements, noise)
            check(exact, free, arrays)
            rounds = []
            for _ in range(options.rounds):
                rounds.append(
                    [
                        cpu_us(lambda a=arrays: exact.step(*a), 400),  # type: ignore[misc]
                        cpu_us(lambda a=arrays: free.step(*a), 400),  # type: ignore[misc]
                        cpu_us(lambda: network(ROWS), 4),
                    ]
                )
            ours, theirs, calls = (statistics.median(column) for column in zip(*rounds, strict=True))
            figures = {
                "exact_us_a_row": round(ours, 3),
                "free_us_a_row": round(theirs, 3),
                "exact_over_free": round(statistics.median(a / b for a, b, _ in rounds), 3),
                "network_us_a_row": round(calls, 1),
                "cost_in_network_time": round(statistics.median((a - b) / c for a, b, c in rounds), 5),
            }
            report["with noise" if noise else "without noise"] = figures
            print(f"{'with' if noise else 'without'} noise: {figures}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def build(folder: Path) -> Path:
    """The step compiled without the rules."""
    library = folder / "free.so"
    source = Path(fewstep.kernels.__file__).parent / "cpu.cpp"
    subprocess.run(["c++", *FREE, "-o", str(library), str(source)], check=True)
    return library


def batch(elements: int, noise: bool) -> list[Any]:
    """Arrays of one step of a multistep solver."""
    rng = np.random.default_rng(0)
    row = StepRow(0.1, 0.9, -1.0, 1.0, 0.7, (0.4, -0.1), 0.3 if noise else 0.0, 1.1, 0, 1, 0.5)
    x, raw, network_input = (rng.standard_normal((ROWS, elements)).astype(np.float32) for _ in range(3))
    history = rng.standard_normal((ROWS, 2, elements)).astype(np.float32)
    return [
        pack_rows([row], 2), np.zeros(ROWS, np.int32), x, history, raw, np.full(ROWS, -1, np.int32),
        np.ones(ROWS, np.float32), np.arange(ROWS, dtype=np.uint64), network_input,
    ]  # fmt: skip


def check(exact: NativeStep, free: NativeStep, arrays: list[Any]) -> None:
    """Both must make the same step, but for rounding."""
    ours, theirs = ([np.copy(array) for array in arrays] for _ in range(2))
    exact.step(*ours)
    free.step(*theirs)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-4, atol=1e-4)


def cpu_us(work: Callable[[], Any], repeats: int) -> float:
    """CPU time a row, in microseconds."""
    return 1000 * cpu_ms(work, repeats) / ROWS


if __name__ == "__main__":
    main()
