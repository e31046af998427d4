"""What the GPU path does on a machine with a GPU, in one file. Not run on a GPU yet.

    make gpu                  or      python benchmarks/gpu.py --json docs/results/gpu.json

Each section runs in a process of its own, and each of its cases is guarded: what fails, crashes or hangs is recorded
with its error, and the rest goes on. The file is written after every section.

    machine     GPU, driver, libraries
    tests       the tests marked gpu
    parity      the CUDA step against the CPU's: the share of equal bits, the largest difference; exact and fast noise
    float64     the CUDA step and the CPU's against equation (1) in float64
    bandwidth   the CUDA step against a copy of as many bytes, by dtype, noise and history
    unfused     the CUDA step against the same step in PyTorch, plain and compiled
    onnxruntime, torch, tensorrt full, tensorrt rtx
                engine ticks beside the network alone, with CUDA graphs and without, and samples against the CPU's
    targets     what was aimed at, and whether it was reached
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.export import write_bundle
from fewstep.export.additions import add_engines
from fewstep.export.engines import Flavour
from fewstep.export.precisions import Precision
from fewstep.export.torch_backend import torch_backend
from fewstep.kernels import StepRow, fused_step, normals, pack_rows
from fewstep.kernels.cuda import NETWORKS, CudaError, CudaStep, Network, Noise
from fewstep.runtime import Bundle, Engine, Request, Tableau
from fewstep.runtime.backends import Backend
from fewstep.runtime.gpu_backends import OnnxCudaBackend, TensorRTBackend
from fewstep.runtime.schedules import karras
from fewstep.runtime.solvers import ancestral
from fewstep.training import NetworkConfig, UNet

Array = NDArray[Any]
Report = dict[str, Any]
Runnable = tuple[Bundle, Callable[[Bundle, int], Backend]]
Way = tuple[str, Callable[[], Runnable]]  # a name, and what makes it

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
PACKAGES = ("fewstep", "numpy", "cupy-cuda13x", "cuda-bindings", "nvidia-cuda-nvrtc", "torch", "onnxruntime",
            "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13")  # fmt: skip
FLAVOURS: tuple[Flavour, ...] = ("full", "rtx")
PRECISIONS: tuple[Precision, ...] = ("float32", "float16")
SECTION_S = 1200  # a section that takes longer is given up


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    rows: int = 64
    elements: int = 196_608  # 50 MB a float32 tensor
    launches: int = 50
    batches: int = 40  # random ones, for parity
    networks: tuple[int, ...] = (1, 8, 64)  # rows
    pixels: int = 64  # of the larger student
    channels: int = 128
    steps: int = 32


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"sections, of {','.join(SECTIONS)}")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--section", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        print(json.dumps(SECTIONS[options.section](Sizes())))
        return
    names = options.only.split(",") if options.only else list(SECTIONS)
    if unknown := set(names) - set(SECTIONS):
        raise SystemExit(f"benchmarks/gpu.py: --only {', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    report: Report = {"command": "python benchmarks/gpu.py"}
    for name in names:
        print(f"{name} ...", end=" ", flush=True)
        start_s = time.monotonic()
        report[name] = in_own_process(name)
        failures = [case for case in report[name].get("cases", []) if "error" in case]
        took = f"{time.monotonic() - start_s:.0f} s" + (f", {len(failures)} cases failed" if failures else "")
        print(report[name].get("error", took), flush=True)
        report["targets"] = targets(report)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    for target in report["targets"]:
        print(f"{target['target']}: {'not measured' if target['measured'] is None else target['measured']}")
    if failed := [name for name in names if "error" in report[name]]:
        raise SystemExit(f"failed: {', '.join(failed)}. {options.json} holds why; please send it all the same")
    print(f"Please send {options.json}")


def in_own_process(section: str) -> Report:
    """A section's report, or its error."""
    command = [sys.executable, str(Path(__file__).resolve()), "--section", section]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECTION_S, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {SECTION_S} s"}
    try:
        made: Report = json.loads(done.stdout.strip().splitlines()[-1])
        return made
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines() or [f"ended with status {done.returncode} and no word"]
        return {"error": said[-1], "stderr": said[-40:]}


