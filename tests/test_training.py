"""Training: recipes, data, the exact resume, what stops a run."""

import csv
import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.multiprocessing.spawn import ProcessExitedException

from fewstep.runtime.prediction import Prediction
from fewstep.runtime.schedules import karras
from fewstep.runtime.solvers import ancestral, ddim, dpmpp_2m
from fewstep.training import (
    CheckpointError,
    DataError,
    Denoiser,
    NetworkConfig,
    Recipe,
    RecipeError,
    TrainingError,
    UNet,
    load_checkpoint,
    load_images,
    load_recipe,
    precondition,
    sample,
    train,
)
from fewstep.training.distillation import posterior
from fewstep.training.evaluate import frechet
from fewstep.training.recipe import recipe_from
from fewstep.training.run import start_method

TINY = """
name = "tiny"
[data]
source = "digits"
sigma_data = 0.75
[network]
kind = "transformer"  # the fewest operations a step
channels = 8
blocks = 1
[teacher]
images = 2_400
batch = 16
checkpoint_every = 800
[student]
images = 2_400
batch = 16
checkpoint_every = 800
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    assert torch.tensor(1e-40) * 0.5 != 0  # small numbers are what they were before


def losses(path: Path) -> list[list[str]]:
    """The rows of a log without the one column that tells the time."""
    with path.open(newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """SIGKILL in the middle of the teacher and of the student changes no loss and no weight."""
    recipe, asked = load_recipe(recipe_file(tmp_path, TINY)), {"until": "student", "quiet": True}
    for stage in ("teacher", "student"):
        context = multiprocessing.get_context(start_method())
        process = context.Process(target=train, args=(recipe, tmp_path / "killed"), kwargs=asked)  # type: ignore[attr-defined]
        process.start()
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)  # on a busy machine it could end before it is looked at again
        wait_for(tmp_path / "killed" / stage / "state.safetensors", process)
        process.kill()
        process.join()
        assert not (tmp_path / "killed" / f"{stage}.safetensors").exists()
    train(recipe, tmp_path / "killed", until="student", quiet=True)
    train(recipe, tmp_path / "whole", until="student", quiet=True)
    for stage in ("teacher", "student"):
        assert losses(tmp_path / "killed" / stage / "log.csv") == losses(tmp_path / "whole" / stage / "log.csv")
    killed, whole = (load_checkpoint(tmp_path / run / "student.safetensors") for run in ("killed", "whole"))
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, killed.network.state_dict()[name]), name


def wait_for(path: Path, process: BaseProcess) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def tiny(**teacher: Any) -> Recipe:
    network = {"channels": 8, "blocks": 1, "attention": False}
    recipe = recipe_from({"name": "tiny", "data": {"source": "digits"}, "network": network})
    return dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, images=800, batch=16, **teacher))


def test_another_recipe_is_refused_by_the_difference(tmp_path: Path) -> None:
    train(tiny(), tmp_path, until="teacher", quiet=True)
    with pytest.raises(TrainingError, match=r"another recipe \(teacher.learning_rate: 0.001, here 0.01\)"):
        train(tiny(learning_rate=0.01), tmp_path, until="teacher", quiet=True)
    (tmp_path / "teacher.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"state.safetensors: made by another recipe"):
        train(tiny(learning_rate=0.01), tmp_path, until="teacher", quiet=True)


def test_other_images_are_refused(tmp_path: Path) -> None:
    recipe, digits = tiny(), load_images("digits", None)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source="npz", sigma_data=0.5))
    for name, pixels in (("one", digits.pixels), ("other", digits.pixels[::-1])):
        x_test, y_test = digits.held_out_pixels[:, 0], digits.held_out_labels
        np.savez(tmp_path / f"{name}.npz", x_train=pixels[:, 0], y_train=digits.labels, x_test=x_test, y_test=y_test)
    train(recipe, tmp_path / "run", data=tmp_path / "one.npz", until="teacher", quiet=True)
    (tmp_path / "run" / "teacher.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"state.safetensors: made with other images; go on with those, or"):
        train(recipe, tmp_path / "run", data=tmp_path / "other.npz", until="teacher", quiet=True)
    train(recipe, tmp_path / "run", data=tmp_path / "one.npz", until="teacher", quiet=True)


def test_a_resume_takes_up_no_damage(tmp_path: Path) -> None:
    """A state that is not one is named with the remedy; a log's last row, cut by a full disk, is dropped."""
    state = tmp_path / "teacher" / "state.safetensors"
    train(tiny(), tmp_path, until="teacher", quiet=True)
    content = state.read_bytes()
    (tmp_path / "teacher.safetensors").rename(state)
    with pytest.raises(TrainingError, match=r"state.safetensors: holds no training of teacher; remove it, and this"):
        train(tiny(), tmp_path, until="teacher", quiet=True)
    state.write_bytes(content[: len(content) // 2])
    with pytest.raises(TrainingError, match=r"state.safetensors: not a readable checkpoint .*; remove it, and this"):
        train(tiny(), tmp_path, until="teacher", quiet=True)
    state.write_bytes(content)
    (state.parent / ".state.safetensors.123").write_bytes(content)  # of a run that was killed while it wrote
    log = state.parent / "log.csv"
    before = log.read_bytes()
    log.write_bytes(before + b"4,16,0.9")
    train(tiny(), tmp_path, until="teacher", quiet=True)
    assert log.read_bytes() == before
    assert not (state.parent / ".state.safetensors.123").exists()


@pytest.mark.slow
def test_no_process_goes_on_without_the_first(tmp_path: Path) -> None:
    """Killed, it cannot end the others; they would go on unseen, in a folder that the next run takes for its own."""
    recipe = recipe_file(tmp_path, TINY.replace("images = 2_400", "images = 2_400_000"))
    command = [sys.executable, "-m", "fewstep", "train", str(recipe), "--processes", "2", "-o", str(tmp_path)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 240
    while not (tmp_path / "teacher" / "log.csv").exists():
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    _, left = psutil.wait_procs(started, timeout=120)
    for process in left:
        process.kill()
    assert len(started) >= 2
    assert not left


def test_a_process_that_is_killed_ends_the_run_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: object, **__: object) -> None:
        raise ProcessExitedException("process 1 terminated with signal SIGKILL", 1, 77, -9, "SIGKILL")

    monkeypatch.setattr("fewstep.training.run.start_processes", end)
    with pytest.raises(
        TrainingError, match=r"^process 1 terminated with signal SIGKILL; is memory short\? the same comm"
    ):
        train(tiny(), tmp_path, until="teacher", processes=2, quiet=True)


def test_students_of_several_seeds_share_a_teacher(tmp_path: Path) -> None:
    """The recipe's seed is the teacher's; a student of another has other losses, one that names the same none."""
    recipe = dataclasses.replace(tiny(), student=dataclasses.replace(tiny().student, images=800, batch=16))
    logs: list[list[list[str]]] = []
    for seed in (None, 0, 1):
        out = tmp_path / str(seed)
        if logs:
            out.mkdir()
            shutil.copy(tmp_path / "None" / "teacher.safetensors", out)
        student = dataclasses.replace(recipe.student, seed=seed)
        train(dataclasses.replace(recipe, student=student), out, until="student", quiet=True)
        logs.append(losses(out / "student" / "log.csv"))
    assert logs[0] == logs[1] != logs[2]


def test_a_loss_that_is_not_finite_stops_the_run_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^teacher: the loss of teacher is .* at step \d+; .*lower the learning"):
        train(tiny(learning_rate=1e30, warmup_images=0), tmp_path, until="teacher", quiet=True)


def test_what_cannot_be_written_is_named_in_one_line_and_the_run_goes_on_later(tmp_path: Path) -> None:
    """The system lets no file grow past 40 kB: the log is written, the first checkpoint is not."""
    recipe, out = str(recipe_file(tmp_path, TINY)), str(tmp_path / "out")
    command = [sys.executable, "-m", "fewstep", "train", recipe, "-o", out]
    process = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
    )  # fmt: skip
    state = tmp_path / "out" / "teacher" / "state.safetensors"
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith(f"fewstep: {state}: cannot be written (")
    assert "Traceback" not in process.stderr
    assert {file.name for file in state.parent.iterdir()} == {"log.csv"}
    train(load_recipe(recipe_file(tmp_path, TINY)), tmp_path / "out", until="teacher", quiet=True)
    assert (tmp_path / "out" / "teacher.safetensors").exists()


def test_bfloat16_is_computed_in_and_not_stored(tmp_path: Path) -> None:
    """Losses are near those of float32 and not the same; weights stay float32; neither goes on with the other's."""
    train(tiny(), tmp_path / "half", until="teacher", precision="bfloat16", quiet=True)
    train(tiny(), tmp_path / "full", until="teacher", quiet=True)
    half, full = (float(losses(tmp_path / run / "teacher" / "log.csv")[-1][2]) for run in ("half", "full"))
    assert half != full
    assert half == pytest.approx(full, rel=0.05)
    weights = load_checkpoint(tmp_path / "half" / "teacher.safetensors").network.state_dict().values()
    assert {tensor.dtype for tensor in weights} == {torch.float32}
    (tmp_path / "half" / "teacher.safetensors").unlink()
    with pytest.raises(
        TrainingError, match=r"state.safetensors: made in bfloat16, not float32; go on with --precision"
    ):
        train(tiny(), tmp_path / "half", until="teacher", quiet=True)
    with pytest.raises(TrainingError, match=r"^precision = 'bf16' should be one of float32, bfloat16$"):
        train(tiny(), tmp_path / "half", precision="bf16", quiet=True)


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path: Path) -> None:
    """Both see other images, and the error of either arrives as the one line it is."""
    train(tiny(), tmp_path / "two", until="teacher", processes=2, quiet=True)
    train(tiny(), tmp_path / "one", until="teacher", quiet=True)
    one, two = (float(losses(tmp_path / run / "teacher" / "log.csv")[-1][2]) for run in ("one", "two"))
    assert two == pytest.approx(one, rel=0.2)
    with pytest.raises(TrainingError, match=r"^teacher: the loss of teacher .*lower the learning rate$"):
        train(tiny(learning_rate=1e30, warmup_images=0), tmp_path, until="teacher", processes=2, quiet=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1", r'name is missing; begin with name = "..."'),
        ('name = "a"\n[teacher]\nlerning_rate = 1', r"\[teacher\] lerning_rate is not a setting; did you mean lea"),
        ('name = "a"\n[teecher]\n', r"\[teecher\] is not a table; did you mean teacher"),
        ('name = "a"\n[teacher]\nbatch = 1.5', r"\[teacher\] batch = 1.5 should be a whole number"),
        ('name = "a"\n[network]\nattention = 1', r"\[network\] attention = 1 should be true or false"),
        ('name = "a"\n[student]\nmethod = "dmb"', r"\[student\] method = 'dmb' should be one of 'moment-matching'"),
        ('name = "a"\n[student]\npool = 4', r"\[student\] pool is a setting of 'dkdm', not of 'moment-matching'"),
        ('name = "a"\n[student]\nnum_steps = 0', r"\[student\] num_steps = 0 should be between 1 and 64"),
        ('name = "a"\n[teacher]\nlearning_rate = nan', r"\[teacher\] learning_rate = nan should be a finite number"),
        ('name = "a"\n[student]\nsigma_max = inf', r"\[student\] sigma_max = inf should be a finite number"),
        ('name = "a"\nseed = -1', r"seed = -1 should be between 0 and "),
        ('name = "a"\n[evaluation]\nstep_counts = [4, 0]', r"\[evaluation\] step_counts = \[4, 0\] should each be bet"),
        ('name = "a"\n[student]\nsigma_min = 50.0', r"\[student\] needs sigma_floor < sigma_min < sigma_max"),
        ('name = "a"\ndata = 3', r"data = 3 should be a table, \[data\]"),
        ("name = ", r"not TOML"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=r"^recipe.toml: " + message) as error:
        load_recipe(recipe_file(tmp_path, text))
    assert "\n" not in str(error.value)


def test_shipped_recipes_are_found_by_name_and_survive_their_text() -> None:
    recipe = load_recipe("fashion-mnist-mm4")
    assert recipe_from(json.loads(recipe.text)) == recipe
    with pytest.raises(RecipeError, match=r"^nothing: no such recipe; .*one of digits, .*fashion-mnist-mm4$"):
        load_recipe("nothing")


def test_a_recipe_that_does_not_suit_its_images_says_so(tmp_path: Path) -> None:
    recipe = recipe_from({"name": "a", "data": {"source": "digits"}, "network": {"patch": 3}})
    with pytest.raises(RecipeError, match=r"\[network\] does not suit the images: an image side of 8 is not"):
        train(recipe, tmp_path, quiet=True)


def test_npz_and_folders_of_images_hold_the_same_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
    labels = np.arange(10) % 2
    np.savez(tmp_path / "a.npz", x_train=pixels, y_train=labels, x_test=pixels[:2], y_test=labels[:2])
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = tmp_path / "images" / ("cat", "dog")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    npz, folder_ = load_images("npz", tmp_path / "a.npz"), load_images("folder", tmp_path / "images")
    assert npz.sample_shape == folder_.sample_shape == (3, 4, 4)
    assert folder_.class_names == ("cat", "dog")
    assert len(folder_.held_out_pixels) == 2
    everything = np.concatenate([folder_.pixels, folder_.held_out_pixels]).reshape(10, -1)
    assert {row.tobytes() for row in everything} == {row.tobytes() for row in npz.pixels.reshape(10, -1)}


def test_bad_data_are_refused_by_the_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing.npz: no such file"):
        load_images("npz", tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("not numbers")
    with pytest.raises(DataError, match=r"text.npz: not a readable .npz file"):
        load_images("npz", tmp_path / "text.npz")
    np.savez(tmp_path / "half.npz", x_train=np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(DataError, match=r"half.npz: no array 'y_train'; it has x_train"):
        load_images("npz", tmp_path / "half.npz")
    images, labels = np.zeros((2, 4, 4), np.uint8), np.array([0, 7])
    np.savez(tmp_path / "names.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    with pytest.raises(DataError, match=r"names.npz: labels run from 0 to 7, and there are 2 classes"):
        load_images("npz", tmp_path / "names.npz", ("a", "b"))
    (tmp_path / "folder" / "cat").mkdir(parents=True)
    (tmp_path / "folder" / "cat" / "1.png").write_text("not an image")
    with pytest.raises(DataError, match=r"1.png: not a readable image"):
        load_images("folder", tmp_path / "folder")
    with pytest.raises(DataError, match=r"needs a path"):
        load_images("npz", None)
    with pytest.raises(DataError, match=r"a.npz: data source 'digits' .* is read from no file"):
        load_images("digits", "a.npz")
    with pytest.raises(DataError, match=r"names.npz: not a folder"):
        load_images("folder", tmp_path / "names.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "names.npz").read_bytes()[:400])
    with pytest.raises(DataError, match=r"cut.npz: not a readable .npz file \(File is not a zip file\)"):
        load_images("npz", tmp_path / "cut.npz")
    np.savez(tmp_path / "real.npz", x_train=images, y_train=labels / 7, x_test=images, y_test=labels)
    with pytest.raises(DataError, match=r"real.npz: y_train is float64, not whole numbers"):
        load_images("npz", tmp_path / "real.npz")
    np.savez(tmp_path / "none.npz", x_train=images[:0], y_train=labels[:0], x_test=images, y_test=labels)
    with pytest.raises(DataError, match=r"none.npz: no images"):
        load_images("npz", tmp_path / "none.npz")
    np.savez(tmp_path / "black.npz", x_train=images, y_train=labels % 2, x_test=images, y_test=labels % 2)
    with pytest.raises(DataError, match=r"all pixels are alike"):
        train(recipe_from({"name": "a", "data": {"path": str(tmp_path / "black.npz")}}), tmp_path / "out", quiet=True)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    with pytest.raises(CheckpointError, match=r"student.safetensors: no such file"):
        load_checkpoint(path)
    path.write_bytes(b"\x00" * 64)
    with pytest.raises(CheckpointError, match=r"student.safetensors: not a readable checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("sigma", [0.02, 0.7, 40.0])
def test_training_and_serving_precondition_alike(sigma: float) -> None:
    """`denoiser` and the table's row say the same of the raw network."""
    c_skip, c_out, c_in, t = (float(c) for c in precondition(torch.tensor(sigma, dtype=torch.float64), 0.7))
    served = Prediction("edm", sigma_data=0.7)
    assert served.to_form("x0", 1.0, sigma) == pytest.approx((c_skip, c_out))
    assert served.c_in(1.0, sigma) == pytest.approx(c_in)
    assert t == pytest.approx(np.log(sigma) / 4)


@pytest.mark.parametrize("solver", [ddim, ancestral, dpmpp_2m])
def test_every_solver_is_exact_when_there_is_one_image(solver: object) -> None:
    """If the data prediction does not depend on the latent, one step and many end on it."""
    x0 = torch.linspace(-1, 1, 16).reshape(1, 4, 4)

    def network(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        sigma = torch.exp(4 * t)
        c_skip, c_out, c_in, _ = (c[:, None, None, None] for c in precondition(sigma, 0.5))
        return (x0 - c_skip * x / c_in) / c_out

    for steps in (1, 5):
        table = solver(karras(steps, 0.1, 10.0))  # type: ignore[operator]
        x = sample(Denoiser(network, 0.5, 1), table, torch.zeros(3, dtype=torch.int64), (1, 4, 4), torch.Generator())
        torch.testing.assert_close(x, x0.expand_as(x), atol=1e-4, rtol=0)


def test_guidance_extrapolates_from_no_class() -> None:
    def network(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return label[:, None, None, None].float().expand_as(x)

    x, sigma, label = torch.zeros(2, 1, 2, 2), torch.ones(2), torch.tensor([0, 1])
    plain, guided = (Denoiser(network, 1.0, 4, w)(x, sigma, label) for w in (0.0, 1.5))
    nothing = Denoiser(network, 1.0, 4)(x, sigma, torch.tensor([4, 4]))
    torch.testing.assert_close(guided, nothing + 2.5 * (plain - nothing))


def test_the_posterior_keeps_the_marginal() -> None:
    """From z_t = x + sigma_t eps and the true x, z_s is x + sigma_s noise: mean x, deviation sigma_s."""
    rng = torch.Generator().manual_seed(0)
    x, count = torch.full((40_000, 1, 1, 1), 0.3), 40_000
    sigma_t, sigma_s = torch.full((count,), 2.0), torch.full((count,), 0.5)
    z_t = x + 2.0 * torch.randn(x.shape, generator=rng)
    z_s = posterior(z_t, x, sigma_t, sigma_s, rng)
    assert z_s.mean().item() == pytest.approx(0.3, abs=5 * 0.5 / count**0.5)
    assert z_s.std().item() == pytest.approx(0.5, abs=5 * 0.5 / (2 * count) ** 0.5)


def test_frechet_of_diagonal_normals_is_the_distance_of_means_and_deviations() -> None:
    a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.5, 3.0])
    distance = frechet(np.zeros(3), np.diag(a**2), np.ones(3), np.diag(b**2))
    assert distance == pytest.approx(3 + ((a - b) ** 2).sum(), rel=1e-4)


def test_a_row_of_the_network_does_not_depend_on_its_company() -> None:
    torch.manual_seed(0)
    network = UNet(NetworkConfig((1, 8, 8), 10, channels=16, blocks=1, patch=2)).eval()
    torch.nn.init.normal_(network.fine_out.weight)
    x, t, label = torch.randn(5, 1, 8, 8), torch.randn(5), torch.arange(5)
    with torch.no_grad():
        together, alone = network(x, t, label), network(x[:1], t[:1], label[:1])
    torch.testing.assert_close(together[:1], alone)
