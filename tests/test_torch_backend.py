"""A torch module as the engine's backend: the samples of its own export, and no other module's."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import network

from fewstep.export.torch_backend import TorchBackend, torch_backend
from fewstep.runtime import Bundle, Engine, Request
from fewstep.runtime.backends import BackendError, OnnxBackend


def rounded(seed: int) -> torch.nn.Module:
    """The network of a test's bundle, with its weights as the bundle stores them: large ones in half precision."""
    net = network(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.numel() >= 256:
                parameter.copy_(parameter.half())
    return net


def test_it_says_what_onnx_runtime_says(baked: Bundle) -> None:
    """At every batch size, to rounding, in the same memory at each call."""
    ours = TorchBackend(rounded(0), baked, 5, "cpu")
    theirs = OnnxBackend(baked.network, 5, baked.manifest.sample_shape)
    assert set(ours.inputs) == set(theirs.inputs)
    rng = np.random.default_rng(1)
    for rows in (5, 1, 3, 5):
        for name, array in theirs.inputs.items():
            values = rng.integers(10, size=5) if name == "label" else rng.standard_normal(array.shape)
            array[...] = values
            ours.inputs[name][...] = values
        wanted = theirs(rows)
        got = ours(rows)
        assert got.shape == wanted.shape
        assert got.ctypes.data == ours(1).ctypes.data
        assert np.abs(ours(rows) - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("is_guided", [False, True])
def test_the_engine_makes_the_same_samples_with_it(baked: Bundle, guided: Bundle, is_guided: bool) -> None:
    bundle = guided if is_guided else baked
    asked = [("ancestral", 4), ("dpmpp_2m", 3), ("ddim", 8), ("heun", 7)]
    requests = [
        Request(i, bundle.tableau(solver, steps), i % 10, 3.0 if is_guided else None)
        for i, (solver, steps) in enumerate(asked)
    ]
    here = Engine(bundle, max_rows=3, threads=1).generate(requests)
    there = Engine(bundle, max_rows=3, backend=torch_backend(rounded(0), "cpu")).generate(requests)
    for one, other in zip(here, there, strict=True):
        assert np.abs(one.pixels - other.pixels).max() <= 1e-3 * np.abs(one.pixels).max()


def test_the_module_of_another_bundle_is_refused(baked: Bundle) -> None:
    with pytest.raises(BackendError, match=r"^the module is not the network of digits: it differs by \d"):
        Engine(baked, backend=torch_backend(network(1), "cpu"))


def test_weights_before_their_rounding_are_taken(baked: Bundle) -> None:
    Engine(baked, max_rows=2, backend=torch_backend(network(0), "cpu"))


def test_a_module_that_says_nan_is_refused(baked: Bundle) -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: Any, t: Any, label: Any) -> Any:
            return x * float("nan")

    with pytest.raises(BackendError, match=r"differs by nan$"):
        Engine(baked, max_rows=1, backend=torch_backend(Broken(), "cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a GPU")
def test_without_a_gpu_the_error_says_so(baked: Bundle) -> None:
    with pytest.raises(BackendError, match=r"^torch has no CUDA device here$"):
        Engine(baked, backend=torch_backend(network(0)))
