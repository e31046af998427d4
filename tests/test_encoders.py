"""The encoders: every future ends, small work needs no thread, and the loop is woken for all that is ready together."""

import asyncio
import threading
from functools import partial

import pytest

from fewstep.server.encoders import ON_LOOP, Encoders

LARGE = ON_LOOP + 1


def test_results_and_errors_reach_those_who_asked() -> None:
    async def ask() -> list[object]:
        encoders = Encoders(2)
        work = [lambda i=i: 1 // (i % 5) for i in range(100)]  # every fifth fails
        try:
            return list(await asyncio.gather(*(encoders.run(LARGE, each) for each in work), return_exceptions=True))
        finally:
            encoders.stop()

    results = asyncio.run(ask())
    for i, result in enumerate(results):
        assert isinstance(result, ZeroDivisionError) if i % 5 == 0 else result == 1 // (i % 5)


def test_small_work_is_done_on_the_loop_and_large_work_is_not() -> None:
    def where() -> int:
        return threading.get_ident()

    async def ask() -> list[int]:
        encoders = Encoders(1)
        done: list[asyncio.Future[int]] = [asyncio.get_running_loop().create_future() for _ in range(2)]
        submit = threading.Thread(target=lambda: [*map(partial(encoders.submit, num_bytes=ON_LOOP, work=where), done)])
        done[1].cancel()
        submit.start()
        found = [await done[0], await encoders.run(ON_LOOP, where), await encoders.run(LARGE, where)]
        encoders.stop()
        return found

    first, second, third = asyncio.run(ask())
    assert first == second == threading.get_ident() != third


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
        first = asyncio.ensure_future(encoders.run(LARGE, gate.wait))  # holds the thread until the others are in line
        others = [asyncio.ensure_future(encoders.run(LARGE, int, i)) for i in range(10)]
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
        slow = asyncio.ensure_future(encoders.run(LARGE, threading.Event().wait, 0.02))  # longer than HOLD_S
        last = asyncio.ensure_future(encoders.run(LARGE, gate.wait))
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
        first = asyncio.ensure_future(encoders.run(LARGE, gate.wait))
        second = asyncio.ensure_future(encoders.run(LARGE, done.append, 2))
        third = asyncio.ensure_future(encoders.run(LARGE, done.append, 3))
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
        encoders.submit(future, LARGE, lambda: done.append(1))

    asyncio.run(leave())
    encoders.stop()
    assert done == [1]
