"""Figures of sample quality, held against closed forms, and the report of a checkpoint and of its bundle."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fewstep.cli import app
from fewstep.training import CheckpointError, train
from fewstep.training.evaluate import distances, kernel_distance, nearest, precision_recall, sliced_wasserstein
from fewstep.training.recipe import recipe_from
from fewstep.training.report import evaluate
from fewstep.training.student_bundle import export_checkpoint


def normal(count: int, mean: float = 0.0, deviation: float = 1.0, seed: int = 0) -> np.ndarray:
    return mean + deviation * np.random.default_rng(seed).standard_normal((count, 6))


def test_sliced_wasserstein_of_shifted_normals() -> None:
    """Projected on a direction u, a shift m is u m: on average over directions |m| / sqrt(D)."""
    assert sliced_wasserstein(normal(4_000), normal(4_000, 1.0, seed=1)) == pytest.approx(1, abs=0.1)
    assert sliced_wasserstein(normal(4_000), normal(3_000, seed=1)) < 0.06


def test_the_kernel_distance_is_unbiased() -> None:
    """Of two halves of one set it is nothing, on average, however few they are; and not nothing of others."""
    same = [kernel_distance(normal(50, seed=2 * i), normal(70, seed=2 * i + 1)) for i in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 200**0.5
    assert kernel_distance(normal(500), normal(500, 0.5, seed=1)) > 10 * np.std(same) / 200**0.5


def test_precision_falls_outside_and_recall_falls_inside() -> None:
    """Samples too wide are not all real; samples too narrow do not reach all of the real ones."""
    real = normal(600)
    wide, narrow = precision_recall(normal(600, 0, 2, 1), real), precision_recall(normal(600, 0, 0.4, 1), real)
    assert wide[0] < 0.5 < wide[1]
    assert narrow[1] < 0.5 < narrow[0]


def test_copies_are_near_and_distances_are_those_of_pairs() -> None:
    a, b = normal(20), normal(30, seed=1)
    np.testing.assert_allclose(distances(a, b), np.linalg.norm(a[:, None] - b, axis=-1), atol=1e-9)
    assert nearest(a, np.concatenate([b, a])) < 1e-6 < nearest(a, b)


@pytest.mark.slow
def test_a_checkpoint_and_its_bundle_are_judged_alike(tmp_path: Path) -> None:
    """The same network and table by torch and by the engine: figures agree within their noise."""
    recipe = recipe_from(
        {
            "name": "tiny", "data": {"source": "digits", "sigma_data": 0.75},
            "network": {"channels": 8, "blocks": 1, "patch": 2, "attention": False},
            "teacher": {"images": 6_400, "batch": 64, "learning_rate": 4e-3},
            "student": {"method": "progressive", "num_steps": 2, "start_steps": 4, "guidance": 0.0, "images": 1_600},
            "evaluation": {"classifier_images": 6_400},
        }
    )  # fmt: skip
    torch.set_num_threads(1)
    path = train(recipe, tmp_path, until="student", quiet=True)
    export_checkpoint(path, tmp_path / "bundle")
    (ours,) = evaluate(path, samples=400, seeds=2)
    (served,) = evaluate(tmp_path / "bundle", classifier=tmp_path / "classifier.safetensors", samples=400, seeds=2)
    assert (ours.solver, ours.num_steps, ours.features) == (served.solver, served.num_steps, served.features)
    assert served.mean.sliced_wasserstein == pytest.approx(ours.mean.sliced_wasserstein, rel=0.2)
    assert served.mean.frechet_distance == pytest.approx(ours.mean.frechet_distance, rel=0.2)
    assert ours.mean.rmse_to_teacher is not None
    assert ours.mean.rmse_to_teacher < 0.6
    assert served.mean.rmse_to_teacher is None
    assert ours.floor == served.floor
    assert ours.floor_samples == 400
    assert ours.deviation is not None
    one = [evaluate(path, samples=400, seeds=1)[0].mean.frechet_distance, ours.mean.frechet_distance]
    assert ours.deviation.frechet_distance == pytest.approx(2**0.5 * abs(one[0] - one[1]))  # of two: |x - y| / sqrt(2)
    assert ours.floor.memorisation == pytest.approx(1, abs=0.03)
    assert ours.floor.frechet_distance < 0.2 * ours.mean.frechet_distance
    several = ["--steps", "1,2", "--plot", str(tmp_path / "steps.svg"), "-o", str(tmp_path / "steps.json")]
    asked = ["evaluate", str(path), "--samples", "100", "--seeds", "1", *several]
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert [report["num_steps"] for report in json.loads((tmp_path / "steps.json").read_text())] == [1, 2]
    assert "network calls a sample" in (tmp_path / "steps.svg").read_text()
    for wrong, message in (
        ("1,x", "--steps: '1,x' should be numbers"),
        ("2", "--plot: draws several numbers of steps"),
    ):
        refused = CliRunner().invoke(app, [*asked, "--steps", wrong])
        assert (refused.exit_code, refused.stderr.startswith(f"fewstep: {message}")) == (2, True)
    with pytest.raises(CheckpointError, match=r"guidance: nan should be a finite number"):
        evaluate(path, guidance=float("nan"))
    with pytest.raises(CheckpointError, match=r"student.safetensors: not a classifier of these images"):
        evaluate(path, classifier=path)
    with pytest.raises(CheckpointError, match=r"guidance: 3; that of this student is fixed at 1"):
        evaluate(path, guidance=3.0)