def guarded(case: Report, measure: Callable[..., Report], *arguments: Any) -> Report:
    """A case's figures beside what says which case it is; or its error."""
    try:
        return {**case, **measure(*arguments)}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = str(error).splitlines() or [""]
        return {**case, "error": f"{type(error).__name__}: {said[0]} ({Path(where.filename).name}:{where.lineno})"}


# --- machine and tests


def machine(sizes: Sizes) -> Report:
    """What it was measured on."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    found: Report = {"python": platform.python_version(), "system": platform.platform(), "packages": packages}
    for command in (
        "git rev-parse HEAD",
        "nvidia-smi --format=csv --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit",
    ):
        try:
            done = subprocess.run(command.split(), capture_output=True, text=True, timeout=60, check=False)
            found[command.split()[0]] = done.stdout.strip().splitlines()
        except (OSError, subprocess.TimeoutExpired) as error:
            found[command.split()[0]] = [str(error)]
    try:
        cupy = Gpu().cupy
    except CudaError as error:
        return {**found, "error": str(error)}
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    wanted = ("name", "totalGlobalMem", "multiProcessorCount", "memoryBusWidth", "memoryClockRate", "l2CacheSize")
    told = {name: properties[name] for name in wanted if name in properties}
    found["gpu"] = {name: value.decode() if isinstance(value, bytes) else value for name, value in told.items()}
    found["capability"] = cupy.cuda.Device().compute_capability
    found["driver"] = cupy.cuda.runtime.driverGetVersion()
    return found


def tests(sizes: Sizes) -> Report:
    """The tests marked gpu."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECTION_S, check=False, cwd=root)
    lines = done.stdout.strip().splitlines()
    report: Report = {
        "summary": lines[-1] if lines else "",
        "skipped": [line for line in lines if line.startswith("SKIPPED")],
    }
    if done.returncode:
        report |= {"error": f"pytest ended with {done.returncode}", "said": lines[-120:]}
    return report


# --- the step


class Gpu:
    """CuPy, with a stream of its own for what is measured."""

    def __init__(self) -> None:
        CudaStep()  # says what is missing
        import cupy

        self.cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def up(self, *arrays: Array) -> list[Any]:
        """Copies on the device; CuPy has no bfloat16."""
        return [self.cupy.asarray(a.view(np.uint16) if a.dtype == ml_dtypes.bfloat16 else a) for a in arrays]

    def milliseconds(self, call: Callable[[], Any], launches: int) -> tuple[float, float]:
        """What one call takes the device, and the host to ask for it: medians.

        Many calls are asked for between two events, after as many that keep the device busy meanwhile; one at a time,
        the host's work would count as the device's. The first figure is the device's if it is the larger one.
        """
        for _ in range(5):
            call()
        on_device, on_host = [], []
        for _ in range(9):
            start, stop = self.cupy.cuda.Event(), self.cupy.cuda.Event()
            for _ in range(launches):
                call()
            start.record(self.stream)
            start_s = time.perf_counter()
            for _ in range(launches):
                call()
            on_host.append(1000 * (time.perf_counter() - start_s) / launches)
            stop.record(self.stream)
            stop.synchronize()
            on_device.append(self.cupy.cuda.get_elapsed_time(start, stop) / launches)
        return statistics.median(on_device), statistics.median(on_host)


