"""``make gpu`` without a GPU: its sections on a stand-in, its PyTorch step on the CPU, and what it says when all fail.

Times on the stand-in mean nothing; that the figures are there, and that parity and errors come out right, does.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lazy_cuda
import numpy as np
import onnxruntime
import pytest
import torch
from scripts import load_script

from fewstep.kernels import step_reference

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


BENCHMARK: Any = load_script("gpu")
SIZES = BENCHMARK.Sizes(rows=3, elements=65, launches=2, batches=12, networks=(1, 2), pixels=8, channels=8, steps=3)


@pytest.fixture
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    folder = tmp_path_factory.getbasetemp() / "kernels"
    folder.mkdir(exist_ok=True)
    with lazy_cuda.installed(folder):
        yield


def test_parity_is_of_all_bits_with_exact_noise_and_close_with_fast(gpu: None) -> None:
    cases = BENCHMARK.parity(SIZES)["cases"]
    assert [(case["network"], case["noise"]) for case in cases] == [
        (network, noise) for network in BENCHMARK.NETWORKS for noise in ("exact", "fast")
    ]
    for case in cases:
        if case["noise"] == "exact":
            assert (case["equal_share"], case["largest_difference"]) == (1, 0)
        else:
            assert case["equal_share"] < 1
            assert 0 < case["largest_difference"] < (1e-3 if case["network"] == "float32" else 0.04)


def test_a_step_is_within_a_few_roundings_of_float64(gpu: None) -> None:
    for case in BENCHMARK.float64(SIZES)["cases"]:
        assert case["cuda"] == case["cpu"]
        assert 0 < case["cuda"] < 20


def test_the_bytes_of_the_bandwidth_are_those_that_the_step_moves(gpu: None) -> None:
    """Counted by hand for three rows, two of them guided: x in and out, slots, outputs, the next input."""
    report = BENCHMARK.bandwidth(SIZES)
    assert len(report["cases"]) == 12
    moved = {(case["network"], case["history"]): case["megabytes"] * 1e6 for case in report["cases"]}
    n = 65
    assert moved["float32", 2] == pytest.approx(4 * n * (3 + 3 + 3 * 1 + 3 * 1 + 3 + 2 + 3))
    assert moved["float16", 2] == pytest.approx(4 * n * (3 + 3 + 3 * 1 + 3 * 1) + 2 * n * (3 + 2 + 3))
    assert moved["float32", 8] == pytest.approx(4 * n * (3 + 3 + 3 * 7 + 3 * 1 + 3 + 2 + 3))
    for case in report["cases"]:
        assert case["fraction_of_copy_bandwidth"] == pytest.approx(case["copy_ms"] / case["step_ms"])


class Clock:
    """A device that works while the host goes on, with its events, on a clock of their own."""

    def __init__(self) -> None:
        self.host_s = self.free_s = 0.0
        self.Event = lambda: SimpleNamespace(record=self._record, synchronize=self._synchronize)
        self.recorded_s: list[float] = []

    def launch(self) -> None:
        self.host_s += 30e-6
        self.free_s = max(self.host_s, self.free_s) + 80e-6

    def _record(self, stream: Any) -> None:
        self.recorded_s.append(max(self.host_s, self.free_s))

    def _synchronize(self) -> None:
        self.host_s = max(self.host_s, self.free_s)

    def get_elapsed_time(self, start: Any, stop: Any) -> float:
        return 1000 * (self.recorded_s[-1] - self.recorded_s[-2])


def test_what_the_host_does_is_not_counted_as_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of 80 us that the host asks for in 30 takes 80, not 110."""
    clock, gpu = Clock(), BENCHMARK.Gpu.__new__(BENCHMARK.Gpu)
    gpu.cupy, gpu.stream = SimpleNamespace(cuda=clock), None
    monkeypatch.setattr(BENCHMARK.time, "perf_counter", lambda: clock.host_s)
    assert gpu.milliseconds(clock.launch, 50) == pytest.approx((0.080, 0.030))


