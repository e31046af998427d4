"""Precisions and TensorRT engines that are added to a bundle: measured, recorded, and refused where they do not fit."""

import base64
import json
import urllib.request
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import network
from onnx import helper
from PIL import Image

from fewstep.cli import main
from fewstep.export.additions import REPORT, add_engines, add_precisions
from fewstep.export.engines import build_engine
from fewstep.export.precisions import Precision, convert
from fewstep.export.sampler_graph import sampler_graph
from fewstep.export.step_graph import ExportError
from fewstep.export.trajectory import relative, said, trajectory
from fewstep.runtime import DEFAULT_BUNDLE, Bundle, BundleError, Engine, Request
from fewstep.runtime.bundle import MANIFEST, EngineFile
from fewstep.runtime.pictures import encode

needs_tensorrt = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")


def ran(*arguments: str | Path, status: int = 0) -> str:
    """What a command said: on its output if it went well, else its errors."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        patch.setattr("sys.argv", ["fewstep", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert (ended.value.code or 0) == status, err.getvalue()
    return err.getvalue() if status else out.getvalue()


@pytest.fixture(scope="module")
def with_precisions(baked: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, dict[str, Any]]:
    out = tmp_path_factory.mktemp("additions") / "student"
    return add_precisions(baked, out, ["float32", "float16", "bfloat16", "int8", "int8-cpu"])


def test_every_precision_is_held_against_float32_at_every_step(with_precisions: tuple[Bundle, dict[str, Any]]) -> None:
    bundle, report = with_precisions
    found = report["against_float32"]
    assert not report["against_torch"]  # a bundle holds no torch module
    assert json.loads((bundle.path / REPORT).read_text()) == report
    bounds = {"float32": 0.0, "float16": 5e-3, "bfloat16": 5e-2, "int8": 0.5, "int8-cpu": 0.5}
    assert found.keys() == report["run"].keys() == bounds.keys()
    for precision, bound in bounds.items():
        steps = found[precision]["steps"]
        assert [step["step"] for step in steps] == list(range(bundle.tableau().num_steps))
        assert max(step["relative"] for step in steps) <= bound
    assert [name for name, how in report["run"].items() if how.startswith("emulated")] == ["bfloat16"]
    assert report["export"] == bundle.manifest.metrics["export"]


def test_every_precision_is_held_against_pytorch_where_there_is_a_network(baked: Bundle, tmp_path: Path) -> None:
    """And bfloat16, which the CPU emulates, is as far from it as PyTorch's own bfloat16: half as far to twice."""
    _, report = add_precisions(baked, tmp_path / "student", ["float16", "bfloat16"], network(0))
    errors = {name: found["steps"] for name, found in report["against_torch"].items()}
    assert set(errors) == {"float32", "float16", "bfloat16"}
    stored = report["export"]["storage_error"]  # float32 arithmetic, weights stored in half precision
    assert 0 < max(step["relative"] for step in errors["float32"]) <= 2 * stored
    brain = network(0).eval().bfloat16()
    brain.level.register_forward_pre_hook(lambda _, given: (given[0].bfloat16(),))  # embeds the level in float32
    calls, _ = trajectory(baked, baked.tableau(), baked.network, 32)
    for i, (inputs, _) in enumerate(calls):
        wanted = said(network(0).eval(), inputs)
        x, t, label = (torch.from_numpy(inputs[name]) for name in ("x", "t", "label"))
        with torch.no_grad():
            rounded = brain(x.bfloat16(), t.bfloat16(), label).float().numpy()
        theirs, ours = relative(rounded, wanted), errors["bfloat16"][i]
        assert theirs / 2 < ours["relative"] < theirs * 2
        assert ours["max_abs"] > ours["relative"] * np.sqrt(np.mean(wanted**2))
        assert errors["float16"][i]["relative"] < ours["relative"]


