"""`fewstep evaluate`: how good a checkpoint's or a bundle's samples are, each figure beside its noise floor.

    frechet distance      of normal distributions fitted to features                 less is better
    KID                   of the features themselves; unbiased                       less
    sliced Wasserstein    of the pixels                                              less
    precision, recall     share of samples among real images, and the other way      more
    class accuracy        share of samples that are what was asked for               more
    memorisation          distance to the nearest training image, over that of held-out images; well below 1 is copying
    RMSE to the teacher   from the same noise, where the table adds none             less

The floor of a figure is what held-out images score against the training set. The features are those of a small
classifier whose hash stands in the report: figures of different hashes cannot be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..runtime import Bundle, Engine, Request, Tableau
from ..runtime.schedules import karras
from ..runtime.solvers import SOLVERS
from .architectures import denoiser_of
from .checkpoint import Checkpoint, CheckpointError, load_checkpoint
from .denoiser import Denoiser
from .evaluate import Array, Judge, features_of, frechet, kernel_distance, make_judge, nearest, precision_recall
from .evaluate import sliced_wasserstein as sliced
from .images import Images, load_images, to_float
from .loop import generator
from .methods import method_of
from .recipe import Recipe, recipe_from
from .sampling import sample, student_levels

MOST = 2_000  # images in the figures that compare all pairs


@dataclass(frozen=True, slots=True)
class Figures:
    """What one set of images scored."""

    frechet_distance: float
    kid: float
    sliced_wasserstein: float
    precision: float
    recall: float
    class_accuracy: float | None  # of a network that is told a class
    memorisation: float
    rmse_to_teacher: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """A student's figures over several noise seeds, and their floor."""

    name: str
    solver: str
    num_steps: int
    guidance: float | None
    precision: str
    samples: int  # of each seed
    seeds: int
    mean: Figures
    deviation: Figures | None  # over seeds, of which there are several
    floor: Figures
    floor_samples: int  # held-out images, at most as many as samples; of fewer, the distances of a floor are larger
    features: str  # name and hash of the feature network
    features_accuracy: float  # of its own head on held-out images

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=1)


Sampler = Callable[[int, Tensor], Tensor]  # (seed, labels [N]) -> samples [N, C, H, W]


def evaluate(
    source: str | Path,
    counts: Sequence[int | None] = (None,),
    *,
    data: str | Path | None = None,
    classifier: Path | None = None,
    solver: str | None = None,
    guidance: float | None = None,
    precision: str = "float32",
    samples: int = 1_000,
    seeds: int = 3,
) -> list[Report]:
    """Judge the samples of a checkpoint (a ``.safetensors`` file) or of a bundle, with one or several numbers of steps.

    Args:
        source: the file or folder.
        counts: network calls a sample, a report for each; ``None`` is its own.
        data: its images, if not where its recipe says.
        classifier: the feature network's file; made there if missing. ``classifier.safetensors`` beside a checkpoint.
        solver: a table's name; the default one.
        guidance: scale of a student that is told it, 1 for none.
        precision: of a bundle's network; see `Bundle.network_in`.
        samples: of each seed.
        seeds: of the noise.

    Raises:
        BundleError: the bundle has no such precision or table.
        CheckpointError: ``source`` is neither, or a bundle was not made here and so has no recipe.
        DataError: the images cannot be used.
        ValueError: a checkpoint makes no such table.
    """
    path = Path(source)
    if guidance is not None and not np.isfinite(guidance):
        raise CheckpointError(f"guidance: {guidance:g} should be a finite number; 1 is none")
    tables: list[tuple[Tableau, Sampler, Sampler | None]] = []  # the last: the teacher's samples from the same noise
    if path.is_file():
        if precision != "float32":
            raise CheckpointError(f"precision: a checkpoint is judged in float32, not {precision!r}; export it first")
        checkpoint = load_checkpoint(path)
        recipe, name = checkpoint.recipe, path.stem
        place = classifier or path.parent / "classifier.safetensors"
        for count in counts:
            tableau, run = _of_checkpoint(checkpoint, solver, count, guidance)
            tables.append((tableau, run, _teacher_beside(path, checkpoint, tableau, guidance)))
        is_told = checkpoint.network.config.takes_label
    else:
        bundle = Bundle.load(str(source))
        recipe, name = _recipe_of(bundle), bundle.name
        for count in counts:
            tableau = bundle.tableau(solver, count)
            tables.append((tableau, _of_bundle(bundle, tableau, guidance, precision), None))
        is_told = bundle.manifest.labels is not None
        place = classifier or Path(f"{bundle.name}-classifier.safetensors")
    images = load_images(recipe.data.source, data or recipe.data.path, recipe.data.class_names)
    examiner = Examiner.of(images, make_judge(images, place, recipe.evaluation.classifier_images, recipe.seed))
    label = torch.arange(samples) % len(images.class_names)
    floor, features = examiner.floor(samples), f"fewstep-classifier-64, sha256 {examiner.judge.sha256}"
    reports = []
    for tableau, run, teacher in tables:
        scored = [examiner.figures(run(seed, label), label, teacher and teacher(seed, label)) for seed in range(seeds)]
        if not is_told:
            scored = [replace(figures, class_accuracy=None) for figures in scored]
        report = Report(
            name, tableau.name, tableau.num_steps, guidance, precision, samples, seeds,
            over(scored, np.mean), over(scored, partial(np.std, ddof=1)) if seeds > 1 else None,
            floor, min(samples, len(images.held_out_pixels)), features, examiner.accuracy(),
        )  # fmt: skip
        reports.append(report)
    return reports


