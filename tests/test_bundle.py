"""Bundles: a folder is served only when it is exactly what its manifest says, and each refusal names what is wrong."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from fewstep.export import ExportError, Parity, write_bundle
from fewstep.runtime import DEFAULT_BUNDLE, Bundle, BundleError, Engine, TableauError, embedded_names
from fewstep.runtime import bundle as bundle_module
from fewstep.runtime.bundle import MANIFEST, NETWORK, write_manifest
from fewstep.runtime.call import request_of
from fewstep.runtime.schedules import karras, vp_cosine
from fewstep.runtime.solvers import ancestral, ddim

TABLE = "tableaus/ddim-4.safetensors"
TABLES = "tableaus/{}-{}.safetensors"


def manifest_of(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((path / MANIFEST).read_text("utf-8"))
    return fields


def change(folder: Path, /, **fields: Any) -> None:
    """Alter entries of the manifest, whatever that makes of it."""
    (folder / MANIFEST).write_text(json.dumps({**manifest_of(folder), **fields}), "utf-8")


def hash_again(path: Path) -> None:
    """Make the manifest list the files as they are."""
    fields = manifest_of(path)
    del fields["format"], fields["files"]
    write_manifest(path, fields)


def refused(path: Path, message: str) -> None:
    """Loading must fail in one line that begins with the path and goes on as said."""
    with pytest.raises(BundleError, match=f"{message}$") as caught:
        Bundle.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


# --- what loads


def test_a_bundle_says_what_it_is(make_bundle: Callable[..., Path]) -> None:
    bundle = Bundle.load(make_bundle())
    assert bundle.name == "digits"
    assert bundle.network.name == NETWORK
    assert bundle.tableau() is bundle.tableaus["ancestral", 4]
    assert set(manifest_of(bundle.path)["files"]) == {
        NETWORK, "NOTICE", *(TABLES.format(*key) for key in bundle.tableaus),
    }  # fmt: skip


def test_a_bundle_loads_from_a_string_and_wherever_it_is_moved(bundle_copy: Path, tmp_path: Path) -> None:
    moved = tmp_path / "a name with blanks, ü and 'quotes'"
    bundle_copy.rename(moved)
    assert Bundle.load(str(moved)).name == "digits"


def test_files_may_be_links_as_in_a_download_cache(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / NETWORK).rename(tmp_path / "blob")
    (bundle_copy / NETWORK).symlink_to(tmp_path / "blob")
    assert Bundle.load(bundle_copy).name == "digits"


@pytest.mark.parametrize(
    ("solver", "num_steps", "key"),
    [
        (None, None, ("ancestral", 4)),
        (None, 8, ("ancestral", 8)),
        (None, 7, ("heun", 7)),  # only heun has seven
        ("ddim", 2, ("ddim", 2)),
        ("dpmpp_2m", None, ("dpmpp_2m", 4)),
        ("heun", None, ("heun", 3)),  # the nearest to the default's four
    ],
)
def test_what_a_request_leaves_out_is_taken_from_the_default(
    make_bundle: Callable[..., Path], solver: str | None, num_steps: int | None, key: tuple[str, int]
) -> None:
    tableau = Bundle.load(make_bundle()).tableau(solver, num_steps)
    assert (tableau.name, tableau.num_steps) == key


def test_a_number_of_steps_may_have_a_default_of_its_own(bundle_copy: Path) -> None:
    """Asked for alone, chosen by a deadline, and the steps that a request gets that says nothing."""
    change(bundle_copy, default_tableau={"solver": "ancestral", "num_steps": 4, "by_steps": {"2": "ddim", "4": "ddim"}})
    bundle = Bundle.load(bundle_copy)
    found = [bundle.tableau(num_steps=steps).name for steps in (None, 1, 2, 3, 4, 8)]
    assert found == ["ddim", "ancestral", "ddim", "ancestral", "ddim", "ancestral"]
    assert bundle.tableau("ancestral").num_steps == 4
    engine = Engine(bundle, max_rows=1)
    request = request_of(engine, seed=0, label=1, min_steps=1, max_steps=3, deadline_s=1e9)
    names = [table.name for table in (request.tableau, *request.fallbacks)]
    assert names == ["ancestral", "ddim", "ancestral"]


def test_a_table_there_is_not_is_refused_with_those_there_are(make_bundle: Callable[..., Path]) -> None:
    listed = "ancestral with 1, 2, 3, 4, 8; ddim with 1, 2, 3, 4, 8; dpmpp_2m with 1, 2, 3, 4, 8; heun with 3, 7"
    bundle = Bundle.load(make_bundle())
    with pytest.raises(ValueError, match=f"^digits has no table for ancestral with 5 steps; it has {listed}$"):
        bundle.tableau(num_steps=5)
    with pytest.raises(ValueError, match=f"^digits has no table for euler with 4 steps; it has {listed}$"):
        bundle.tableau("euler")
    with pytest.raises(ValueError, match=f"^digits has no table for heun with 4 steps; it has {listed}$"):
        bundle.tableau("heun", 4)
    with pytest.raises(ValueError, match=f"^DPM-adaptive is no table: it chooses its steps .*; digits has {listed}$"):
        Bundle.load(make_bundle()).tableau("DPM-adaptive", 4)


@pytest.mark.parametrize(("text", "label"), [("digit 3", 3), (" DIGIT 3 ", 3), ("3", 3), ("0", 0), ("9", 9)])
def test_a_label_is_a_class_name_or_a_number(make_bundle: Callable[..., Path], text: str, label: int) -> None:
    labels = Bundle.load(make_bundle()).manifest.labels
    assert labels is not None
    assert labels.parse(text) == label


@pytest.mark.parametrize("text", ["", "10", "-1", "digit", "3.0", "٣", "²", "9" * 5000])
def test_any_other_text_is_no_label(make_bundle: Callable[..., Path], text: str) -> None:
    labels = Bundle.load(make_bundle()).manifest.labels
    assert labels is not None
    with pytest.raises(ValueError, match=r"is no class of this student; it has 0 to 9: digit 0, .*, digit 9$"):
        labels.parse(text)


# --- files


def test_a_missing_file_is_refused(bundle_copy: Path) -> None:
    (bundle_copy / TABLE).unlink()
    refused(bundle_copy, f": {TABLE} is missing")


def test_an_unknown_file_is_refused(bundle_copy: Path) -> None:
    (bundle_copy / "tableaus" / "evil.pkl").write_bytes(b"")
    refused(bundle_copy, r": tableaus/evil\.pkl is unknown to the manifest; remove it or list it")


def test_an_unknown_link_is_refused_whatever_it_points_at(bundle_copy: Path, tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "nowhere"):
        (bundle_copy / "link").symlink_to(target)
        refused(bundle_copy, ": link is unknown to the manifest; remove it or list it")
        (bundle_copy / "link").unlink()


def test_a_listed_link_to_nowhere_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / NETWORK).unlink()
    (bundle_copy / NETWORK).symlink_to(tmp_path / "nowhere")
    refused(bundle_copy, r": model\.onnx cannot be read: No such file or directory")


@pytest.mark.parametrize("name", [NETWORK, TABLE, "NOTICE"])
def test_an_altered_file_is_refused(bundle_copy: Path, name: str) -> None:
    data = bytearray((bundle_copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle_copy / name).write_bytes(data)
    refused(bundle_copy, f": {name} was altered: sha256 [0-9a-f]{{12}}, the manifest says [0-9a-f]{{12}}")


@pytest.mark.parametrize("name", [NETWORK, TABLE])
@pytest.mark.parametrize("kept", [0, 100])
def test_a_truncated_file_is_refused(bundle_copy: Path, name: str, kept: int) -> None:
    (bundle_copy / name).write_bytes((bundle_copy / name).read_bytes()[:kept])
    refused(bundle_copy, f": {name} was altered: .*")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "tableaus/../../secret", MANIFEST])
def test_a_file_outside_the_bundle_is_refused(bundle_copy: Path, name: str) -> None:
    change(bundle_copy, files={**manifest_of(bundle_copy)["files"], name: "0" * 64})
    refused(bundle_copy, f"files: '{name}' is not a path inside the bundle")


@pytest.mark.parametrize("name", ["./model.onnx", "tableaus", "", "tableaus//ddim-4.safetensors"])
def test_a_file_by_another_spelling_is_refused(bundle_copy: Path, name: str) -> None:
    change(bundle_copy, files={**manifest_of(bundle_copy)["files"], name: "0" * 64})
    refused(bundle_copy, f": {name} is missing")


def test_a_manifest_that_lists_no_network_is_refused(bundle_copy: Path) -> None:
    files = manifest_of(bundle_copy)["files"]
    del files[NETWORK]
    change(bundle_copy, files=files)
    refused(bundle_copy, r"files: model\.onnx is missing")


# --- the manifest


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, r": bundle\.json cannot be read: No such file or directory")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "not json", '{"format": 1'])
def test_a_broken_manifest_is_refused(bundle_copy: Path, text: str) -> None:
    (bundle_copy / MANIFEST).write_text(text, "utf-8")
    refused(bundle_copy, r"bundle\.json: the file: .+")


def test_a_manifest_in_another_encoding_is_refused(bundle_copy: Path) -> None:
    (bundle_copy / MANIFEST).write_bytes(b"\xff\xfe{")
    refused(bundle_copy, r": bundle\.json cannot be read: it is not UTF-8")


def test_a_manifest_cut_short_is_refused_wherever_it_is_cut(bundle_copy: Path) -> None:
    text = (bundle_copy / MANIFEST).read_bytes().rstrip()
    for length in range(0, len(text), 97):
        (bundle_copy / MANIFEST).write_bytes(text[:length])
        refused(bundle_copy, r"bundle\.json: .+")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"code": "x"}, "code: Extra inputs are not permitted"),
        ({"format": 2}, "format: Input should be 1"),
        ({"name": "../x"}, "name: String should match pattern .*"),
        ({"name": ""}, "name: String should match pattern .*"),
        ({"name": None}, "name: Input should be a valid string"),
        ({"sample_shape": [1, 8]}, r"sample_shape\.2: Field required"),
        ({"sample_shape": [1, 8, 0]}, r"sample_shape\.2: Input should be greater than or equal to 1"),
        ({"path": "karras"}, "path: Input should be 've', 'vp' or 'flow'"),
        ({"output": {"type": "edm", "sigma": 1}}, r"output\.sigma: Extra inputs are not permitted"),
        ({"output": {"type": "edm", "sigma_data": 0}}, r"output\.sigma_data: Input should be greater than 0"),
        ({"labels": {"names": []}}, r"labels\.names: Tuple should have at least 1 item .*"),
        ({"labels": {"names": ["a", "A"]}}, "labels: Value error, class names must differ by more than case"),
        ({"labels": {"names": ["a"], "null": -1}}, r"labels\.null: Input should be greater than or equal to 0"),
        ({"guidance": {"default": 2}}, "guidance: Value error, default 2 is outside 1 to 1"),
        (
            {"guidance": {"mode": "classifier-free"}, "labels": {"names": ["a"]}},
            "the file: Value error, classifier-free guidance needs labels.null, .*",
        ),
        ({"files": {NETWORK: "abc"}}, r"files\.model\.onnx: String should match pattern .*"),
        ({"provenance": {"by": 3}}, r"provenance\.by: Input should be a valid string"),
    ],
)
def test_a_manifest_entry_that_cannot_be_is_refused(bundle_copy: Path, fields: dict[str, Any], message: str) -> None:
    change(bundle_copy, **fields)
    refused(bundle_copy, rf"bundle\.json: {message}")


def test_a_manifest_entry_left_out_is_refused(bundle_copy: Path) -> None:
    fields = manifest_of(bundle_copy)
    del fields["licence"]
    (bundle_copy / MANIFEST).write_text(json.dumps(fields), "utf-8")
    refused(bundle_copy, r"bundle\.json: licence: Field required")


# --- tables


def test_a_table_fitted_to_other_weights_is_refused(bundle_copy: Path) -> None:
    replace(ddim(karras(4)), weights_sha256="ab" * 32).save(bundle_copy / TABLE)
    hash_again(bundle_copy)
    refused(bundle_copy, f"{TABLE}: ddim: was fitted to weights abababababab, digits has [0-9a-f]{{12}}")


def test_a_table_fitted_to_these_weights_is_taken(bundle_copy: Path) -> None:
    weights = Bundle.load(bundle_copy).weights_sha256
    replace(ddim(karras(4)), weights_sha256=weights).save(bundle_copy / TABLE)
    hash_again(bundle_copy)
    assert Bundle.load(bundle_copy).tableau("ddim", 4).weights_sha256 == weights


def test_a_table_off_the_path_is_refused(bundle_copy: Path) -> None:
    ancestral(vp_cosine(4)).save(bundle_copy / "tableaus" / "ancestral-4.safetensors")
    hash_again(bundle_copy)
    refused(bundle_copy, r"ancestral-4\.safetensors: ancestral: level 0 is not on the ve path of digits")


def test_a_table_whose_form_the_network_cannot_give_is_refused(make_bundle: Callable[..., Path]) -> None:
    bundle = Bundle.load(make_bundle())
    fields = bundle.manifest.model_dump(mode="json")
    manifest = bundle.manifest.model_validate({**fields, "path": "flow", "output": {"type": "eps"}})
    levels = vp_cosine(2)
    levels.alpha[0], levels.sigma[0] = 0.0, 1.0
    levels.alpha[1], levels.sigma[1] = 0.5, 0.5
    with pytest.raises(TableauError, match=r"^ddim: x0 cannot be had from eps at alpha = 0, sigma = 1$"):
        replace(bundle, manifest=manifest).refuse_misfit(ddim(levels))


def test_a_file_that_holds_no_table_is_refused_once_by_name(bundle_copy: Path) -> None:
    (bundle_copy / TABLE).write_bytes(b"no table")
    hash_again(bundle_copy)
    with pytest.raises(BundleError, match=f"^{bundle_copy / TABLE}: is not a fewstep table$"):
        Bundle.load(bundle_copy)


def test_a_second_table_of_the_same_name_and_steps_is_refused(bundle_copy: Path) -> None:
    shutil.copy(bundle_copy / TABLE, bundle_copy / "tableaus" / "other.safetensors")
    hash_again(bundle_copy)
    refused(bundle_copy, r"tableaus/other\.safetensors: a second table for ddim with 4 steps")


def test_a_missing_default_table_is_refused(bundle_copy: Path) -> None:
    change(bundle_copy, default_tableau={"solver": "ddim", "num_steps": 5})
    refused(bundle_copy, ": the default table ddim with 5 steps is missing")
    change(bundle_copy, default_tableau={"solver": "ddim", "num_steps": 4, "by_steps": {"6": "euler"}})
    refused(bundle_copy, ": the default table euler with 6 steps is missing")


# --- names


def test_a_folder_that_does_not_exist_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    listed = ", ".join(embedded_names()) or "none"
    with pytest.raises(BundleError) as caught:
        Bundle.load(tmp_path / "none")
    said = f"{tmp_path / 'none'}: no such folder, and no embedded bundle of that name (there are: {listed})"
    assert str(caught.value) == said


def test_a_file_is_no_bundle(bundle_copy: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.load(bundle_copy / NETWORK)


@pytest.mark.parametrize("source", ["x\0y", "x" * 5000, "../embedded"])
def test_a_source_that_cannot_be_a_path_is_refused(source: str) -> None:
    with pytest.raises(BundleError, match=r"(no such folder|: cannot be read: File name too long$)") as caught:
        Bundle.load(source)
    assert len(str(caught.value)) < 400


def test_every_embedded_bundle_loads_by_its_name() -> None:
    for name in embedded_names():
        assert Bundle.load(name).name == name


def test_an_embedded_bundle_is_found_by_name_and_left_out_it_is_the_default(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(bundle_copy, tmp_path / "embedded" / DEFAULT_BUNDLE)
    (tmp_path / "embedded" / "no bundle").mkdir()
    monkeypatch.setattr(bundle_module, "EMBEDDED", tmp_path / "embedded")
    assert embedded_names() == [DEFAULT_BUNDLE]
    assert Bundle.load().path == Bundle.load(DEFAULT_BUNDLE).path == tmp_path / "embedded" / DEFAULT_BUNDLE


# --- writing


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph at once: these tests are about the folder, and torch takes seconds to trace a network."""

    def export(network: Any, sample_shape: tuple[int, ...], path: Path, *args: Any) -> Parity:
        size: list[str | int | None] = ["batch", *sample_shape]
        x, raw = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size) for name in ("x", "raw"))
        t = helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, ["batch"])
        constants = {"weight": np.array([network.weight.item()], np.float32), "shape": np.array([-1, 1, 1, 1])}
        nodes = [
            helper.make_node("Mul", ["x", "weight"], ["scaled"]),
            helper.make_node("Reshape", ["t", "shape"], ["time"]),
            helper.make_node("Add", ["scaled", "time"], ["raw"]),
        ]
        held = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
        graph = helper.make_graph(nodes, "linear", [x, t], [raw], held)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
        return Parity(1e-7, 1e-4)

    monkeypatch.setattr("fewstep.export.bundle.export_step_graph", export)


