"""The engine on a device that is not the CPU: nothing crosses but what must, and the samples are the CPU's to the bit.

The device of these tests is host memory in a type that, like CuPy's arrays, refuses to be computed with in numpy or
filled from it; only `Device`'s functions may cross.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
from mixed_requests import generate_making_room, requests_of

from fewstep.runtime import Bundle, Engine
from fewstep.runtime.backends import OnnxBackend
from fewstep.runtime.devices import Cpu, Device


class Guarded(np.ndarray[Any, Any]):
    """An array of the device."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{ufunc.__name__} of numpy on an array of the device")

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"{function.__name__} of numpy on an array of the device")

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, np.ndarray) and not isinstance(value, Guarded):
            raise TypeError("an array of numpy into one of the device")
        super().__setitem__(key, value)


class OtherDevice:
    """Counts the bytes that cross."""

    def __init__(self) -> None:
        self.bytes_in = self.bytes_out = 0
        self.turn: AbstractContextManager[Any] = nullcontext()

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.zeros(shape, dtype).view(Guarded)

    def put(self, target: Any, values: Any) -> None:
        assert isinstance(target, Guarded)
        self.bytes_in += values.nbytes
        target.view(np.ndarray)[...] = values

    def fetch(self, array: Any) -> Any:
        assert isinstance(array, Guarded)
        self.bytes_out += array.nbytes
        return np.array(array.view(np.ndarray))

    def wait(self) -> None:
        pass

    def step(
        self, table: Any, row: Any, x: Any, history: Any, raw: Any, uncond: Any, guidance: Any, seed: Any,
        network_input: Any,
    ) -> None:  # fmt: skip
        for array in (x, history, raw, network_input):
            assert isinstance(array, Guarded)
        for array in (table, row, uncond, guidance, seed):
            assert not isinstance(array, Guarded)
        x, history, raw, network_input = (array.view(np.ndarray) for array in (x, history, raw, network_input))
        Cpu().step(table, row, x, history, raw, uncond, guidance, seed, network_input)


class OtherBackend:
    """A network on that device."""

    def __init__(self, bundle: Bundle, rows: int) -> None:
        self.counted = OtherDevice()
        self.device: Device = self.counted
        self._network = OnnxBackend(bundle.network, rows, bundle.manifest.sample_shape)
        self.inputs: dict[str, Any] = {name: array.view(Guarded) for name, array in self._network.inputs.items()}

    def __call__(self, rows: int) -> Any:
        return self._network(rows).view(Guarded)


@pytest.mark.parametrize("is_guided", [False, True])
def test_samples_of_another_device_are_the_cpus_to_the_bit(baked: Bundle, guided: Bundle, is_guided: bool) -> None:
    """With rows that join, leave and make room; only finished samples come back."""
    bundle = guided if is_guided else baked
    requests = requests_of(bundle, is_guided)
    made: list[OtherBackend] = []

    def backend(loaded: Bundle, rows: int) -> OtherBackend:
        made.append(OtherBackend(loaded, rows))
        return made[0]

    here = Engine(bundle, max_rows=3, threads=1).generate(requests)
    engine = Engine(bundle, max_rows=3, backend=backend)
    there = generate_making_room(engine, requests)
    for one, other in zip(here, there, strict=True):
        assert one.pixels.tobytes() == other.pixels.tobytes()
    sample = int(np.prod(bundle.manifest.sample_shape)) * 4
    assert made[0].counted.bytes_out == sample * len(requests)
    calls = sum(request.tableau.num_steps for request in requests)
    assert made[0].counted.bytes_in <= calls * 2 * (4 + 8 + 4)
