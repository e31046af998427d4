"""Encoder threads: samples become bodies off the event loop, and what is ready together reaches the loop in one wake.

Waking a thread costs as much CPU time as encoding a small image. The samples of a tick arrive together, so a thread
encodes all that is there before it wakes the loop, unless that takes longer than `HOLD_S`.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

HOLD_S = 0.002  # how long a finished body may wait for those that are encoded after it


class _Job(NamedTuple):
    done: "asyncio.Future[Any]"
    work: Callable[[], Any]


class Encoders:
    """Threads that do work for coroutines.

    Args:
        num_threads: how many.
    """

    def __init__(self, num_threads: int) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()  # None: a thread ends
        self._threads = [
            threading.Thread(target=self._run, name=f"fewstep-encoder-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, done: "asyncio.Future[T]", work: Callable[[], T]) -> None:
        """Do the work, and end the future with what it returns or raises. May be called from any thread."""
        self._jobs.put(_Job(done, work))

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """What the work returns."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.submit(done, partial(work, *arguments))
        return await done

    def stop(self) -> None:
        """Do all that was submitted, then end the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        job = self._jobs.get()
        while job is not None:
            start_s = time.perf_counter()
            ready: list[tuple[_Job, Any, BaseException | None]] = []
            while job is not None:
                if not job.done.cancelled():
                    ready.append((job, *_outcome(job.work)))
                if time.perf_counter() - start_s > HOLD_S:
                    break
                try:
                    job = self._jobs.get_nowait()
                except Empty:
                    break
            is_last = job is None
            _settle_all(ready)
            job = None if is_last else self._jobs.get()


def _outcome(work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return work(), None
    except BaseException as error:
        return None, error


def _settle_all(ready: list[tuple[_Job, Any, BaseException | None]]) -> None:
    """Tell each loop once."""
    for loop in {job.done.get_loop() for job, _, _ in ready}:
        with suppress(RuntimeError):  # it was closed meanwhile: nobody listens
            loop.call_soon_threadsafe(_settle, [entry for entry in ready if entry[0].done.get_loop() is loop])


def _settle(ready: list[tuple[_Job, Any, BaseException | None]]) -> None:
    for job, result, error in ready:
        if job.done.done():
            continue
        if error is None:
            job.done.set_result(result)
        else:
            job.done.set_exception(error)
