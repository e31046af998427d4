"""The whole way on scikit-learn's digits, by the commands a user types: train, distil, export, serve, ask, look."""

import base64
import io
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
checkpoint_every = 19_200
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
classifier_images = 6_400
"""


def fewstep(*arguments: str | Path, cwd: Path) -> str:
    command = [sys.executable, "-m", "fewstep.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_digits_from_a_recipe_to_recognisable_images_over_http(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    fewstep("train", "tiny.toml", "-o", "run", cwd=tmp_path)
    said = fewstep("export", "run/student.safetensors", "-o", "student", cwd=tmp_path)
    assert "tiny-digits" in said
    assert "ancestral *" in fewstep("inspect", "student", cwd=tmp_path)
    fewstep("generate", "student", "--label", "7", "--num", "4", "-o", "seven.png", cwd=tmp_path)
    with Image.open(tmp_path / "seven.png") as picture:
        assert picture.size == (2 * 18, 2 * 18)  # two by two, at twice the size, with gaps

    command = [sys.executable, "-m", "fewstep.cli", "serve", "student", "--port", "0", "--threads", "1"]
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

    digits = load_digits()
    judge = KNeighborsClassifier(3).fit(digits.images.reshape(-1, 64) / 16, digits.target)
    seen = judge.predict(np.stack(images).reshape(-1, 64) / 255)
    accuracy = float(np.mean(seen == asked))
    assert accuracy > 0.8  # 1 in 10 by chance; measured 0.97
