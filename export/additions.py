"""What is added to a finished bundle: its network in other precisions, whole-sampler graphs, TensorRT engines.

The bundle is copied, added to, loaded once and then put in its place, so that a failure leaves all as it was.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import onnx
import torch

from ..runtime.bundle import MANIFEST, Bundle, BundleError, EngineFile, write_manifest
from .engines import Flavour, build_engine
from .onnx_file import save_model
from .precisions import Precision, convert, measure
from .sampler_graph import refuse_second_call, sampler_graph
from .step_graph import ExportError
from .trajectory import trajectory

REPORT = "parity.json"
_CALIBRATION = 32  # trajectories
T = TypeVar("T")


def add_precisions(
    bundle: Bundle, out: Path, precisions: Sequence[Precision], network: torch.nn.Module | None = None
) -> tuple[Bundle, dict[str, Any]]:
    """Write ``precisions/*.onnx`` and ``parity.json``, each precision held against a reference step by step.

    Args:
        bundle: the student.
        out: the folder to write; the bundle's own to add to it.
        precisions: which.
        network: the bundle's in PyTorch, as it was exported. Without it the float32 graph is the only reference, and
            how far that is from PyTorch is known from the bundle's own export.

    Returns:
        The new bundle, and the report: by precision, the error of each step and of the finished samples.

    Raises:
        BundleError: ``out`` is something else already.
    """

    def add(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
        graphs = graphs_of(bundle, ["float32", *precisions])
        with tempfile.TemporaryDirectory() as place:
            paths: dict[Precision, Path] = {}
            for precision, graph in graphs.items():
                keep = folder / "precisions" if precision in precisions else Path(place)
                keep.mkdir(exist_ok=True)
                paths[precision] = keep / f"{precision}.onnx"
                save_model(graph, paths[precision])
            tableau = bundle.tableau()
            measured = measure(bundle, tableau, paths, network=network)
        report: dict[str, Any] = {
            "network_sha256": bundle.weights_sha256,
            "table": {"solver": tableau.name, "steps": tableau.num_steps, "sha256": tableau.sha256},
            "run": {name: found["run"] for name, found in measured.items()},
            "export": fields["metrics"].get("export"),  # of the float32 graph against PyTorch, as it was exported
            "against_torch": {
                name: {"steps": [asdict(step) for step in found["torch"]]}
                for name, found in measured.items()
                if "torch" in found
            },
            "against_float32": {
                name: {"steps": [asdict(step) for step in found["steps"]], "samples": found["samples"]}
                for name, found in measured.items()
            },
        }
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        return report

    return _with(bundle, out, add)


def add_engines(
    bundle: Bundle,
    out: Path,
    *,
    flavour: Flavour = "rtx",
    precisions: Sequence[Precision] = ("float16",),
    batch: tuple[int, int, int] = (1, 8, 64),
    targets: Sequence[str] = (),
    has_sampler: bool = False,
    timing_cache: Path | None = None,
    has_plugin: bool = False,
) -> tuple[Bundle, dict[str, EngineFile]]:
    """Build TensorRT engines into ``engines/`` and record them in the manifest.

    Args:
        bundle: the student.
        out: the folder to write; the bundle's own to add to it.
        flavour: see `engines.build_engine`, as are batch, targets and timing_cache.
        precisions: one engine each.
        batch: see there.
        targets: see there.
        has_sampler: build the whole sampler of the default table's number of steps too.
        timing_cache: see there.
        has_plugin: whether the whole sampler's fused steps are run by our kernel; see `tensorrt_plugin`.

    Returns:
        The new bundle, and the engines that were added, by file.

    Raises:
        ExportError: TensorRT is missing or refuses.
        BundleError: ``out`` is something else already.
    """
    if "int8-cpu" in precisions:
        raise ExportError("int8-cpu is for CPUs: TensorRT takes int8")
    if has_plugin and not has_sampler:
        raise ExportError("plugin: only a whole sampler holds fused steps; ask for the sampler too")

    def add(folder: Path, fields: dict[str, Any]) -> dict[str, EngineFile]:
        (folder / "engines").mkdir(exist_ok=True)
        made: dict[str, EngineFile] = {}
        for precision, graph in graphs_of(bundle, precisions).items():
            kinds = {"step": graph}
            if has_sampler:
                refuse_second_call(bundle)
                default = bundle.tableau()
                kinds["sampler"] = sampler_graph(graph, default.num_steps, default.num_places)
            for kind, model in kinds.items():
                built = build_engine(
                    model, flavour=flavour, batch=batch, targets=targets, timing_cache=timing_cache,
                    has_plugin=has_plugin and kind == "sampler",
                )  # fmt: skip
                name = f"engines/{kind}-{precision}-{flavour}.engine"
                (folder / name).write_bytes(built.data)
                made[name] = EngineFile.model_validate(
                    {"flavour": flavour, "version": built.version, "graph": kind, "precision": precision,
                     "batch": batch, "targets": built.targets, "network_sha256": bundle.weights_sha256}
                )  # fmt: skip
        fields["engines"] = {
            **fields.get("engines", {}),
            **{name: e.model_dump(mode="json") for name, e in made.items()},
        }
        return made

    return _with(bundle, out, add)


def graphs_of(bundle: Bundle, precisions: Sequence[Precision]) -> dict[Precision, onnx.ModelProto]:
    """A bundle's step graph in several precisions; int8 is calibrated on its own trajectories."""
    step = onnx.load(str(bundle.network))
    inputs = []
    if {"int8", "int8-cpu"} & set(precisions):
        calls, _ = trajectory(bundle, bundle.tableau(), bundle.network, _CALIBRATION)
        inputs = [given for given, _ in calls]
    return {precision: convert(step, precision, inputs) for precision in dict.fromkeys(precisions)}


def _with(bundle: Bundle, out: Path, add: Callable[[Path, dict[str, Any]], T]) -> tuple[Bundle, T]:
    is_own = out.exists() and out.resolve() == bundle.path.resolve()
    if out.exists() and not is_own:
        raise BundleError(f"{out}: exists already")
    if is_own and bundle.is_embedded:
        raise BundleError(f"{bundle.name} comes with fewstep and is not changed: name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as place:
        folder = Path(place) / "bundle"
        shutil.copytree(bundle.path, folder)
        fields = json.loads((folder / MANIFEST).read_text("utf-8"))
        del fields["format"], fields["files"]
        added = add(folder, fields)
        write_manifest(folder, fields)
        Bundle.load(folder)
        if is_own:
            out.rename(Path(place) / "old")
        folder.rename(out)
    return Bundle.load(out), added
