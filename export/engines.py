"""TensorRT engines from step and sampler graphs; one code path over TensorRT for RTX and the full TensorRT.

Engines are strongly typed: precision is what the graph says (see `precisions`). TensorRT for RTX builds without
a GPU, for several architectures in one engine, up to compute capability 8.9 and 12; it has neither 9.0 nor 10.0.
The full TensorRT builds for the GPU at hand. Building was tried with TensorRT for RTX 1.7; no engine was run on a
GPU yet, and the full TensorRT was a stand-in that writes down what it is asked for.
"""

import importlib
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import onnx

from ..runtime.files import replace_all
from ..runtime.gpu_backends import capability
from .onnx_file import save_model
from .step_graph import ExportError
from .tensorrt_plugin import register_update, without_body

log = logging.getLogger("fewstep")

Flavour = Literal["rtx", "full"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
_MODULES = {"rtx": "tensorrt_rtx", "full": "tensorrt"}
_INSTALL = {"rtx": "pip install 'fewstep[tensorrt]'", "full": "see NVIDIA's TensorRT documentation"}


class BuiltEngine(NamedTuple):
    """A serialised engine and what made it."""

    data: bytes
    version: str  # of TensorRT; an engine runs with this version only
    layers: int
    targets: tuple[str, ...]  # architectures it runs on, such as sm89; none: where a portable one does


def tensorrt_of(flavour: Flavour) -> ModuleType:
    """The Python module of a flavour.

    Raises:
        ExportError: it is not installed.
    """
    name = _MODULES[flavour]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"{name} cannot be imported ({error}); {_INSTALL[flavour]}") from None


def build_engine(
    model: onnx.ModelProto,
    *,
    flavour: Flavour = "rtx",
    batch: tuple[int, int, int] = (1, 8, 64),
    targets: Sequence[str] = (),
    timing_cache: Path | None = None,
    has_plugin: bool = False,
) -> BuiltEngine:
    """Build an engine.

    Args:
        model: a step graph or a sampler graph; its first dimensions named anything are the batch.
        flavour: ``rtx`` or ``full``.
        batch: smallest, usual and largest number of rows.
        targets: architectures such as ``sm89``; left out, RTX builds a portable engine and full TensorRT one for
            the GPU at hand.
        timing_cache: a file in which the full TensorRT keeps measured kernel times between builds; made if it is not
            there. RTX measures when it first runs, not when it builds.
        has_plugin: run the graph's `FewStepUpdate` nodes by our kernel in the engine; see `tensorrt_plugin`.

    Raises:
        ExportError: TensorRT is not installed, does not take the graph (the message names the node), cannot build for a
            target, is asked for a plugin and has none, or for a timing cache that it does not take.
    """
    if timing_cache is not None and flavour == "rtx":
        raise ExportError("timing_cache: TensorRT for RTX measures nothing when it builds; leave it out")
    if targets and flavour == "full":
        raise ExportError(f"target {targets[0]}: the full TensorRT builds for the GPU at hand only; leave targets out")
    trt = tensorrt_of(flavour)
    built_for = tuple(targets) if flavour == "rtx" else (_gpu_at_hand(),)
    low, usual, high = batch
    if not 1 <= low <= usual <= high:
        raise ExportError(f"batch {low},{usual},{high}: must rise from at least 1")
    said: list[str] = []
    builder = trt.Builder(_logger(trt, said))
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if has_plugin:
        register_update(trt)
        model = without_body(model)
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, builder_logger := _logger(trt, said))
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, file := Path(folder) / "model.onnx")
        if not parser.parse_from_file(str(file)):
            raise ExportError(_refusal(parser))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        value = network.get_input(i)
        shape = tuple(value.shape)
        if -1 in shape:
            profile.set_shape(value.name, *(tuple(n if size < 0 else size for size in shape) for n in batch))
    config.add_optimization_profile(profile)
    _aim(trt, config, targets)
    if timing_cache is not None:
        kept = timing_cache.read_bytes() if timing_cache.is_file() else b""
        cache = config.create_timing_cache(kept)
        if cache is None or not config.set_timing_cache(cache, False):
            raise ExportError(
                f"{timing_cache}: is no timing cache of TensorRT {trt.__version__} and this GPU; remove it"
            )
    data = builder.build_serialized_network(network, config)
    del builder_logger
    if data is None:
        raise ExportError(f"TensorRT built no engine: {said[0] if said else 'it gave no reason'}")
    if timing_cache is not None:
        replace_all({timing_cache: bytes(config.get_timing_cache().serialize())})  # builds may share the file
    return BuiltEngine(bytes(data), str(trt.__version__), network.num_layers, built_for)


def _gpu_at_hand() -> str:
    """What the full TensorRT builds for, such as ``sm90``; without it a bundle could not say where an engine runs."""
    try:
        return f"sm{capability()}"
    except ImportError:
        told = "which CuPy names: pip install 'fewstep[gpu]'"
    except Exception as error:  # CuPy's own, of the driver
        told = f"and there is none: {error}"
    raise ExportError(f"the full TensorRT builds for the GPU at hand, {told}")


def _logger(trt: Any, said: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.Logger.ERROR, trt.Logger.INTERNAL_ERROR):
                said.append(message)
            elif severity == trt.Logger.WARNING:
                log.debug("TensorRT: %s", message)

    return Logger()


def _refusal(parser: Any) -> str:
    error = parser.get_error(0)
    node = f"node {error.node_name() or error.node()} ({error.node_operator()})"
    reason = error.desc()
    return f"TensorRT does not take {node}" + ("" if reason == "false" else f": {reason}")


def _aim(trt: Any, config: Any, targets: Sequence[str]) -> None:
    if not targets:
        return
    known = trt.ComputeCapability
    names = [name for name in dir(known) if name.startswith("SM")]
    for target in targets:
        if target.upper() not in names:
            listed = ", ".join(name.lower() for name in names)
            raise ExportError(f"target {target}: {trt.__name__} has {listed}; sm90 and sm100 need the full TensorRT")
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        config.set_compute_capability(getattr(known, target.upper()), i)
