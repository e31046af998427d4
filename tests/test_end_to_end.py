"""The whole way on scikit-learn's digits, by the commands a user types: train, distil, export, serve, ask, look.

On the way, what one finished run is good for: its student beats the teacher's few steps, and is not trained again.
"""

import base64
import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from fewstep.runtime.schedules import karras
from fewstep.training import load_checkpoint, train

RECIPE = """
name = "tiny-digits"
seed = 0
[data]
source = "digits"
dataset = "Optical recognition of handwritten digits (UCI)"
licence = "CC BY 4.0"
sigma_data = 0.75
[network]
channels = 16
blocks = 1
patch = 1
fine_channels = 8
attention = false
[teacher]
images = 38_400
batch = 128
learning_rate = 4e-3
warmup_images = 2_560
ema_half_life = 4_000
checkpoint_every = 38_400
[student]
num_steps = 4
sigma_max = 20.0
guidance = 0.0
images = 6_400
batch = 64
learning_rate = 5e-4
auxiliary_learning_rate = 2e-3
weight_power = 0.0
ema_half_life = 1_000
checkpoint_every = 3_200
[evaluation]
samples = 200
noise_seeds = 1
step_counts = [4]
classifier_images = 12_800
"""


def fewstep(*arguments: str | Path, cwd: Path) -> str:
    command = [sys.executable, "-m", "fewstep", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "tiny.toml").write_text(RECIPE)
    fewstep("train", "tiny.toml", "-o", "run", cwd=folder)
    return folder / "run"


def test_the_teacher_learns(digits: Path) -> None:
    with (digits / "teacher" / "log.csv").open(newline="") as file:
        losses = [float(row["teacher"]) for row in csv.DictReader(file)]
    assert losses[-1] < 0.6 * losses[0]


def test_four_student_steps_beat_four_teacher_steps(digits: Path) -> None:
    """Moment matching brings the teacher's quality into the student's few steps."""
    arms = json.loads((digits / "metrics.json").read_text())["arms"]
    assert arms["student ancestral 4"]["fd"] < 0.7 * arms["teacher ancestral 4"]["fd"]
    assert arms["student ancestral 4"]["accuracy"] > 0.9


def test_a_student_carries_what_export_needs(digits: Path) -> None:
    student = load_checkpoint(digits / "student.safetensors")
    assert student.sample_shape == (1, 8, 8)
    assert student.class_names == tuple("0123456789")
    assert student.sigmas == pytest.approx(karras(4, 0.25, 20.0).sigma[:-1])
    assert (student.kind, student.guidance, student.images, student.licence) == ("student", 0.0, 6_400, "CC BY 4.0")
    assert student.recipe.hash == json.loads((digits / "metrics.json").read_text())["recipe_hash"]


def test_a_finished_run_is_not_run_again(digits: Path) -> None:
    before = (digits / "student.safetensors").stat().st_mtime_ns
    train(load_checkpoint(digits / "student.safetensors").recipe, digits, until="student", quiet=True)
    assert (digits / "student.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_digits_from_a_recipe_to_recognisable_images_over_http(digits: Path, tmp_path: Path) -> None:
    said = fewstep("export", digits / "student.safetensors", "-o", "student", "--precision", "bfloat16", cwd=tmp_path)
    assert "tiny-digits" in said
    for precision in ("float32", "bfloat16, emulated on the CPU"):
        assert f"student: {precision}: against PyTorch at the worst of 4 steps: max abs " in said
    parity = json.loads((tmp_path / "student" / "parity.json").read_text())
    assert {name: len(found["steps"]) for name, found in parity["against_torch"].items()} == {
        "float32": 4,
        "bfloat16": 4,
    }
    assert "ancestral *" in fewstep("inspect", "student", cwd=tmp_path)
    fewstep("generate", "student", "--label", "7", "--num", "4", "-o", "seven.png", cwd=tmp_path)
    with Image.open(tmp_path / "seven.png") as picture:
        assert picture.size == (2 * 18, 2 * 18)  # two by two, at twice the size, with gaps

    command = [sys.executable, "-m", "fewstep", "serve", "student", "--port", "0", "--threads", "1"]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r" at (http://\S+)", server.stdout.readline())
        assert found
        client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none")
        images, asked = [], []
        for digit in range(10):
            answer = client.images.generate(prompt=str(digit), n=10, extra_body={"seed": 100 * digit})
            assert answer.data is not None
            for image in answer.data:
                images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json or "")))))
                asked.append(digit)
        client.close()
    finally:
        server.terminate()
        server.communicate()

    real = load_digits()
    judge = KNeighborsClassifier(3).fit(real.images.reshape(-1, 64) / 16, real.target)
    seen = judge.predict(np.stack(images).reshape(-1, 64) / 255)
    accuracy = float(np.mean(seen == asked))
    assert accuracy > 0.8  # 1 in 10 by chance; measured 0.97