def test_a_network_section_measures_ticks_and_samples(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's, for both students; the samples are the CPU's to the bit, since the stand-in is the CPU."""
    monkeypatch.setattr(onnxruntime, "InferenceSession", lazy_cuda.CudaSession)
    cases = BENCHMARK.SECTIONS["onnxruntime"](SIZES)["cases"]
    assert [(case["student"], case["rows"]) for case in cases] == [
        ("fashion-mnist-mm4", 1), ("fashion-mnist-mm4", 2), ("larger", 1), ("larger", 2),
    ]  # fmt: skip
    for case in cases:
        assert case["against_cpu"] == {"largest_difference": 0, "relative": 0}, case
        assert case["tick_over_network"] == pytest.approx(case["tick_ms"] / case["network_ms"])
        assert case["samples_per_s"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a GPU")
def test_a_section_whose_backend_fails_says_so_in_each_case(gpu: None) -> None:
    cases = BENCHMARK.SECTIONS["torch"](SIZES)["cases"]
    assert len(cases) == 4
    for case in cases:
        assert case["error"].startswith("BackendError: torch has no CUDA device here (")


@pytest.mark.parametrize("network", BENCHMARK.NETWORKS)
def test_the_step_in_pytorch_is_the_same_step(network: str) -> None:
    """All rows guided, no noise; to the rounding of its last output's dtype."""
    dtype = BENCHMARK.DTYPES[network]
    arguments = BENCHMARK.batch(np.random.default_rng(3), 4, 33, 2, dtype, c=0.0)
    arguments[1][...] = 0
    arguments[4] = np.concatenate([arguments[4], arguments[4][4:]])
    arguments[5][...] = np.array([4, 5, 6, 7], np.int32)
    given = BENCHMARK.for_torch(arguments, "cpu")
    BENCHMARK.torch_step(*given, int(arguments[0]["write_slot"][0]), False)
    step_reference(*arguments)
    for got, wanted, tolerance in ((given[1], arguments[2], 1e-5), (given[2], arguments[3], 1e-5),
                                   (given[6], arguments[8], 1e-5 if network == "float32" else 2e-2)):  # fmt: skip
        assert np.abs(got.float().numpy() - wanted.astype(np.float32)).max() < tolerance


def test_targets_are_judged_only_if_measured() -> None:
    report = {
        "parity": {"cases": [{"noise": "exact", "equal_share": 1.0}, {"noise": "fast", "equal_share": 0.1}]},
        "bandwidth": {"cases": [
            {"network": "float32", "noise": "none", "fraction_of_copy_bandwidth": 0.95},
            {"network": "float32", "noise": "none", "fraction_of_copy_bandwidth": 0.85},
        ]},
        "torch": {"cases": [
            {"student": "larger", "rows": 1, "tick_over_network": 2.0},
            {"student": "larger", "rows": 64, "tick_over_network": 1.04},
            {"student": "larger", "rows": 64, "way": "no graphs", "tick_over_network": 1.5},
        ]},
        "onnxruntime": {"error": "it fell over"},
    }  # fmt: skip
    bits, copy, *ratios = BENCHMARK.targets(report)
    assert (bits["measured"], bits["is_met"]) == (1.0, True)
    assert (copy["measured"], copy["is_met"]) == (0.85, False)
    assert [(ratio["measured"], ratio["is_met"]) for ratio in ratios] == [
        (None, None), (1.04, True), (None, None), (None, None),
    ]  # fmt: skip


def test_a_case_that_fails_keeps_its_name_and_says_where() -> None:
    def fails(divisor: int) -> dict[str, Any]:
        return {"value": 1 // divisor}

    assert BENCHMARK.guarded({"n": 1}, fails, 1) == {"n": 1, "value": 1}
    failed = BENCHMARK.guarded({"n": 0}, fails, 0)
    assert failed["n"] == 0
    assert failed["error"].startswith("ZeroDivisionError: integer division or modulo by zero (test_gpu_benchmark.py:")


def test_a_section_that_crashes_or_hangs_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "gpu.py"
    monkeypatch.setattr(BENCHMARK, "__file__", str(script))
    script.write_text("import os; os.abort()")
    assert BENCHMARK.in_own_process("parity")["error"] == "ended with status -6 and no word"
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(BENCHMARK, "SECTION_S", 1)
    assert BENCHMARK.in_own_process("parity") == {"error": "not done in 1 s"}


@pytest.mark.skipif(find_spec("cupy") is not None, reason="CuPy is installed")
def test_without_a_gpu_the_file_is_written_with_the_reason(tmp_path: Path) -> None:
    out = tmp_path / "made" / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--json", str(out), "--only", "machine,parity"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.strip() == f"failed: machine, parity. {out} holds why; please send it all the same"
    report = json.loads(out.read_text())
    assert report["machine"]["packages"]["numpy"] == np.__version__
    assert report["machine"]["error"] == "the CUDA step needs CuPy: pip install 'fewstep[gpu]'"
    assert report["parity"]["error"] == "CudaError: the CUDA step needs CuPy: pip install 'fewstep[gpu]'"
    assert {target["is_met"] for target in report["targets"]} == {None}


def test_a_section_that_there_is_not_is_refused() -> None:
    command = [sys.executable, str(SCRIPT), "--only", "parity,speed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stderr.startswith("benchmarks/gpu.py: --only speed: there are machine, tests, parity, float64")
