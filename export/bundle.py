"""Writing a bundle: the step graph, its tables, its notice and the manifest that hashes them.

The folder appears under its name only when it is whole and has been loaded once.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..runtime.bundle import NETWORK, Bundle, BundleError, write_manifest
from ..runtime.tableau import Tableau
from .step_graph import Parity, export_step_graph
from .trajectory import against_torch


def write_bundle(
    out: Path,
    network: torch.nn.Module,
    tableaus: Sequence[Tableau],
    manifest: Mapping[str, Any],
    *,
    extra_files: Mapping[str, bytes] | None = None,
    half: bool = True,
    replace: bool = False,
) -> tuple[Bundle, Parity]:
    """Export a network and everything it is served with.

    Args:
        out: the folder to make.
        network: see `export_step_graph`.
        tableaus: the solvers it is served with; those fitted to weights must name the ones exported here.
        manifest: the manifest's fields, all but ``format`` and ``files`` (see `runtime.bundle.Manifest`).
        extra_files: more files by their path in the bundle, such as ``NOTICE``.
        half: store weights in float16.
        replace: whether a bundle that is there already may be replaced.

    Returns:
        The bundle as loaded again from its folder, and the graph held against torch.

    Raises:
        BundleError: the folder exists, or what was asked for is no valid bundle.
        ExportError: the graph is not the network.
    """
    if out.exists() and not replace:
        raise BundleError(f"{out}: exists already")
    if out.exists() and not (out / "bundle.json").is_file():
        raise BundleError(f"{out}: is not a bundle, and is not replaced")
    keys = [(tableau.name, tableau.num_steps) for tableau in tableaus]
    for name, steps in keys:
        if keys.count((name, steps)) > 1:
            raise BundleError(f"{out}: two tables for {name} with {steps} steps")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        made = Path(folder) / out.name
        (made / "tableaus").mkdir(parents=True)
        labels = manifest.get("labels")
        num_labels = None
        if labels:
            num_labels = max(len(labels["names"]), (labels.get("null") or 0) + 1)
        guided = manifest.get("guidance") or {}
        scales = (guided["minimum"], guided["maximum"]) if guided.get("mode") == "embedded" else None
        parity = export_step_graph(network, manifest["sample_shape"], made / NETWORK, num_labels, half, scales)
        for tableau in tableaus:
            tableau.save(made / "tableaus" / f"{tableau.name}-{tableau.num_steps}.safetensors")
        for name, data in (extra_files or {}).items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_bytes(data)
        measured: dict[str, Any] = asdict(parity)
        metrics = {**manifest.get("metrics", {}), "export": measured}
        write_manifest(made, {**manifest, "metrics": metrics})
        measured["steps"] = [asdict(error) for error in against_torch(Bundle.load(made), network)]
        write_manifest(made, {**manifest, "metrics": metrics})
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
    return Bundle.load(out), parity
