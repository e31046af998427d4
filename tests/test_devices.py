"""The engine on a device that is not the CPU: nothing crosses but what must, and the samples are the CPU's to the bit.

The device of these tests is host memory in a type that, like CuPy's arrays, refuses to be computed with in numpy or
filled from it; only `Device`'s functions may cross.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
from mixed_requests import generate_making_room, requests_of

from fewstep.runtime import Bundle, Engine, EngineThread, Request
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

    lags = False

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

    def bind(
        self, table: Any, row: Any, x: Any, history: Any, uncond: Any, guidance: Any, seed: Any, network_input: Any
    ) -> Any:
        for array in (x, history, network_input):
            assert isinstance(array, Guarded)
        for array in (table, row, uncond, guidance, seed):
            assert not isinstance(array, Guarded)
        x, history, network_input = (array.view(np.ndarray) for array in (x, history, network_input))
        step = Cpu().bind(table, row, x, history, uncond, guidance, seed, network_input)

        def on_guarded(first: int, last: int, raw: Any) -> None:
            assert isinstance(raw, Guarded)
            step(first, last, raw.view(np.ndarray))

        return on_guarded


class OtherBackend:
    """A network on that device."""

    def __init__(self, bundle: Bundle, rows: int, lags: bool = False) -> None:
        self.counted = OtherDevice()
        self.counted.lags = lags
        self.device: Device = self.counted
        self._network = OnnxBackend(bundle.network, rows, bundle.manifest.sample_shape)
        self.inputs: dict[str, Any] = {name: array.view(Guarded) for name, array in self._network.inputs.items()}

    def __call__(self, rows: int) -> Any:
        return self._network(rows).view(Guarded)


@pytest.mark.parametrize("lags", [False, True])
@pytest.mark.parametrize("is_guided", [False, True])
def test_samples_of_another_device_are_the_cpus_to_the_bit(
    baked: Bundle, guided: Bundle, is_guided: bool, lags: bool
) -> None:
    """With rows that join, leave and make room; only finished samples come back."""
    bundle = guided if is_guided else baked
    requests = requests_of(bundle, is_guided)
    made: list[OtherBackend] = []

    def backend(loaded: Bundle, rows: int) -> OtherBackend:
        made.append(OtherBackend(loaded, rows, lags))
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


class Late(Cpu):
    """The CPU, said to be still at work when a call returns; tells of its network's calls and of the waits for it."""

    lags = True

    def __init__(self, name: str, events: list[str]) -> None:
        super().__init__()
        self.name, self.events = name, events

    def wait(self) -> None:
        self.events.append(f"{self.name} is ready")


def late_engine(bundle: Bundle, name: str, events: list[str], **kwargs: Any) -> Engine:
    def backend(loaded: Bundle, rows: int) -> Any:
        network = OnnxBackend(loaded.network, rows, loaded.manifest.sample_shape)

        class Backend:
            device, inputs = Late(name, events), network.inputs

            def __call__(self, rows: int) -> Any:
                events.append(f"{name} is called")
                return network(rows)

        return Backend()

    return Engine(bundle, backend=backend, **kwargs)


def ask(engine: Engine, events: list[str], *steps: int) -> list[Any]:
    futures = engine.submit([Request(i, engine.tableau("ddim", number), 3) for i, number in enumerate(steps)])
    for future, number in zip(futures, steps, strict=True):
        future.add_done_callback(partial(lambda told, _: events.append(told), f"sample of {number}"))
    return futures


def tick(engine: Engine) -> None:
    """As `EngineThread` does, which has more to do afterwards; `Engine.step` hands out at once."""
    for _ in engine.tick():
        pass


def test_samples_are_handed_out_while_the_device_is_at_work_on_the_next_call(baked: Bundle) -> None:
    """And no earlier than they are ready; what the last call finishes has no other to wait for."""
    events: list[str] = []
    engine = late_engine(baked, "device", events)
    ask(engine, events, 2, 4)
    while engine.has_work:
        tick(engine)
    once = ["device is called", "device is ready"]
    assert events == [*once * 2, once[0], "sample of 2", once[1], *once, "sample of 4"]
    assert (engine.counters.finished, engine.has_work) == (2, False)


def test_where_the_call_itself_waits_samples_are_handed_out_just_before_it(baked: Bundle) -> None:
    """What else the tick has to do is done by then: who is woken finds the interpreter's lock free."""
    events: list[str] = []
    engine = late_engine(baked, "device", events, max_rows=1)
    engine._device.lags = False
    (finished,) = ask(engine, events, 2)
    finished.add_done_callback(lambda _: events.append(f"{engine.num_running} runs"))
    ask(engine, events, 1)
    for _ in range(3):
        tick(engine)
    once = ["device is called", "device is ready"]
    assert events == [*once * 2, "sample of 2", "1 runs", *once]
    tick(engine)
    assert events[-1] == "sample of 1"


def test_a_finished_sample_does_not_wait_for_a_call_that_nobody_wants(baked: Bundle) -> None:
    events: list[str] = []
    engine = late_engine(baked, "device", events, max_rows=1)
    finished, waiting = ask(engine, events, 2, 4)
    tick(engine)
    tick(engine)
    assert not finished.done()
    waiting.cancel()
    assert engine.has_work
    tick(engine)
    assert finished.result(0).num_steps == 2
    assert (engine.counters.finished, engine.counters.cancelled, engine.has_work) == (1, 1, False)


def test_a_finished_sample_is_not_lost_with_what_was_running(baked: Bundle) -> None:
    engine = late_engine(baked, "device", [])
    finished, running = ask(engine, [], 2, 4)
    tick(engine)
    tick(engine)
    engine.abandon("it is over")
    assert finished.result(0).num_steps == 2
    assert "it is over" in str(running.exception(0))


def test_a_finished_sample_waits_for_the_next_call_of_any_student_and_no_longer(baked: Bundle) -> None:
    events: list[str] = []
    engines = [late_engine(baked, name, events) for name in ("one", "other")]
    ask(engines[0], events, 2, 4)
    ask(engines[1], events, 4)
    EngineThread(engines)  # the thread is not started: which engine is next is said here
    for engine in (engines[0], engines[0], engines[1]):
        tick(engine)
    once = ["one is called", "one is ready"]
    assert events == [*once * 2, "other is called", "sample of 2", "other is ready"]


def test_who_steps_an_engine_has_at_once_what_the_step_finished(baked: Bundle) -> None:
    engine = late_engine(baked, "device", [])
    finished, _ = ask(engine, [], 2, 4)
    engine.step()
    engine.step()
    assert finished.done()
