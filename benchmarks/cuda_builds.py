"""What can be said of the CUDA kernels without a GPU; none took part.

    python benchmarks/cuda_builds.py --json docs/results/cuda_builds.json

Every build, which is an architecture, a dtype of the network and a noise: the registers, stack and spills of its eight
kernels, as the compiler tells them. And how far the fast noise is from the exact one when the source runs on the CPU,
with the C library's functions in the place of the GPU's own: what is left is the order of operations, and the GPU's
functions err by more.
"""

import argparse
import json
import platform
import re
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np

from fewstep.kernels import StepRow, cuda, normals, pack_rows
from fewstep.kernels.cuda import NETWORKS, Network, Noise

CAPABILITIES = ("80", "90", "100", "120")
ROWS = 4


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from lazy_cuda import emulate

    every = product(CAPABILITIES, NETWORKS, get_args(Noise))
    builds = [build(capability, network, noise) for capability, network, noise in every]
    with tempfile.TemporaryDirectory() as folder:
        fast = fast_noise(emulate(Path(folder), "float32", True), options.elements)
    report = {
        "command": "python benchmarks/cuda_builds.py",
        "note": "No GPU took part: builds as the compiler tells them, noise as it comes out on a CPU.",
        "compiler": cuda._compiler(),
        "builds": builds,
        "fast_noise": {"functions_of": " ".join(platform.libc_ver()), **fast},
    }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def build(capability: str, network: Network, noise: Noise) -> dict[str, Any]:
    """One build, in numbers."""
    made, said = cuda.compile_cubin(capability, cuda.defines(network, noise))
    if made[:4] != b"\x7fELF":
        raise SystemExit(f"sm_{capability}, {network}, {noise}: what was compiled is no cubin")
    spent = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    stack, stores, loads = (max(map(int, numbers)) for numbers in zip(*spent, strict=True))
    return {
        "capability": capability, "network": network, "noise": noise, "kernels": len(spent), "stack_bytes": stack,
        "spilled_bytes": max(stores, loads), "most_registers": max(map(int, re.findall(r"Used (\d+) registers", said))),
    }  # fmt: skip


def fast_noise(launch: Any, elements: int) -> dict[str, Any]:
    """How far the fast noise of an emulated float32 build is from the exact one, over ``ROWS * elements`` normals."""
    start = StepRow(0, 0, -np.inf, np.inf, a=0, b=(), c=1.0, c_in=1.0, write_slot=-1, noise_id=5)
    x, history = np.empty((ROWS, elements), np.float32), np.zeros((ROWS, 1, elements), np.float32)
    table, seed = pack_rows([start], 1), np.arange(ROWS, dtype=np.uint64)
    row, uncond, guidance = np.zeros(ROWS, np.int32), np.full(ROWS, -1, np.int32), np.ones(ROWS, np.float32)
    raw, network_input = np.zeros_like(x), np.empty_like(x)
    arrays = (x, history, raw, uncond, guidance, seed, network_input)
    plan = cuda.plan(
        ROWS, elements, 1, "float32", tuple(array.ctypes.data for array in (x, history, raw, network_input))
    )
    to_x, *others = (array.ctypes.data for array in arrays)
    launch(
        plan.kernel.encode(), *plan.grid, plan.threads, table.ctypes.data, table.strides[0], row.ctypes.data, elements,
        1, to_x, *others,
    )  # fmt: skip
    difference = x.astype(np.float64) - normals(seed, np.full(ROWS, 5), elements)
    return {
        "normals": x.size,
        "largest_difference": float(np.abs(difference).max()),
        "rms_difference": float(np.sqrt(np.mean(difference**2))),
    }


if __name__ == "__main__":
    main()
