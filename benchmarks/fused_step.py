"""Time the fused step on one CPU thread: the compiled build against numpy with ``out=``, and against a copy.

    python benchmarks/fused_step.py --json docs/results/fused_step.json

One step of 64 rows at three sizes, two history slots, guidance on every row, without and with fresh noise. Both
builds are first held against each other to the bit. They alternate in one run, the figure is the median of the
pairwise ratios of process CPU time, and beside it stands the fraction of the copy rate (numpy's, of the same
machine in the same run) at which the compiled build moves the bytes it must.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.kernels import StepRow, native_step, pack_rows
from fewstep.kernels.fused_step import Scratch, step_numpy

SIZES = {"0.2 MB": (64, 784), "0.8 MB": (64, 3072), "50 MB": (64, 196_608)}
HISTORY = 2


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    native = native_step()
    if native is None:
        raise SystemExit("there is no compiled build here: no C++ compiler")
    results = []
    for size, (rows, elements) in SIZES.items():
        for noise in (False, True):
            arrays = batch(rows, elements, noise)
            scratch = Scratch(rows, elements)
            ours, theirs = [copied(arrays) for _ in range(2)]
            native.step(*ours)
            step_numpy(*theirs, scratch=scratch)  # type: ignore[misc]
            for one, other in zip(ours, theirs, strict=True):
                assert one.tobytes() == other.tobytes(), "the builds differ"
            del theirs
            repeats = max(1, 5_000_000 // (rows * elements * (4 if noise else 1)))
            pairs, rates = [], []
            source, target = arrays[2], np.empty_like(arrays[2])
            for _ in range(options.rounds):
                compiled_ms = cpu_ms(lambda a=ours: native.step(*a), repeats)  # type: ignore[misc]
                numpy_ms = cpu_ms(lambda a=ours, s=scratch: step_numpy(*a, scratch=s), repeats)  # type: ignore[misc]
                copy_ms = cpu_ms(lambda t=target, s=source: np.copyto(t, s), repeats)  # type: ignore[misc]
                pairs.append((compiled_ms, numpy_ms))
                # In: x, one history slot, two network outputs. Out: x, the other slot, the network's input.
                rates.append((7 * source.nbytes / compiled_ms) / (2 * source.nbytes / copy_ms))
            result = {
                "tensor": size,
                "rows": rows,
                "elements": elements,
                "noise": noise,
                "compiled_ms": statistics.median(c for c, _ in pairs),
                "numpy_ms": statistics.median(n for _, n in pairs),
                "numpy_over_compiled": statistics.median(n / c for c, n in pairs),
                "numpy_over_compiled_range": [min(n / c for c, n in pairs), max(n / c for c, n in pairs)],
                "fraction_of_copy_rate": statistics.median(rates),
            }
            results.append(result)
            print(
                f"{size:>7}, {'fresh' if noise else 'no'} noise: {result['compiled_ms']:.3f} ms, numpy "
                f"{result['numpy_over_compiled']:.2f} times; {result['fraction_of_copy_rate']:.2f} of a copy's rate",
                flush=True,
            )
    if options.json:
        report = {
            "command": "python benchmarks/fused_step.py",
            "machine": {"cpu": processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
            "threads": 1,
            "clock": "process CPU time",
            "results": results,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def batch(rows: int, elements: int, noise: bool) -> tuple[Any, ...]:
    """The arguments of a step whose every term is read; weights that keep x bounded over many of them."""
    rng = np.random.default_rng(0)
    row = StepRow(0.1, -0.5, -1.0, 1.0, a=0.6, b=(0.3, -0.2), c=0.1 if noise else 0, c_in=0.5, write_slot=1, noise_id=3)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    return (
        pack_rows([row], HISTORY), np.zeros(rows, np.int32), normal(rows, elements), normal(rows, HISTORY, elements),
        normal(2 * rows, elements), np.arange(rows, 2 * rows, dtype=np.int32), np.full(rows, 2, np.float32),
        np.arange(rows, dtype=np.uint64), normal(rows, elements),
    )  # fmt: skip


def copied(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of their own."""
    return tuple(array.copy() for array in arrays)


def cpu_ms(call: Callable[[], Any], repeats: int) -> float:
    """CPU time of one call, other processes' left out."""
    call()
    start_s = time.process_time()
    for _ in range(repeats):
        call()
    return 1000 * (time.process_time() - start_s) / repeats


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