@dataclass(frozen=True, slots=True)
class Examiner:
    """A judge and the real images that samples are held against."""

    images: Images
    judge: Judge
    real: Array  # [N, D] pixels of the training set
    real_features: Array  # [N, 64]
    spacing: float  # of held-out images to the nearest of the training set

    @classmethod
    def of(cls, images: Images, judge: Judge) -> Examiner:
        """Look at the real images."""
        real = to_float(images.pixels)
        spacing = nearest(_flat(to_float(images.held_out_pixels)[:MOST]), _flat(real))
        return cls(images, judge, _flat(real), features_of(judge.classifier, real)[0] / judge.scale, spacing)

    def figures(self, x: Tensor, label: Tensor, other: Tensor | None = None) -> Figures:
        """Judge samples ``[N, C, H, W]`` of classes ``label [N]``.

        Args:
            x: the samples.
            label: what was asked for.
            other: the teacher's samples from the same noise, if they can be compared.
        """
        x, judge = x.clamp(-1, 1), self.judge
        features, predicted = features_of(judge.classifier, x)
        features = features / judge.scale
        some = np.random.default_rng(0).permutation(len(self.real_features))[: min(MOST, len(features))]
        precision, recall = precision_recall(features[:MOST], self.real_features[some])
        return Figures(
            frechet(features.mean(0), np.cov(features, rowvar=False), judge.mean, judge.covariance),
            kernel_distance(features[:MOST] / 10, self.real_features[some] / 10),  # whose rms deviation is then 1
            sliced(_flat(x), self.real),
            precision,
            recall,
            float((predicted == label.numpy()).mean()),
            nearest(_flat(x[:MOST]), self.real) / self.spacing,
            None if other is None else float((x - other.clamp(-1, 1)).pow(2).mean().sqrt()),
        )

    def floor(self, samples: int) -> Figures:
        """What as many held-out images score, or all there are."""
        label = torch.from_numpy(self.images.held_out_labels[:samples])
        return self.figures(to_float(self.images.held_out_pixels[:samples]), label)

    def accuracy(self) -> float:
        """Of the classifier's own head on held-out images."""
        predicted = features_of(self.judge.classifier, to_float(self.images.held_out_pixels))[1]
        return float((predicted == self.images.held_out_labels).mean())


