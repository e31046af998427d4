"""NVIDIA's perf_analyzer, the load generator that Triton's users know, in an environment of its own.

It comes in an old wheel of ``tritonclient``, and is linked to libraries that the Triton server's wheel has.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..kernels.native import cache_folders
from .triton_server import Environment, TritonError

WHEEL = "tritonclient==2.41.1"  # the last one whose wheel has it


@dataclass(frozen=True)
class Load:
    """What perf_analyzer saw."""

    images_per_s: float
    p50_ms: float
    p99_ms: float


def perf_analyzer(
    environment: Environment,
    address: str,
    model: str,
    inputs: Sequence[Mapping[str, Any]],
    *,
    protocol: Literal["http", "grpc"] = "grpc",
    clients: int = 16,
    requests: int = 200,
) -> Load:
    """A closed loop.

    Args:
        environment: whose libraries it takes.
        address: host and port.
        model: which one is asked.
        inputs: by name, the values of each request; they are asked in turn.
        protocol: of the Open Inference Protocol.
        clients: requests under way.
        requests: in each of its windows, at least.

    Raises:
        TritonError: it cannot be installed, or was refused; its own words.
    """
    tool = _tool(environment)
    with tempfile.TemporaryDirectory() as place:
        data, report = Path(place) / "inputs.json", Path(place) / "report.csv"
        data.write_text(json.dumps({"data": inputs}))
        command = [str(tool / "bin" / "perf_analyzer"), "-m", model, "-u", address, "-i", protocol, "-f", str(report)]
        command += ["--concurrency-range", str(clients), "--percentile", "99", "--input-data", str(data)]
        command += ["--measurement-mode", "count_windows", "--measurement-request-count", str(requests)]
        command += ["--max-trials", "10", "--stability-percentage", "900"]  # how stable it is, runs in turn tell
        variables = {**os.environ, "LD_LIBRARY_PATH": str(tool / "lib")}
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode or not report.exists():
            raise TritonError(f"perf_analyzer: {model}: {done.stdout[-2000:].strip()}")
        (row,) = csv.DictReader(report.read_text().splitlines())
    return Load(float(row["Inferences/Second"]), float(row["p50 latency"]) / 1000, float(row["p99 latency"]) / 1000)


def _tool(environment: Environment) -> Path:
    tool = cache_folders()[0] / "perf-analyzer"
    if (tool / "bin" / "perf_analyzer").exists():
        return tool
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", tool], check=True)
        python = str(tool / "bin" / "python")
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
        for name, pattern in (("libb64.so.0d", "libb64-*"), ("libcudart.so.12", "libcudart-*")):
            (tool / "lib" / name).symlink_to(next(environment.libraries.glob(pattern)))
        subprocess.run([*pip, WHEEL], check=True)
    except (subprocess.CalledProcessError, StopIteration) as error:
        raise TritonError(f"perf_analyzer cannot be installed: {error}") from None
    return tool