def batch(rng: np.random.Generator, rows: int, elements: int, history: int, dtype: Any, c: float = 0.3) -> list[Array]:
    """Arguments of a step, table first: every term is read, the newest prediction is clipped, half the rows guided."""
    table = []
    for i in range(4):
        a, k_x, *b = rng.uniform(-0.6, 0.6, history + 2)
        table.append(StepRow(k_x, -0.7, -1.0, 1.0, a, tuple(b), c, 0.5, i % history, int(rng.integers(2**32))))
    uncond = np.full(rows, -1, np.int32)
    uncond[::2] = rows + np.arange(len(uncond[::2]))
    return [
        pack_rows(table, history), rng.integers(0, 4, rows).astype(np.int32),
        rng.standard_normal((rows, elements), np.float32), rng.standard_normal((rows, history, elements), np.float32),
        rng.standard_normal((rows + -(-rows // 2), elements), np.float32).astype(dtype), uncond,
        rng.uniform(1, 3, rows).astype(np.float32), rng.integers(0, 2**64, rows, np.uint64),
        np.zeros((rows, elements), dtype),
    ]  # fmt: skip


def bytes_of(table: Array) -> Array:
    """A packed table as the device takes it."""
    return np.frombuffer(table.tobytes(), np.uint8).reshape(len(table), -1)


def stepped(gpu: Gpu, step: CudaStep, arguments: list[Array]) -> list[Array]:
    """x, history and network input after a step on the device."""
    with gpu.stream:
        device = gpu.up(bytes_of(arguments[0]), *arguments[1:])
        step(*device)
        return [gpu.cupy.asnumpy(device[i], gpu.stream).view(arguments[i].dtype) for i in (2, 3, 8)]


def parity(sizes: Sizes) -> Report:
    """Bits of the device against bits of the CPU, over random batches."""
    gpu = Gpu()

    def measure(network: Network, noise: Noise) -> Report:
        step, rng = CudaStep(network, noise), np.random.default_rng(1)
        equal = total = 0
        largest = 0.0
        for _ in range(sizes.batches):
            elements, history = int(rng.choice([1, 7, 64, 784, 3072, 12289])), int(rng.choice([1, 2, 4, 8, 11]))
            arguments = batch(rng, int(rng.integers(1, 9)), elements, history, DTYPES[network])
            ours = stepped(gpu, step, arguments)
            fused_step(*arguments)
            for one, other in zip(ours, (arguments[i] for i in (2, 3, 8)), strict=True):
                bits = np.dtype(f"u{one.dtype.itemsize}")
                equal += int((one.view(bits) == other.view(bits)).sum())
                total += one.size
                largest = max(largest, float(np.abs(one.astype(np.float32) - other.astype(np.float32)).max()))
        return {"numbers": total, "equal_share": equal / total, "largest_difference": largest}

    noises: tuple[Noise, ...] = ("exact", "fast")
    return {"cases": [guarded({"network": n, "noise": k}, measure, n, k) for n in NETWORKS for k in noises]}


def in_float64(arguments: list[Array]) -> tuple[Array, Array]:
    """Equation (1) in float64: x after the step, and the sum of its terms' magnitudes."""
    table, row, x, history, raw, uncond, guidance, seed, _ = arguments
    made, magnitudes = [], []
    for i, w in enumerate(table[row]):
        said, now = raw[i].astype(np.float64), x[i].astype(np.float64)
        if uncond[i] >= 0:
            base = raw[uncond[i]].astype(np.float64)
            said = base + float(guidance[i]) * (said - base)
        m = np.clip(float(w["k_x"]) * now + float(w["k_m"]) * said, w["clip_min"], w["clip_max"])
        past = history[i].astype(np.float64)
        past[w["write_slot"]] = m
        noise = normals(seed[i : i + 1], np.array([w["noise_id"]]), len(now))[0].astype(np.float64)
        terms = np.stack([float(w["a"]) * now, *(w["b"][:, None].astype(np.float64) * past), float(w["c"]) * noise])
        made.append(terms.sum(axis=0))
        magnitudes.append(np.abs(terms).sum(axis=0))
    return np.stack(made), np.stack(magnitudes)


def float64(sizes: Sizes) -> Report:
    """How far a step is from the formula: in roundings of float32, of the sum of the terms' magnitudes."""
    gpu = Gpu()

    def measure(history: int) -> Report:
        arguments = batch(np.random.default_rng(2), 8, min(sizes.elements, 12_288), history, np.float32)
        wanted, magnitude = in_float64(arguments)
        roundings = np.finfo(np.float32).eps / 2 * magnitude
        (ours, *_) = stepped(gpu, CudaStep("float32"), arguments)
        fused_step(*arguments)
        return {
            "cuda": float((np.abs(ours - wanted) / roundings).max()),
            "cpu": float((np.abs(arguments[2] - wanted) / roundings).max()),
        }

    return {
        "unit": "half an ulp of the sum of the terms' magnitudes; the noise is given",
        "cases": [guarded({"history": history}, measure, history) for history in (1, 2, 4, 8)],
    }


def bandwidth(sizes: Sizes) -> Report:
    """Times of the step and of a copy that moves as many bytes."""
    gpu = Gpu()

    def measure(network: Network, noise: str, history: int) -> Report:
        step = CudaStep(network, "fast" if noise == "fast" else "exact")
        c = 0.0 if noise == "none" else 0.1
        arguments = batch(np.random.default_rng(0), sizes.rows, sizes.elements, history, DTYPES[network], c)
        arguments[1][...] = 0  # one table row for all, so that what is moved is known
        stored = arguments[8].dtype.itemsize
        # In: x, all slots but the one that is written, the outputs. Out: x, a slot, an input.
        moved = sizes.rows * sizes.elements * 4 * (2 + history) + (arguments[4].size + arguments[8].size) * stored
        with gpu.stream:
            device = gpu.up(bytes_of(arguments[0]), *arguments[1:])
            source, target = gpu.up(np.zeros(moved // 2, np.uint8), np.zeros(moved // 2, np.uint8))
            step_ms, host_ms = gpu.milliseconds(lambda: step(*device), sizes.launches)
            copy_ms, _ = gpu.milliseconds(
                lambda: target.data.copy_from_device_async(source.data, source.nbytes, gpu.stream), sizes.launches
            )
        return {
            "megabytes": moved / 1e6, "step_ms": step_ms, "copy_ms": copy_ms, "host_ms": host_ms,
            "gigabytes_per_s": moved / step_ms / 1e6, "fraction_of_copy_bandwidth": copy_ms / step_ms,
        }  # fmt: skip

    cases: list[tuple[Network, str, int]] = [(n, k, 2) for n in NETWORKS for k in ("none", "exact", "fast")]
    cases += [("float32", "none", history) for history in (1, 4, 8)]
    return {
        "rows": sizes.rows,
        "elements": sizes.elements,
        "cases": [guarded({"network": n, "noise": k, "history": h}, measure, n, k, h) for n, k, h in cases],
    }


# --- PyTorch


def torch_step(
    w: Any, x: Any, history: Any, said: Any, base: Any, guidance: Any, network_input: Any, slot: int, has_noise: bool
) -> None:
    """The step as one writes it in PyTorch: coefficients by row, ``[rows, 1]`` each, in the dict ``w``."""
    wide = base.float()
    m = (w["k_x"] * x + w["k_m"] * (wide + guidance * (said.float() - wide))).clamp(-1.0, 1.0)
    history[:, slot] = m
    y = w["a"] * x + (w["b"][:, :, None] * history).sum(1)
    if has_noise:
        y = y + w["c"] * torch.randn_like(y)
    x.copy_(y)
    network_input.copy_(w["c_in"] * y)


def for_torch(arguments: list[Array], device: str) -> list[Any]:
    """The arguments of `torch_step`, all but the last two; every row guided."""
    table, row, x, history, raw, _, guidance, _, network_input = arguments
    told = table[row]
    half = torch.bfloat16 if raw.dtype == ml_dtypes.bfloat16 else torch.float16

    def up(array: Array) -> Any:
        wide = torch.from_numpy(np.ascontiguousarray(array).astype(np.float32))
        return wide.to(device, half if array.dtype.itemsize == 2 else torch.float32)

    w = {name: up(told[name][:, None]) for name in ("k_x", "k_m", "a", "c", "c_in")} | {"b": up(told["b"])}
    base = np.resize(raw[len(x) :], x.shape)  # half the rows have one of their own
    return [w, up(x), up(history), up(raw[: len(x)]), up(base), up(guidance[:, None]), up(network_input)]


def unfused(sizes: Sizes) -> Report:
    """Times of the step here and in PyTorch."""
    gpu = Gpu()
    if not torch.cuda.is_available():
        raise RuntimeError("torch has no CUDA device here")
    external = torch.cuda.ExternalStream(gpu.stream.ptr)  # type: ignore[no-untyped-call]

    def measure(network: Network, has_noise: bool) -> Report:
        c = 0.1 if has_noise else 0.0
        arguments = batch(np.random.default_rng(0), sizes.rows, sizes.elements, 2, DTYPES[network], c)
        arguments[1][...] = 0
        slot = int(arguments[0]["write_slot"][0])
        report: Report = {}
        with gpu.stream, torch.cuda.stream(external), torch.inference_mode():
            device = gpu.up(bytes_of(arguments[0]), *arguments[1:])
            step = CudaStep(network)
            report["fused_ms"], _ = gpu.milliseconds(lambda: step(*device), sizes.launches)
            given = for_torch(arguments, "cuda")

            def time_of(run: Callable[..., None]) -> Report:
                ms, host_ms = gpu.milliseconds(lambda: run(*given, slot, has_noise), sizes.launches)
                return {"ms": ms, "host_ms": host_ms}

            for name, run in {"eager": torch_step, "compiled": torch.compile(torch_step)}.items():
                made = guarded({}, time_of, run)
                report |= {f"{name}_{key}": value for key, value in made.items()}
                if "ms" in made:
                    report[f"{name}_over_fused"] = made["ms"] / report["fused_ms"]
        return report

    return {
        "note": "half of the fused step's rows are guided, all of PyTorch's; its noise is its own generator's",
        "cases": [guarded({"network": n, "noise": k}, measure, n, k) for n in NETWORKS for k in (False, True)],
    }


# --- networks


def larger_student(folder: Path, sizes: Sizes) -> tuple[Bundle, torch.nn.Module]:
    """A student of random weights, and its torch module."""
    shape = (3, sizes.pixels, sizes.pixels)
    network = UNet(NetworkConfig(shape, num_classes=10, channels=sizes.channels))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter + 0.02 * torch.randn(parameter.shape, generator=generator))
    manifest = {
        "name": "larger", "version": "1", "description": "Random weights.", "sample_shape": shape, "path": "ve",
        "output": {"type": "edm"}, "labels": {"names": [f"class {i}" for i in range(10)]},
        "default_tableau": {"solver": "ancestral", "num_steps": 4}, "licence": "none",
        "provenance": {"weights": "random"}, "metrics": {},
    }  # fmt: skip
    bundle, _ = write_bundle(folder / "larger", network, [ancestral(karras(4))], manifest)
    return bundle, network


def on_onnxruntime(bundle: Bundle, module: Any, folder: Path, sizes: Sizes) -> Iterator[Way]:
    """ONNX Runtime."""
    yield "float32", partial(_pair, bundle, OnnxCudaBackend)


def on_torch(bundle: Bundle, module: Any, folder: Path, sizes: Sizes) -> Iterator[Way]:
    """The torch module, of a student that has one."""
    if module is not None:
        for has_graphs in (True, False):
            make = torch_backend(module, "cuda", has_graphs)
            yield "graphs" if has_graphs else "no graphs", partial(_pair, bundle, make)


def on_tensorrt(flavour: Flavour, bundle: Bundle, module: Any, folder: Path, sizes: Sizes) -> Iterator[Way]:
    """Engines, each built when it is first asked for."""
    most = max(sizes.networks)

    def made(precision: Precision, has_graphs: bool) -> Runnable:
        out = folder / f"{bundle.name}-{precision}"
        if not out.exists():
            batch = (1, max(1, most // 8), most)
            add_engines(bundle, out, flavour=flavour, precisions=[precision], batch=batch)
        return Bundle.load(out), lambda loaded, rows: TensorRTBackend(loaded, rows, has_graphs)

    for precision in PRECISIONS:
        for has_graphs in (True, False):
            name = f"{precision}, {'graphs' if has_graphs else 'no graphs'}"
            yield name, partial(made, precision, has_graphs)


def _pair(bundle: Bundle, make: Callable[[Bundle, int], Backend]) -> Runnable:
    return bundle, make


def tick_times(runnable: Callable[[], Runnable], rows: int, sizes: Sizes) -> Report:
    """Ticks of a full engine beside its network alone."""
    bundle, make = runnable()
    made: list[Backend] = []

    def backend(loaded: Bundle, outputs: int) -> Backend:
        made.append(make(loaded, outputs))
        return made[0]

    engine = Engine(bundle, max_rows=rows, backend=backend)
    engine.warm_up()
    network, device = made[0], made[0].device
    alone: list[float] = []
    with device.turn:
        for _ in range(sizes.launches):
            start_s = time.perf_counter()
            network(rows)
            device.wait()
            alone.append(1000 * (time.perf_counter() - start_s))
    tableau = ancestral(karras(sizes.steps))
    ticks, whole_ms = [], 0.0
    for _ in range(1 + sizes.launches // sizes.steps):
        engine.submit(requests(bundle, tableau, rows))
        while engine.has_work:
            is_full = engine.num_running == rows
            start_s = time.perf_counter()
            engine.step()
            took_ms = 1000 * (time.perf_counter() - start_s)
            whole_ms += took_ms
            if is_full and engine.num_running == rows:  # nobody joins or ends
                ticks.append(took_ms)
    network_ms, tick_ms = statistics.median(alone), statistics.median(ticks)
    mean_ms = whole_ms / engine.counters.ticks
    few = requests(bundle, bundle.tableau(), min(rows, 4))
    here, there = Engine(bundle, max_rows=4, threads=1).generate(few), engine.generate(few)
    theirs, ours = (np.stack([sample.pixels for sample in samples]) for samples in (here, there))
    return {
        "network_ms": network_ms, "tick_ms": tick_ms, "tick_over_network": tick_ms / network_ms,
        "mean_tick_over_network": mean_ms / network_ms, "samples_per_s": 1000 * rows / sizes.steps / mean_ms,
        "against_cpu": {
            "largest_difference": float(np.abs(ours - theirs).max()),
            "relative": float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))),
        },
    }  # fmt: skip


def requests(bundle: Bundle, tableau: Tableau, num: int) -> list[Request]:
    """Some."""
    labels = bundle.manifest.labels
    return [Request(i, tableau, i % len(labels.names) if labels else None) for i in range(num)]


def network(ways: Callable[[Bundle, Any, Path, Sizes], Iterator[Way]], sizes: Sizes) -> Report:
    """A backend in its ways, for the embedded student and a larger one."""
    Gpu()
    cases: list[Report] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for bundle, module in ((Bundle.load(), None), larger_student(folder, sizes)):
            for name, make in ways(bundle, module, folder, sizes):
                for rows in sizes.networks:
                    case = {"student": bundle.name, "way": name, "rows": rows}
                    cases.append(guarded(case, tick_times, make, rows, sizes))
    return {"steps": sizes.steps, "pixels": sizes.pixels, "channels": sizes.channels, "cases": cases}


# --- what it comes to


def targets(report: Report) -> list[Report]:
    """What was aimed at, from the sections that were measured."""

    def cases(section: str, **wanted: Any) -> list[Report]:
        every = report.get(section, {}).get("cases", [])
        return [c for c in every if "error" not in c and all(c.get(name) == value for name, value in wanted.items())]

    made: list[Report] = []

    def add(target: str, values: list[float], is_met: Callable[[float], bool], which: Callable[..., float]) -> None:
        measured = which(values) if values else None
        made.append({"target": target, "measured": measured, "is_met": None if measured is None else is_met(measured)})

    exact = [case["equal_share"] for case in cases("parity", noise="exact")]
    add("the CPU's bits, exact noise: share that is equal", exact, lambda v: v == 1, min)
    copy = [case["fraction_of_copy_bandwidth"] for case in cases("bandwidth", network="float32", noise="none")]
    add("float32 step of copy bandwidth, at least 0.9", copy, lambda v: v >= 0.9, min)
    for name in STUDENTS_ON:
        of = cases(name, student="larger")
        ratios = [c["tick_over_network"] for c in of if c["rows"] == max(c["rows"] for c in of)]
        best = f"{name}: tick over the network alone, larger student, largest batch, best way, at most 1.05"
        add(best, ratios, lambda v: v <= 1.05, min)
    return made


SECTIONS: dict[str, Callable[[Sizes], Report]] = {
    "machine": machine,
    "tests": tests,
    "parity": parity,
    "float64": float64,
    "bandwidth": bandwidth,
    "unfused": unfused,
    "onnxruntime": partial(network, on_onnxruntime),
    "torch": partial(network, on_torch),
    "tensorrt full": partial(network, partial(on_tensorrt, "full")),
    "tensorrt rtx": partial(network, partial(on_tensorrt, "rtx")),
}
STUDENTS_ON = ("onnxruntime", "torch", "tensorrt full", "tensorrt rtx")


if __name__ == "__main__":
    try:
        main()
    except CudaError as error:
        raise SystemExit(f"CudaError: {error}") from None
