"""The compiled half of the full TensorRT's Python package, as far as ``tensorrt.plugin`` and a build ask for it.

NVIDIA's bindings wheel holds the Python sources of ``tensorrt.plugin``, which run over this in the place of a library
that is not to be had without NVIDIA's index. Expressions are evaluated at once: a shape is given, a number comes out.
What is built is no engine: it is what the build was asked for, as JSON.
"""

import enum
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest


class DimensionOperation(enum.Enum):
    SUM = enum.auto()
    SUB = enum.auto()
    PROD = enum.auto()
    FLOOR_DIV = enum.auto()
    CEIL_DIV = enum.auto()
    MAX = enum.auto()
    MIN = enum.auto()
    EQUAL = enum.auto()
    LESS = enum.auto()


WORK = {
    DimensionOperation.SUM: lambda a, b: a + b,
    DimensionOperation.SUB: lambda a, b: a - b,
    DimensionOperation.PROD: lambda a, b: a * b,
    DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
    DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}


class IDimensionExpr:
    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class IExprBuilder:
    def constant(self, value: int) -> IDimensionExpr:
        return IDimensionExpr(value)

    def operation(self, work: DimensionOperation, a: IDimensionExpr, b: IDimensionExpr) -> IDimensionExpr:
        return IDimensionExpr(WORK[work](a.value, b.value))


class Dims(list[Any]):
    MAX_DIMS = 8


class DimsExprs(Dims):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class PluginTensorDesc:
    def __init__(self) -> None:
        self.dims: Any = Dims()
        self.type: Any = None
        self.format: Any = None
        self.scale = 1.0


class DynamicPluginTensorDesc:
    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.desc = PluginTensorDesc()
        self.desc.dims, self.desc.type, self.desc.format = Dims(shape), dtype, "linear"


class Logger:
    INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

    def log(self, severity: int, message: str) -> None:
        pass


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators.get((name, version, namespace))


# --- a build


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1
    PREFER_AOT_PYTHON_PLUGINS = 2
    PREFER_JIT_PYTHON_PLUGINS = 3


class Network:
    def __init__(self, flags: int) -> None:
        self.flags = {flag.name for flag in NetworkDefinitionCreationFlag if flags >> flag & 1}
        self.inputs: list[Any] = []
        self.plugins = self.num_layers = 0

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, i: int) -> Any:
        return self.inputs[i]


class TimingCache:
    """Counts the builds that used it."""

    HEAD = b"cache of sm90 "

    def __init__(self, data: bytes) -> None:
        self.builds = int(data.removeprefix(self.HEAD) or b"0")

    def serialize(self) -> bytes:
        return self.HEAD + str(self.builds).encode()


class Config:
    """Without compute capabilities to set: the GPU at hand is built for."""

    def __init__(self) -> None:
        self.cache = TimingCache(b"")
        self.profile: dict[str, Any] = {}

    def create_timing_cache(self, data: bytes) -> TimingCache | None:
        return TimingCache(data) if data[: len(TimingCache.HEAD)] in (b"", TimingCache.HEAD) else None

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return not ignore_mismatch

    def get_timing_cache(self) -> TimingCache:
        return self.cache

    def add_optimization_profile(self, profile: Any) -> None:
        self.profile = profile.shapes


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = shapes


class Builder:
    def __init__(self, logger: Any) -> None:
        self.create_network, self.create_builder_config = Network, Config
        self.create_optimization_profile = Profile

    def build_serialized_network(self, network: Network, config: Config) -> bytes:
        assert {value.name for value in network.inputs if -1 in value.shape} == set(config.profile)
        config.cache.builds += 1
        flags = sorted(network.flags)
        return json.dumps({"flags": flags, "plugins": network.plugins, "profile": config.profile}).encode()


class OnnxParser:
    """Takes an operator of another domain apart, if it has a body; else looks for a plugin of its name."""

    registry: Registry

    def __init__(self, network: Network, logger: Any) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        model = onnx.load(path)
        bodies = {(function.domain, function.name) for function in model.functions}
        for node in model.graph.node:
            if node.domain and (node.domain, node.op_type) not in bodies:
                self.node = node
                if not self.registry.get_creator(node.op_type, "1", node.domain):
                    return False
                self.network.plugins += 1
        self.network.num_layers = len(model.graph.node)
        for value in model.graph.input:
            shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim)
            self.network.inputs.append(SimpleNamespace(name=value.name, shape=shape))
        return True

    def get_error(self, i: int) -> Any:
        told = {"node_name": self.node.name, "node_operator": self.node.op_type, "desc": "no plugin"}
        return SimpleNamespace(**{name: lambda value=value: value for name, value in told.items()})


@contextmanager
def installed(bindings: Path) -> Iterator[ModuleType]:
    """``tensorrt`` with NVIDIA's own ``tensorrt.plugin``; ``bindings`` is the folder of the wheel."""
    trt, registry = ModuleType("tensorrt"), Registry()
    trt.__version__ = "11.4"  # type: ignore[attr-defined]
    trt.__path__ = []
    empty = ("ITensor", "ISymExpr", "IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickAOTBuild",
             "IPluginV3QuickRuntime", "IPluginCreatorV3Quick")  # fmt: skip
    contents: dict[str, Any] = {name: type(name, (), {}) for name in empty}
    for known in (DimensionOperation, IDimensionExpr, IExprBuilder, Dims, DimsExprs, PluginTensorDesc,
                  DynamicPluginTensorDesc, Logger, Builder, NetworkDefinitionCreationFlag):  # fmt: skip
        contents[known.__name__] = known
    contents["ILogger"] = Logger
    contents["OnnxParser"] = type("OnnxParser", (OnnxParser,), {"registry": registry})
    fields = ("INT8", "INT16", "INT32", "INT64", "FLOAT16", "FLOAT32", "FLOAT64", "CHAR", "UNKNOWN")
    contents |= {
        "PluginFieldType": SimpleNamespace(**{name: name for name in fields}),
        "PluginField": lambda *given: given, "PluginFieldCollection": list,
        "PluginArgType": SimpleNamespace(INT="int"),
        "PluginArgDataType": SimpleNamespace(INT8="int8", INT16="int16", INT32="int32"),
        "QuickPluginCreationRequest": enum.Enum(
            "QuickPluginCreationRequest", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT"
        ),
        "DataType": type("DataType", (), {"FLOAT": "float32", "HALF": "float16"}), "float32": "float32",
        "TensorFormat": type("TensorFormat", (), {"LINEAR": "linear"}),
        "TensorRTPhase": SimpleNamespace(BUILD="build"), "get_plugin_registry": lambda: registry,
    }  # fmt: skip
    for name, value in contents.items():
        setattr(trt, name, value)
    folder = bindings / "plugin"
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    plugin = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", trt)
        patch.setitem(sys.modules, "tensorrt.plugin", plugin)
        trt.plugin = plugin  # type: ignore[attr-defined]
        spec.loader.exec_module(plugin)
        yield trt
    for name in [name for name in sys.modules if name.startswith("tensorrt.")]:
        del sys.modules[name]
