"""Networks whose weights do not fit into the ONNX file: external data, from export to serving.

The size at which weights go outside is lowered, so that a small student takes the way of one with gigabytes.
"""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

from fewstep.export import onnx_file
from fewstep.export.additions import add_engines, add_precisions
from fewstep.runtime import Bundle, BundleError, Engine, Request
from fewstep.runtime.backends import BackendError
from fewstep.runtime.bundle import MANIFEST, NETWORK, WEIGHTS, write_manifest


@pytest.fixture(autouse=True)
def all_networks_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "_OUTSIDE", 0)


@pytest.fixture(scope="module")
def large(make_bundle: Callable[..., Path]) -> Bundle:
    return Bundle.load(make_bundle(is_large=True))


@pytest.fixture
def copy(large: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(large.path, tmp_path / "copy"))


def rehash(folder: Path) -> None:
    """Write the manifest anew, as somebody would who altered the bundle on purpose."""
    stated = json.loads((folder / MANIFEST).read_text("utf-8"))
    write_manifest(folder, {name: value for name, value in stated.items() if name not in ("format", "files")})


def test_the_weights_stand_beside_the_graph_and_give_the_same_bits(large: Bundle, baked: Bundle) -> None:
    inside, outside = ((large.path / name).stat().st_size for name in (NETWORK, WEIGHTS))
    assert outside > 0
    assert inside < baked.network.stat().st_size
    requests = [(Request(i, bundle.tableau(), 1), bundle) for i in range(3) for bundle in (large, baked)]
    pixels = [Engine(bundle, threads=1).generate([request])[0].pixels for request, bundle in requests]
    for ours, theirs in zip(pixels[::2], pixels[1::2], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_fingerprint_is_of_the_weights_too(large: Bundle, copy: Path) -> None:
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[100] ^= 1
    (copy / WEIGHTS).write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx\.data"):
        Bundle.load(copy)
    rehash(copy)
    assert Bundle.load(copy).weights_sha256 != large.weights_sha256


def test_missing_weights_are_refused_by_name(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=r"model\.onnx\.data"):
        Bundle.load(copy)


@pytest.mark.parametrize("location", ["../outside.data", "/etc/passwd"])
def test_weights_outside_the_bundle_are_refused(copy: Path, location: str) -> None:
    (copy.parent / "outside.data").write_bytes((copy / WEIGHTS).read_bytes())
    model = onnx.load(str(copy / NETWORK), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (copy / NETWORK).write_bytes(model.SerializeToString())
    rehash(copy)
    with pytest.raises(BackendError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        Engine(Bundle.load(copy), threads=1)


def test_precisions_are_made_of_it(large: Bundle, tmp_path: Path) -> None:
    bundle, report = add_precisions(large, tmp_path / "more", ["float16"])
    assert {"precisions/float16.onnx", "precisions/float16.onnx.data"} <= set(bundle.manifest.files)
    assert max(step["relative"] for step in report["against_float32"]["float16"]["steps"]) < 5e-3
    assert bundle.weights_sha256 == large.weights_sha256


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
def test_engines_are_built_of_it(large: Bundle, tmp_path: Path) -> None:
    bundle, made = add_engines(large, tmp_path / "more", precisions=["float16"], batch=(1, 2, 4))
    (entry,) = made.values()
    assert entry.network_sha256 == bundle.weights_sha256
