"""Time the CUDA step against the device's copy bandwidth. Not run on a GPU yet.

    python benchmarks/gpu.py --json docs/results/gpu.json

Each case is first held against `step_reference` to the bit. Times are of CUDA events, the median over launches; the
copy moves as many bytes, device to device, in the same run.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.kernels import StepRow, pack_rows, step_reference
from fewstep.kernels.cuda import NETWORKS, CudaError, CudaStep, Network, Noise

ROWS, ELEMENTS, HISTORY = 64, 196_608, 2


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        CudaStep()
    except CudaError as error:
        raise SystemExit(f"benchmarks/gpu.py: {error}") from None
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    results: list[dict[str, Any]] = []
    for network in NETWORKS[:2]:  # numpy has no bfloat16 to compare with
        for noise in ("none", "exact", "fast"):
            results.append(case(cupy, network, noise, options.launches))
            print(results[-1], flush=True)
    report = {
        "command": "python benchmarks/gpu.py",
        "machine": {
            "gpu": properties["name"].decode(),
            "capability": cupy.cuda.Device().compute_capability,
            "driver": cupy.cuda.runtime.driverGetVersion(),
        },
        "results": results,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def case(cupy: Any, network: Network, noise: str, launches: int) -> dict[str, Any]:
    """One dtype and noise: its check, its time, its part of the copy bandwidth."""
    kind: Noise = "fast" if noise == "fast" else "exact"
    step = CudaStep(network, kind)
    c = 0.0 if noise == "none" else 0.1
    row = StepRow(0.1, -0.5, -1.0, 1.0, a=0.6, b=(0.3, -0.2), c=c, c_in=0.5, write_slot=1, noise_id=3)
    table = pack_rows([row], HISTORY)
    rng = np.random.default_rng(0)

    def arguments(rows: int, elements: int) -> list[Any]:
        stored = np.dtype(network)
        return [
            np.zeros(rows, np.int32), rng.standard_normal((rows, elements), np.float32),
            rng.standard_normal((rows, HISTORY, elements), np.float32),
            rng.standard_normal((2 * rows, elements), np.float32).astype(stored),
            np.arange(rows, 2 * rows, dtype=np.int32), np.full(rows, 2, np.float32), np.arange(rows, dtype=np.uint64),
            np.zeros((rows, elements), stored),
        ]  # fmt: skip

    flat = cupy.asarray(np.frombuffer(table.tobytes(), np.uint8).reshape(1, -1))
    small = arguments(3, 1003)
    device = [cupy.asarray(array) for array in small]
    step(flat, *device)
    step_reference(table, *small)
    difference = max(float(np.abs(cupy.asnumpy(device[i]) - small[i]).max()) for i in (1, 2, 7))
    assert noise == "fast" or difference == 0, f"{network}, {noise}: off by {difference}"

    device = [cupy.asarray(array) for array in arguments(ROWS, ELEMENTS)]
    stored = np.dtype(network).itemsize
    moved = ROWS * ELEMENTS * (4 * 4 + 3 * stored)  # in: x, a slot, two outputs; out: x, a slot, an input
    source = cupy.zeros(moved // 2, np.uint8)
    target = cupy.empty_like(source)
    ours_ms = median_ms(cupy, lambda: step(flat, *device), launches)
    copy_ms = median_ms(cupy, lambda: cupy.copyto(target, source), launches)
    return {
        "network": network, "noise": noise, "difference": difference, "step_ms": ours_ms, "copy_ms": copy_ms,
        "gigabytes_per_s": moved / ours_ms / 1e6, "fraction_of_copy_bandwidth": copy_ms / ours_ms,
    }  # fmt: skip


def median_ms(cupy: Any, call: Callable[[], None], launches: int) -> float:
    """Device time of one launch."""
    times: list[float] = []
    for i in range(launches + 5):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        if i >= 5:
            times.append(cupy.cuda.get_elapsed_time(start, stop))
    return statistics.median(times)


if __name__ == "__main__":
    main()