class Linear(torch.nn.Module):
    """The smallest network there is: it scales its input."""

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([weight]))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * self.weight + t[:, None, None, None]


def linear_fields(**changes: Any) -> dict[str, Any]:
    return {
        "name": "linear", "version": "1", "description": "", "sample_shape": (1, 4, 4), "path": "ve",
        "output": {"type": "x0"}, "default_tableau": {"solver": "ddim", "num_steps": 2}, "licence": "CC0-1.0",
        "provenance": {}, "metrics": {}, **changes,
    }  # fmt: skip


@pytest.mark.usefixtures("quick_export")
def test_a_written_bundle_stands_alone_in_its_folder(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "linear"
    bundle, parity = write_bundle(out, Linear(), [ddim(karras(2))], linear_fields(), extra_files={"NOTICE": b"x"})
    assert bundle.path == out
    export = bundle.manifest.metrics["export"]
    assert export["graph_error"] == parity.graph_error
    assert [error["step"] for error in export["steps"]] == list(range(bundle.tableau().num_steps))
    assert all(error["relative"] < 1e-6 for error in export["steps"])
    assert [path.name for path in out.parent.iterdir()] == ["linear"]
    assert Bundle.load(out).manifest == bundle.manifest


@pytest.mark.usefixtures("quick_export")
def test_a_bundle_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "linear"
    write_bundle(out, Linear(), [ddim(karras(2))], linear_fields())
    with pytest.raises(BundleError, match=r"linear: exists already$"):
        write_bundle(out, Linear(), [ddim(karras(2))], linear_fields(version="2"))
    bundle, _ = write_bundle(out, Linear(), [ddim(karras(2))], linear_fields(version="2"), replace=True)
    assert bundle.manifest.version == "2"


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match=r"is not a bundle, and is not replaced$"):
        write_bundle(tmp_path, Linear(), [ddim(karras(2))], linear_fields(), replace=True)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("tables", "fields", "error"),
    [
        ([ddim(karras(2))], linear_fields(path="karras"), "path: Input should be 've', 'vp' or 'flow'"),
        ([ddim(karras(3))], linear_fields(), "the default table ddim with 2 steps is missing"),
        ([ddim(vp_cosine(2))], linear_fields(), "level 0 is not on the ve path of linear"),
        ([ddim(karras(2))] * 2, linear_fields(), "two tables for ddim with 2 steps"),
    ],
)
@pytest.mark.usefixtures("quick_export")
def test_a_failed_export_leaves_nothing_behind(
    tables: list[Any], fields: dict[str, Any], error: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=error):
        write_bundle(tmp_path / "linear", Linear(), tables, fields)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_gives_nan_is_not_exported_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.onnx: the graph differs from the network by nan of its output$"):
        write_bundle(tmp_path / "linear", Linear(float("nan")), [ddim(karras(2))], linear_fields())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick_export")
def test_a_failed_export_leaves_the_bundle_that_was_there(tmp_path: Path) -> None:
    out = tmp_path / "linear"
    bundle, _ = write_bundle(out, Linear(), [ddim(karras(2))], linear_fields())
    with pytest.raises(BundleError):
        write_bundle(out, Linear(), [ddim(karras(3))], linear_fields(), replace=True)
    assert Bundle.load(out).manifest == bundle.manifest
    assert [path.name for path in tmp_path.iterdir()] == ["linear"]