def test_a_checkpoint_has_to_be_a_bundle_first(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    path.touch()
    assert ran("export", path, "--sampler", "-o", "s.onnx", status=2) == (
        f"fewstep: --sampler: needs a bundle: fewstep export {path} -o FOLDER makes one\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--precision", "float16", "--plugin"], "--plugin: does nothing with --precision; it belongs to --tensorrt"),
        (["--precision", "float16", "--flavour", "full"], "--flavour: does nothing with --precision; it belongs to"),
        (["--sampler", "--target", "sm99"], "--target: does nothing with --sampler; it belongs to --tensorrt"),
        (["--tensorrt", "--steps", "2"], "--steps: does nothing with --tensorrt; it belongs to --sampler or --triton"),
        (
            ["--tensorrt", "--name", "me"],
            "--name: does nothing with --tensorrt; it belongs to a bundle of",
        ),
        (["--triton", "r", "--solver", "ddim"], "--solver: does nothing with --triton; it belongs to"),
        (["--triton", "r", "--batch", "1,8,8"], "--batch: does nothing with --triton; it belongs to --tensorrt"),
        (
            ["--timing-cache", "t"],
            "--timing-cache: does nothing with a bundle of a checkpoint; it",
        ),
        ([], "{bundle}: is a bundle already; --precision, --tensorrt, --sampler or --triton say what to make of it"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(baked: Bundle, flags: list[str], message: str) -> None:
    said = ran("export", baked.path, "-o" if "--triton" not in flags else "--name", "unmade", *flags, status=2)
    assert said.startswith(f"fewstep: {message.format(bundle=baked.path)}")
    assert said.count("\n") == 1
    assert not Path("unmade").exists()


def test_weights_have_the_precision_and_the_border_is_float32(with_precisions: tuple[Bundle, dict[str, Any]]) -> None:
    bundle, _ = with_precisions
    kinds = {"float32": 1, "float16": 10, "bfloat16": 16, "int8": 3, "int8-cpu": 3}
    for precision, kind in kinds.items():
        graph = onnx.load(bundle.path / "precisions" / f"{precision}.onnx").graph
        heaviest = max(graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
        assert heaviest.data_type == kind or "int8" in precision
        assert any(tensor.data_type == kind for tensor in graph.initializer)
        assert {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]} <= {1, 7}


def test_a_precision_is_served_where_the_bundle_has_it(
    with_precisions: tuple[Bundle, dict[str, Any]],
    serving: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, _ = with_precisions
    asked = Request(4, bundle.tableau(), 1)
    (float32,) = Engine(bundle, threads=1).generate([asked])
    (int8,) = Engine(bundle, threads=1, precision="int8-cpu").generate([asked])
    assert 0 < np.abs(int8.pixels - float32.pixels).max() < 0.5
    with serving(bundle.path, "--precision", "int8-cpu", "--no-grpc") as (_, address):
        body = json.dumps({"prompt": "1", "seed": 4}).encode()
        url = f"http://{address[0]}:{address[1]}/v1/images/generations"
        with urllib.request.urlopen(urllib.request.Request(url, body)) as answer:
            served = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
    assert served == encode(int8.to_uint8())
    out = tmp_path / "one.png"
    arguments = ["--label", "1", "--seed", "4", "--num", "1", "--precision", "int8-cpu", "-o", str(out)]
    monkeypatch.setattr("sys.argv", ["fewstep", "generate", str(bundle.path), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert np.array_equal(np.asarray(Image.open(out)), int8.to_uint8()[:, :, 0])


def test_a_precision_that_the_bundle_lacks_is_refused_with_the_command_that_adds_it(baked: Bundle) -> None:
    with pytest.raises(BundleError, match=r"^precision: digits has float32, not 'int8-cpu'; fewstep export digits -o"):
        Engine(baked, precision="int8-cpu")


def test_tensorrt_takes_no_unsigned_int8(baked: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^int8-cpu is for CPUs: TensorRT takes int8$"):
        add_engines(baked, tmp_path / "out", precisions=["int8-cpu"])


def test_int8_without_calibration_is_refused(baked: Bundle) -> None:
    with pytest.raises(ExportError, match=r"^int8 needs calibration: inputs that the network sees$"):
        convert(onnx.load(baked.network), "int8")


def test_the_whole_sampler_runs_in_half_precision(baked: Bundle) -> None:
    model = sampler_graph(convert(onnx.load(baked.network), "float16"), 2, 1)
    onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_what_cannot_be_added_leaves_the_folder_as_it_was(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(bundle_copy)
    before = sorted(bundle_copy.parent.rglob("*"))

    def fails(*_: object, **__: object) -> None:
        raise ExportError("it failed")

    monkeypatch.setattr("fewstep.export.additions.measure", fails)
    with pytest.raises(ExportError, match=r"^it failed$"):
        add_precisions(bundle, bundle_copy, ["float16"])
    assert sorted(bundle_copy.parent.rglob("*")) == before
    with pytest.raises(BundleError, match=r"exists already$"):
        add_precisions(bundle, bundle_copy.parent, ["float16"])


# --- TensorRT


@needs_tensorrt
def test_tensorrt_builds_bfloat16(baked: Bundle) -> None:
    assert build_engine(convert(onnx.load(baked.network), "bfloat16"), targets=["sm89"]).layers > 50


@needs_tensorrt
@pytest.mark.parametrize(("precision", "steps"), [("float32", 0), ("int8", 0), ("float16", 2)])
def test_tensorrt_builds_the_embedded_student_for_any_batch(precision: Precision, steps: int) -> None:
    """Its network, and its whole sampler; the network in float16 is built by the command, below."""
    student = Bundle.load(DEFAULT_BUNDLE)
    calls = trajectory(student, student.tableau(), student.network, 4)[0] if precision == "int8" else []
    graph = convert(onnx.load(student.network), precision, [given for given, _ in calls])
    if steps:
        graph = sampler_graph(graph, steps, student.tableau().num_places)
    built = build_engine(graph, batch=(1, 8, 64), targets=["sm89"])
    assert built.layers > 500 * max(1, steps)
    weights = sum(int(np.prod(tensor.dims)) for tensor in graph.graph.initializer)
    assert len(built.data) > weights * {"float32": 4, "int8": 1}.get(precision, 2)
    assert built.targets == ("sm89",)


@needs_tensorrt
def test_tensorrt_refuses_a_graph_by_the_name_of_its_node(baked: Bundle) -> None:
    graph = convert(onnx.load(baked.network), "float32")
    node = helper.make_node("Det", [graph.graph.output[0].name], ["volume"], name="the_odd_one")
    graph.graph.node.append(node)
    with pytest.raises(ExportError, match=r"^TensorRT does not take node the_odd_one \(Det\)"):
        build_engine(graph)


@needs_tensorrt
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"targets": ["sm90"]}, r"^target sm90: tensorrt_rtx has sm120, .*; sm90 and sm100 need the full TensorRT$"),
        ({"batch": (8, 4, 64)}, r"^batch 8,4,64: must rise from at least 1$"),
    ],
)
def test_what_no_engine_can_be_built_for_is_refused(baked: Bundle, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        build_engine(onnx.load(baked.network), **wrong)


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="the full TensorRT is installed")
def test_a_tensorrt_that_is_missing_is_named(baked: Bundle) -> None:
    with pytest.raises(ExportError, match=r"^tensorrt cannot be imported \(No module named 'tensorrt'\); see NVIDIA"):
        build_engine(onnx.load(baked.network), flavour="full")


@needs_tensorrt
def test_engines_are_recorded_in_the_bundle_and_verified(tmp_path: Path) -> None:
    """By the command. A torn engine, or one of other weights, is refused."""
    out = tmp_path / "with-engines"
    flags = ["--tensorrt", "--precision", "float16", "--batch", "1,2,4", "--target", "sm86,sm120"]
    assert "step-float16-rtx.engine" in ran("export", DEFAULT_BUNDLE, "-o", out, *flags)
    bundle = Bundle.load(out)
    (engine,) = bundle.manifest.engines.values()
    assert (engine.graph, engine.precision) == ("step", "float16")
    assert (engine.batch, engine.targets) == ((1, 2, 4), ("sm86", "sm120"))

    engine_file = out / "engines" / "step-float16-rtx.engine"
    whole = engine_file.read_bytes()
    engine_file.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=r"engines/step-float16-rtx.engine was altered"):
        Bundle.load(out)
    engine_file.write_bytes(whole)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["engines"]["engines/step-float16-rtx.engine"]["network_sha256"] = "0" * 64
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"was built from another model.onnx; build it again$"):
        Bundle.load(out)


@pytest.mark.parametrize(
    ("version", "capability", "refusal"),
    [
        ("1.7", "89", None),
        ("1.8", "89", "it was built by TensorRT 1.7, here is 1.8"),
        ("1.7", "75", "it was built for sm86, sm89, this GPU is sm75"),
    ],
)
def test_an_engine_says_why_it_cannot_run(version: str, capability: str, refusal: str | None) -> None:
    engine = EngineFile(
        flavour="rtx", version="1.7", graph="step", precision="float16", batch=(1, 2, 4), targets=("sm86", "sm89"),
        network_sha256="0" * 64,
    )  # fmt: skip
    assert engine.refusal(version, capability) == refusal


@needs_tensorrt
def test_a_student_that_is_called_twice_a_step_has_no_whole_sampler(guided: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"calls its network twice a step: it has no whole-sampler graph$"):
        add_engines(guided, tmp_path / "out", has_sampler=True)
