"""The fused step inside a TensorRT engine: ``fewstep::FewStepUpdate`` as a quick-deploy plugin, ahead of time.

A whole-sampler graph carries the operator as a function of standard operators, which TensorRT's parser takes apart.
With the function left out the parser looks for a plugin of the operator's domain and name, and finds the one made here:
``kernels/update.cu``, compiled to PTX, which TensorRT puts into the engine with the way to launch it. Such an engine
needs no Python to run. PTX is for compute capability 7.5 and later; the driver must not be older than the compiler.

Needs ``tensorrt.plugin`` with ``aot_impl``: the full TensorRT from 10.7 on. TensorRT for RTX has no such module. Not
tried with the full TensorRT and not run on a GPU yet; the tests register it with NVIDIA's own Python sources.
"""

import importlib
from types import GenericAlias, ModuleType
from typing import Any

import onnx

from ..kernels.cuda import CudaError, compile_ptx
from .step_graph import ExportError
from .update_op import DOMAIN, NAME

PLUGIN = f"{DOMAIN}::{NAME}"
KERNEL = "fewstep_update"
SOURCE = "update.cu"
CAPABILITY = "75"
THREADS, WIDTH = 256, 4  # of a block; elements that a thread moves


def without_body(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph whose `FewStepUpdate` nodes have no function any more, so that only a plugin can run them."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.functions[:]
    bare.functions.extend(function for function in model.functions if function.name != NAME)
    return bare


def register_update(trt: ModuleType) -> None:
    """Make the plugin known to TensorRT, once in a process.

    Args:
        trt: the full TensorRT's module.

    Raises:
        ExportError: it has no quick-deploy plugins, or there is no compiler.
    """
    try:
        plugin: Any = importlib.import_module(f"{trt.__name__}.plugin")
        has_plugins = hasattr(plugin, "aot_impl")
    except ImportError:
        has_plugins = False
    if not has_plugins:
        raise ExportError(
            f"{trt.__name__} {trt.__version__} has no ahead-of-time plugins; the full TensorRT has from 10.7 on, "
            "and without the plugin the graph's own operators do its work"
        )
    if hasattr(getattr(plugin.op, DOMAIN, None), NAME):
        return
    try:
        ptx = compile_ptx(CAPABILITY, SOURCE)
    except CudaError as error:
        raise ExportError(str(error)) from None

    def describe(x: Any, raw: Any, noise: Any, history: Any, weights: Any) -> Any:
        return x.like(), history.like(), x.like()

    def launch(x: Any, raw: Any, noise: Any, history: Any, weights: Any, outputs: Any, tactic: Any) -> Any:
        rows, first, *others = x.shape_expr
        elements = first
        for size in others:
            elements = elements * size
        parameters = plugin.KernelLaunchParams()
        parameters.grid_x, parameters.grid_y = plugin.cdiv(elements, THREADS * WIDTH), rows
        parameters.block_x = THREADS
        sizes = plugin.SymIntExprs(2)
        sizes[0], sizes[1] = plugin.SymInt32(elements), plugin.SymInt32(history.shape_expr[1])
        return KERNEL, ptx, parameters, sizes

    # TensorRT reads the schema from annotations, which must be its own classes.
    inputs = dict.fromkeys(("x", "raw", "noise", "history", "weights"), plugin.TensorDesc)
    describe.__annotations__ = {**inputs, "return": _tuple_of(*[plugin.TensorDesc] * 3)}
    made = _tuple_of(str, bytes, plugin.KernelLaunchParams, plugin.SymIntExprs)
    launch.__annotations__ = {**inputs, "outputs": _tuple_of(plugin.TensorDesc), "tactic": int, "return": made}
    plugin.register(PLUGIN)(describe)
    plugin.aot_impl(PLUGIN)(launch)


def _tuple_of(*types: Any) -> Any:
    return GenericAlias(tuple, types)
