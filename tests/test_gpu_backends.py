"""What of the GPU backends can be held without a GPU: the choice of an engine, and errors that say what is missing."""

import dataclasses
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

from fewstep.runtime import Bundle, Engine
from fewstep.runtime.backends import BackendError
from fewstep.runtime.bundle import EngineFile
from fewstep.runtime.gpu_backends import OnnxCudaBackend, TensorRTBackend, choose_engine


def with_engines(bundle: Bundle, **changes: Any) -> Bundle:
    entry = {
        "flavour": "rtx", "version": "1.7", "graph": "step", "precision": "float16", "batch": (1, 8, 16),
        "targets": ("sm89",), "network_sha256": "0" * 64, **changes,
    }  # fmt: skip
    engines = {"engines/one.engine": EngineFile.model_validate(entry)}
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"engines": engines}))


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("tensorrt_rtx")
    module.__version__ = "1.7"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    return module


def test_an_engine_that_fits_is_chosen(baked: Bundle, tensorrt: ModuleType) -> None:
    assert choose_engine(with_engines(baked), 16, "89") == ("engines/one.engine", tensorrt)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "1.6"}, r"one\.engine: it was built by TensorRT 1\.6, here is 1\.7$"),
        ({"targets": ("sm86",)}, r"one\.engine: it was built for sm86, this GPU is sm89$"),
        ({"batch": (1, 2, 8)}, r"one\.engine: it takes 8 rows at most, 16 are asked for$"),
        ({"graph": "sampler"}, r"it has none; fewstep export --tensorrt builds them$"),
    ],
)
def test_an_engine_that_does_not_fit_says_why(
    baked: Bundle, tensorrt: ModuleType, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BackendError, match=reason):
        choose_engine(with_engines(baked, **changes), 16, "89")


@pytest.mark.skipif(find_spec("cupy") is not None, reason="CuPy is installed")
@pytest.mark.parametrize("backend", [OnnxCudaBackend, TensorRTBackend])
def test_without_cupy_the_error_says_what_to_install(baked: Bundle, backend: Any) -> None:
    with pytest.raises(BackendError, match=r"^the CUDA step needs CuPy: pip install 'fewstep\[gpu\]'$"):
        Engine(baked, backend=backend)