def _flat(x: Tensor) -> Array:
    return np.asarray(x.flatten(1).double().numpy())


def over(scored: Sequence[Figures], reduce: Callable[[list[float]], np.floating]) -> Figures:
    """Reduce the figures of several sets to one; a figure that none has stays out."""
    columns: dict[str, list[float | None]] = {}
    for figures in scored:
        for key, value in asdict(figures).items():
            columns.setdefault(key, []).append(value)
    kept: Mapping[str, list[float]] = {k: [v for v in column if v is not None] for k, column in columns.items()}
    return Figures(**{key: float(reduce(column)) if column else None for key, column in kept.items()})  # type: ignore[arg-type]


def _denoiser(checkpoint: Checkpoint, scale: float | None) -> Denoiser:
    """A checkpoint's predictor at a guidance scale; left out, what it was made with."""
    config = checkpoint.network.config
    w = checkpoint.guidance if scale is None else scale - 1
    can_be_told = config.guidance_embedding or checkpoint.kind == "teacher"
    if scale is not None and not can_be_told:
        raise CheckpointError(f"guidance: {scale:g}; that of this student is fixed at {1 + checkpoint.guidance:g}")
    w = w if can_be_told else 0.0
    return denoiser_of(checkpoint.network, config, checkpoint.sigma_data, len(checkpoint.class_names), w)


def _of_checkpoint(
    checkpoint: Checkpoint, solver: str | None, num_steps: int | None, guidance: float | None
) -> tuple[Tableau, Sampler]:
    method = method_of(checkpoint.recipe.student)
    if checkpoint.kind == "teacher":
        solver, levels = solver or "dpmpp_2m", karras(num_steps or 16, 0.01, checkpoint.recipe.student.sigma_max)
    else:
        solver, levels = solver or method.solvers[0], student_levels(checkpoint, num_steps)
    if solver not in SOLVERS:
        raise CheckpointError(f"{solver}: no such solver; there are {', '.join(SOLVERS)}")
    tableau, denoiser = SOLVERS[solver](levels), _denoiser(checkpoint, guidance)

    def run(seed: int, label: Tensor) -> Tensor:
        return sample(denoiser, tableau, label, checkpoint.sample_shape, generator(29, seed))

    return tableau, run


def _teacher_beside(path: Path, student: Checkpoint, tableau: Tableau, guidance: float | None) -> Sampler | None:
    """The teacher's solution of its own equation, from the same noise and with the student's guidance."""
    beside = path.parent / "teacher.safetensors"
    if student.kind == "teacher" or tableau.is_stochastic or not beside.is_file():
        return None
    teacher = load_checkpoint(beside)
    denoiser = replace(_denoiser(teacher, None), guidance=student.guidance if guidance is None else guidance - 1)
    fine = SOLVERS["dpmpp_2m"](karras(32, 0.01, float(tableau.sigma[0])))

    def run(seed: int, label: Tensor) -> Tensor:
        return sample(denoiser, fine, label, student.sample_shape, generator(29, seed))

    return run


def _of_bundle(bundle: Bundle, tableau: Tableau, guidance: float | None, precision: str) -> Sampler:
    def run(seed: int, label: Tensor) -> Tensor:
        engine = Engine(bundle, max_waiting=len(label), precision=precision)
        requests = [
            Request(seed * len(label) + i, tableau, asked if bundle.manifest.labels else None, guidance)
            for i, asked in enumerate(label.tolist())
        ]
        futures = engine.submit(requests)
        while not all(future.done() for future in futures):
            engine.step()
        return torch.from_numpy(np.stack([future.result().pixels for future in futures])).float()

    return run


def _recipe_of(bundle: Bundle) -> Recipe:
    path = bundle.path / "recipe.json"
    if not path.is_file():
        raise CheckpointError(f"{bundle.path}: has no recipe.json, which says what data it is judged by")
    return recipe_from(json.loads(path.read_text("utf-8")))
