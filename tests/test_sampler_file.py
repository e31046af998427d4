"""The whole sampler as a file: the engine's samples in stock ONNX Runtime, by the page's own snippet too."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from fewstep.cli import app
from fewstep.export.sampler_file import write_sampler
from fewstep.export.sampler_graph import request_inputs
from fewstep.export.step_graph import ExportError
from fewstep.kernels.ort_op import ort_library
from fewstep.runtime import Bundle, Engine, Request

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"


def test_it_is_written_by_the_command_and_gives_the_engines_samples(baked: Bundle, tmp_path: Path) -> None:
    """Without the operator's kernel and with it, which are equal to the bit."""
    out = tmp_path / "sampler.onnx"
    asked = ["export", str(baked.path), "--sampler", "--solver", "dpmpp_2m", "--steps", "3", "-o", str(out)]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0, told.output
    assert re.search(r"digits, dpmpp_2m with 3 steps, float32 [\d,]+ bytes; .* max abs \S+, relative \S+$", told.output)
    tableau = baked.tableau("dpmpp_2m", 3)
    requests = [Request(seed, tableau, seed) for seed in (2, 9)]
    given = request_inputs(baked, tableau, requests)
    del given["table"]  # is in the file
    stock = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert {node.name for node in stock.get_inputs()} == set(given) == {"noise", "label"}
    (samples,) = stock.run(None, given)
    for ours, theirs in zip(samples, Engine(baked, threads=1).generate(requests), strict=True):
        assert np.abs(ours - theirs.pixels).max() <= 1e-5 * np.abs(ours).max()
    if ort_library():
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(ort_library()))
        kernel = onnxruntime.InferenceSession(out, options, providers=["CPUExecutionProvider"])
        assert np.array_equal(kernel.run(None, given)[0], samples)


def test_the_pages_snippet_gives_the_engines_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "sampler.onnx" in code)
    write_sampler(bundle := Bundle.load("fashion-mnist-mm4"), Path("sampler.onnx"), tableau := bundle.tableau())
    found: dict[str, Any] = {}
    exec(snippet, found)
    wanted = Engine(bundle).generate([Request(seed, tableau, label) for seed, label in ((0, 3), (1, 7))])
    for ours, theirs in zip(found["samples"], wanted, strict=True):
        assert np.abs(ours - theirs.pixels).max() <= 1e-4 * np.abs(ours).max()


@pytest.mark.parametrize(("precision", "least", "most"), [("float16", 1e-6, 1e-2), ("bfloat16", 1e-4, 0.1)])
def test_other_precisions_are_measured(
    baked: Bundle, tmp_path: Path, precision: Any, least: float, most: float
) -> None:
    parity = write_sampler(baked, out := tmp_path / "s.onnx", baked.tableau("ddim", 2), precision)
    assert least < parity.relative < most
    assert parity.max_abs > parity.relative * 0.1
    assert out.stat().st_size > 1000


def test_a_large_student_keeps_its_weights_beside_the_file(
    baked: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.export.onnx_file._OUTSIDE", 0)
    write_sampler(baked, tmp_path / "s.onnx", baked.tableau("ddim", 1))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.onnx", "s.onnx.data"]
    onnxruntime.InferenceSession(tmp_path / "s.onnx", providers=["CPUExecutionProvider"])


def test_what_is_no_sampler_is_refused_and_leaves_nothing(
    baked: Bundle, guided: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tableau, out = baked.tableau("ddim", 1), tmp_path / "s.onnx"
    with pytest.raises(ExportError, match=r"calls its network twice a step: it has no whole-sampler graph$"):
        write_sampler(guided, out, guided.tableau())
    with pytest.raises(ExportError, match=r"folder: a whole sampler is one file, whose name ends with \.onnx$"):
        write_sampler(baked, tmp_path / "folder", tableau)
    monkeypatch.setattr("fewstep.export.sampler_file.relative", lambda *_: float("nan"))
    with pytest.raises(ExportError, match=r"its samples differ from the engine's by nan; it was not written$"):
        write_sampler(baked, out, tableau)
    assert not list(tmp_path.iterdir())
    out.write_bytes(b"mine")
    with pytest.raises(ExportError, match=r"s\.onnx: exists already$"):
        write_sampler(baked, out, tableau)
    assert out.read_bytes() == b"mine"
