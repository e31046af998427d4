"""From a checkpoint to a bundle: the network, the tables it is served with, and what is known of it.

A student is served on the noise levels it was distilled on; the same range is cut into fewer and more steps
for those who want them. A teacher takes its guidance as an input: one call of its graph asks with and without the
class and combines (`Guided`), so a step costs one call, and tables fitted to it are fitted to what is served.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..export import Parity, write_bundle
from ..export.additions import add_precisions
from ..export.precisions import Precision
from ..runtime import Bundle, Tableau
from ..runtime.schedules import karras
from ..runtime.solvers import SOLVERS, ddim, dpmpp_2m, ipndm, unipc
from .checkpoint import Checkpoint, load_checkpoint
from .methods import method_of
from .recipe import Guided as GuidedStudent
from .sampling import on_path, student_levels

STEPS = (1, 2, 3, 4, 6, 8)  # how many a student is offered with, beside its own number


def export_checkpoint(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    version: str = "1",
    description: str | None = None,
    solver: str | None = None,
    notice: Path | None = None,
    replace: bool = False,
    precisions: Sequence[Precision] = (),
) -> tuple[Bundle, Parity]:
    """Make a bundle of a trained network.

    Args:
        path: what `fewstep train` wrote; a ``metrics.json`` beside it goes into the manifest.
        out: the bundle's folder.
        name: the student's name; the recipe's when left out.
        version: the student's version.
        description: one sentence for people; made from the recipe when left out.
        solver: solver of a request that does not say; the method's own when left out.
        notice: a file with the notices that the data's licence asks for, copied as NOTICE.
        replace: whether a bundle that is there already may be replaced.
        precisions: to add to it, each held against the network in PyTorch; see `additions.add_precisions`.

    Raises:
        CheckpointError: the file is no trained network.
        BundleError: the folder exists, or a field is not valid.
    """
    checkpoint = load_checkpoint(path)
    metrics_file = path.parent / "metrics.json"
    metrics = json.loads(metrics_file.read_text("utf-8")) if metrics_file.is_file() else {}
    tables = list(_tables(checkpoint))
    num_classes = len(checkpoint.class_names) if checkpoint.network.config.takes_label else 0
    is_teacher = checkpoint.kind == "teacher"
    steps = 8 if is_teacher else len(checkpoint.sigmas)
    is_guided = is_teacher and bool(num_classes)
    guidance = {"mode": "embedded", "default": 2.0, "minimum": 1.0, "maximum": 6.0} if is_guided else {}
    student, config = checkpoint.recipe.student, checkpoint.network.config
    is_told = isinstance(student, GuidedStudent) and config.guidance_embedding
    if isinstance(student, GuidedStudent) and is_told:
        scale = {"default": student.guidance, "minimum": student.guidance_min, "maximum": student.guidance_max}
        guidance = {"mode": "embedded", **{name: 1 + w for name, w in scale.items()}}
    manifest: dict[str, Any] = {
        "name": name or checkpoint.recipe.name,
        "version": version,
        "description": description or _describe(checkpoint),
        "sample_shape": checkpoint.sample_shape,
        "path": {"edm": "ve", "flow": "flow"}.get(config.prediction, "vp"),
        "output": {"type": config.prediction, "sigma_data": checkpoint.sigma_data},
        "labels": {"names": checkpoint.class_names, "null": num_classes} if num_classes else None,
        "guidance": guidance,
        "default_tableau": {
            "solver": solver or ("dpmpp_2m" if is_teacher else _solvers(checkpoint)[0]),
            "num_steps": steps,
        },
        "licence": checkpoint.licence,
        "provenance": {
            "dataset": checkpoint.dataset,
            "images_seen": str(checkpoint.images),
            "method": _source(checkpoint) if is_teacher else student.method,
            "guidance_baked_in": "none" if is_told else f"{1 + checkpoint.guidance:g}",
            "recipe_sha256": checkpoint.recipe.hash,
        },
        "metrics": metrics,
    }
    files = {"recipe.json": checkpoint.recipe.text.encode()}
    if notice is not None:
        files["NOTICE"] = notice.read_bytes()
    network = Guided(checkpoint.network, num_classes) if is_guided else checkpoint.network
    bundle, parity = write_bundle(out, network, tables, manifest, extra_files=files, replace=replace)
    if precisions:
        bundle, _ = add_precisions(bundle, out, precisions, network)
    return bundle, parity


class Guided(nn.Module):
    """Classifier-free guidance in one call: ``none + guidance * (class - none)``, Ho & Salimans 2022, eq. 6.

    Args:
        network: called with ``x, t, label``.
        no_class: the label that means "no class".
    """

    def __init__(self, network: nn.Module, no_class: int) -> None:
        super().__init__()
        self.network, self.no_class = network, no_class

    def forward(self, x: Tensor, t: Tensor, label: Tensor, guidance: Tensor) -> Tensor:
        """Run the network on twice the rows; ``guidance [B]``, 1 for none."""
        labels = torch.cat([label, torch.full_like(label, self.no_class)])
        both = self.network(torch.cat([x, x]), torch.cat([t, t]), labels)
        said, unsaid = both.unflatten(0, (2, -1)).unbind(0)
        return unsaid + guidance[:, None, None, None] * (said - unsaid)  # type: ignore[no-any-return]


def _tables(checkpoint: Checkpoint) -> Iterable[Tableau]:
    config = checkpoint.network.config
    if checkpoint.kind == "teacher":
        for steps in (3, 4, 5, 6, 7, 8, 12, 16, 32):
            top = checkpoint.recipe.student.sigma_max
            levels = on_path(karras(steps, 0.05 if steps <= 8 else 0.01, top), config)
            yield from (ddim(levels), dpmpp_2m(levels))
            if steps <= 16:
                yield from (ipndm(levels, 2), ipndm(levels, 3), unipc(levels, 2))
        return
    own = len(checkpoint.sigmas)
    other = STEPS if method_of(checkpoint.recipe.student).any_steps else ()
    for steps in sorted({*other, own}):
        levels = student_levels(checkpoint, steps)
        for solver in _solvers(checkpoint):
            if steps > 2 or solver != "dpmpp_2m" or steps == own:
                yield SOLVERS[solver](on_path(levels, config))


def _solvers(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of a student's solvers, the default first."""
    student = checkpoint.recipe.student
    is_last = len(checkpoint.sigmas) == student.num_steps
    return method_of(student).solvers if is_last else ("ddim",)  # a stage on the way is deterministic


def _source(checkpoint: Checkpoint) -> str:
    folder = checkpoint.recipe.network.folder
    return "denoising, EDM" if folder is None else f"diffusers, {Path(folder).name}"


def _describe(checkpoint: Checkpoint) -> str:
    channels, height, width = checkpoint.sample_shape
    size = f"{width}x{height} {'grey' if channels == 1 else 'colour'}"
    if checkpoint.kind == "teacher":
        return f"Diffusion model of {checkpoint.dataset}, {size}, guidance as an input"
    guided = f", guidance {1 + checkpoint.guidance:g} baked in" if checkpoint.guidance else ""
    if checkpoint.network.config.guidance_embedding:
        guided = ", guidance as an input"
    method = checkpoint.recipe.student.method
    return f"{len(checkpoint.sigmas)}-step {method} student of {checkpoint.dataset}, {size}{guided}"
