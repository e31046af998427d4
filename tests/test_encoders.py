"""The encoder threads: every future ends, and the event loop is woken for all that is ready together."""

import asyncio
import threading

import pytest

from fewstep.server.encoders import Encoders


def test_results_and_errors_reach_those_who_asked() -> None:
    async def ask() -> list[object]:
        encoders = Encoders(2)
        work = [lambda i=i: 1 // (i % 5) for i in range(100)]  # every fifth fails
        try:
            return list(await asyncio.gather(*(encoders.run(each) for each in work), return_exceptions=True))
        finally:
            encoders.stop()

    results = asyncio.run(ask())
    for i, result in enumerate(results):
        assert isinstance(result, ZeroDivisionError) if i % 5 == 0 else result == 1 // (i % 5)


def test_what_is_ready_together_wakes_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    wakes = 0

    async def ask() -> list[int]:
        encoders = Encoders(1)
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(*arguments: object) -> object:
            nonlocal wakes
            wakes += 1
            return wake(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        monkeypatch.setattr("fewstep.server.encoders.HOLD_S", 60.0)  # this machine may be slow
        first = asyncio.ensure_future(encoders.run(gate.wait))  # holds the thread until the others are in line
        others = [asyncio.ensure_future(encoders.run(int, i)) for i in range(10)]
        await asyncio.sleep(0)
        gate.set()
        await first
        results = await asyncio.gather(*others)
        monkeypatch.undo()
        encoders.stop()
        return results

    assert asyncio.run(ask()) == list(range(10))
    assert wakes == 1


def test_a_long_work_does_not_hold_up_what_is_finished() -> None:
    gate = threading.Event()

    async def ask() -> None:
        encoders = Encoders(1)
        slow = asyncio.ensure_future(encoders.run(threading.Event().wait, 0.02))  # longer than HOLD_S
        last = asyncio.ensure_future(encoders.run(gate.wait))
        await asyncio.wait_for(slow, 10)
        assert not last.done()
        gate.set()
        await last
        encoders.stop()

    asyncio.run(ask())


def test_cancelled_work_is_not_done() -> None:
    gate = threading.Event()
    done: list[int] = []

    async def ask() -> None:
        encoders = Encoders(1)
        first = asyncio.ensure_future(encoders.run(gate.wait))
        second = asyncio.ensure_future(encoders.run(done.append, 2))
        third = asyncio.ensure_future(encoders.run(done.append, 3))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, third)
        encoders.stop()

    asyncio.run(ask())
    assert done == [3]


def test_stopping_does_what_was_submitted_even_for_a_loop_that_is_gone() -> None:
    done: list[int] = []
    encoders = Encoders(1)

    async def leave() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        encoders.submit(future, lambda: done.append(1))

    asyncio.run(leave())
    encoders.stop()
    assert done == [1]
