"""How good samples are: distance of feature distributions, class accuracy, diversity.

The features are the pre-activation penultimate layer of a small classifier trained on the same data, so a
figure means something only beside others of the same classifier: never call it FID. Every arm gets the
same number of samples, since the distance is biased by about 1/n, and the floor (held-out images against
the training set, with that many) is always printed beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import CheckpointError, read_tensors, write_bytes, write_tensors
from .images import DataError, Images, to_float
from .loop import TrainingError, generator

Array = NDArray[np.float64]
WIDTH = 64  # of the feature layer


class Classifier(nn.Module):
    """Three convolutions, a feature layer, a class layer; large images are halved first, to be cheap."""

    def __init__(self, sample_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = sample_shape
        first = 2 if min(height, width) >= 16 else 1
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride=first, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        places = (-(-height // first) + 1) // 2 * ((-(-width // first) + 1) // 2)
        self.features = nn.Linear(64 * places, WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images ``[B, C, H, W]`` in [-1, 1] to features ``[B, 64]`` and class scores ``[B, classes]``."""
        features = self.features(self.body(x).flatten(1))
        return features, self.head(F.relu(features))


def train_classifier(images: Images, count: int, seed: int) -> Classifier:
    """Train the feature network on ``count`` images, lightly noised so that it is defined beside the data."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = Classifier(images.sample_shape, len(images.class_names))
    rng, batch = generator(seed, 7), 128
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    steps = max(1, count // batch)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        rows = torch.randint(len(images.pixels), (batch,), generator=rng).numpy()
        x = to_float(images.pixels[rows])
        x = x + 0.1 * torch.rand(batch, 1, 1, 1, generator=rng) * torch.randn(x.shape, generator=rng)
        _, scores = classifier(x)
        optimizer.zero_grad()
        loss = F.cross_entropy(scores, torch.from_numpy(images.labels[rows]))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return classifier.eval()


@torch.no_grad()
def features_of(classifier: Classifier, x: Tensor) -> tuple[Array, NDArray[np.int64]]:
    """Features ``[N, 64]`` and predicted classes ``[N]`` of images in [-1, 1].

    Raises:
        TrainingError: an image has a pixel that is not a number.
    """
    if not torch.isfinite(x).all():
        raise TrainingError(
            "samples are not finite: the network has not learned, or it is asked beyond what it learned"
        )
    parts = torch.split(x, 512)
    features, scores = zip(*(classifier(part) for part in parts), strict=True)
    return torch.cat(features).double().numpy(), torch.cat(scores).argmax(1).numpy()


@dataclass(frozen=True, slots=True)
class Scores:
    """What one set of samples scored."""

    fd: float  # Frechet distance to the training set; less is better
    accuracy: float  # share the classifier puts in the class asked for
    diversity: float  # mean distance of two samples of a class, in pixels
    by_class: tuple[float, ...]  # accuracy of each class


@dataclass(frozen=True, slots=True)
class Judge:
    """A classifier and what the training set looks like to it."""

    classifier: Classifier
    num_classes: int
    scale: float  # features are divided by this, so that their rms deviation is 10
    mean: Array  # [64]
    covariance: Array  # [64, 64]
    sha256: str  # of the classifier's file

    def scores(self, x: Tensor, label: Tensor) -> Scores:
        """Judge images ``[N, C, H, W]`` in [-1, 1] that were asked to be of classes ``label [N]``."""
        x = x.clamp(-1, 1)
        features, predicted = features_of(self.classifier, x)
        asked = label.numpy()
        right = predicted == asked
        moments = (features / self.scale).mean(0), np.cov(features / self.scale, rowvar=False)
        return Scores(
            fd=frechet(*moments, self.mean, self.covariance),
            accuracy=float(right.mean()),
            diversity=diversity(x, label),
            by_class=tuple(float(right[asked == c].mean()) for c in range(self.num_classes) if (asked == c).any()),
        )


def make_judge(images: Images, path: Path, count: int, seed: int) -> Judge:
    """Load the classifier at ``path``, or train it and save it there; then look at the training set.

    Raises:
        CheckpointError: the file is of another network.
        DataError: there are too few images to compare with.
    """
    if min(len(images.pixels), len(images.held_out_pixels)) < 4:
        counts = f"{len(images.pixels)} images and {len(images.held_out_pixels)} held-out ones"
        raise DataError(f"{counts}: to judge by takes 4 of each")
    if not path.exists():
        classifier = train_classifier(images, count, seed)
        _, predicted = features_of(classifier, to_float(images.held_out_pixels))
        accuracy = float((predicted == images.held_out_labels).mean())
        write_tensors(path, classifier.state_dict(), {"held_out_accuracy": accuracy})
    classifier = Classifier(images.sample_shape, len(images.class_names)).eval()
    try:
        classifier.load_state_dict(read_tensors(path)[0])
    except RuntimeError:
        raise CheckpointError(f"{path}: not a classifier of these images; name another file, or none") from None
    features, _ = features_of(classifier, to_float(images.pixels))
    scale = float(np.sqrt(features.var(0).mean()) / 10)
    features /= scale
    return Judge(
        classifier, len(images.class_names), scale, features.mean(0), np.cov(features, rowvar=False),
        hashlib.sha256(path.read_bytes()).hexdigest(),
    )  # fmt: skip


def frechet(mean: Array, covariance: Array, other_mean: Array, other_covariance: Array) -> float:
    """Frechet distance of two normal distributions, from means ``[D]`` and covariances ``[D, D]``.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``; the trace of the root is that of the symmetric
    ``(C1^(1/2) C2 C1^(1/2))^(1/2)``, which needs eigenvalues only.
    """
    values, vectors = np.linalg.eigh(covariance + 1e-6 * np.eye(len(covariance)))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ other_covariance @ root).clip(0)).sum()
    return float(((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * cross)


def diversity(x: Tensor, label: Tensor, most: int = 200) -> float:
    """Mean Euclidean distance of two images of the same class, over at most ``most`` images a class."""
    distances = []
    for value in set(label.tolist()):
        flat = x[label == value][:most].flatten(1)
        if len(flat) > 1:
            distances.append(torch.pdist(flat).mean().item())
    return float(np.mean(distances)) if distances else 0.0


def write_metrics(path: Path, metrics: Mapping[str, object]) -> None:
    """Write metrics as JSON, atomically."""
    write_bytes(path, json.dumps(metrics, indent=1).encode())


def kernel_distance(a: Array, b: Array) -> float:
    """KID: the unbiased squared distance of features ``[N, D]`` under the kernel ``(x y / D + 1)^3``.

    Binkowski et al. 2018 (arXiv:1801.01401), section 4. Negative values are noise about zero.
    """
    inside_a, inside_b, across = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    return float(
        (inside_a.sum() - inside_a.trace()) / (n * (n - 1))
        + (inside_b.sum() - inside_b.trace()) / (m * (m - 1))
        - 2 * across.mean()
    )


def sliced_wasserstein(a: Array, b: Array, projections: int = 256) -> float:
    """Root mean square difference of the sorted projections of ``[N, D]`` on fixed random directions, per dimension.

    Sets of different sizes are compared at the quantiles of the smaller one.
    """
    directions = np.random.default_rng(0).standard_normal((a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    share = (np.arange(min(len(a), len(b))) + 0.5) / min(len(a), len(b))

    def quantiles(x: Array) -> Array:
        ordered, place = np.sort(x @ directions, axis=0), (share * len(x) - 0.5).clip(0, len(x) - 1)
        below = np.floor(place).astype(int).clip(max=max(0, len(x) - 2))
        rest = (place - below)[:, None]
        return np.asarray((1 - rest) * ordered[below] + rest * ordered[np.minimum(below + 1, len(x) - 1)])

    return float(np.sqrt(((quantiles(a) - quantiles(b)) ** 2).mean()))


def precision_recall(samples: Array, real: Array, k: int = 3) -> tuple[float, float]:
    """Shares of samples near real images, and of real images near samples, in features.

    Near means within the distance of some neighbour to its own k-th. Kynkaanniemi et al. 2019 (arXiv:1904.06991),
    eq. 1 and 2.
    """

    def covered(by: Array, points: Array) -> float:
        radius = np.sort(distances(by, by), axis=1)[:, k]
        return float((distances(points, by) <= radius).any(axis=1).mean())

    return covered(real, samples), covered(samples, real)


def distances(a: Array, b: Array) -> Array:
    """Euclidean distances ``[N, M]`` of ``[N, D]`` and ``[M, D]``."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.asarray(np.sqrt(squares.clip(0)))


def nearest(samples: Array, training: Array) -> float:
    """Median distance of a sample to the nearest training image, both ``[N, D]``."""
    return float(np.median(np.concatenate([distances(part, training).min(1) for part in np.array_split(samples, 8)])))
