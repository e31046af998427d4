"""Encoders: samples become bodies off the event loop where that takes long, and on it where it does not.

Waking a thread costs as much as encoding a small image, and a request's answer waits for it. So what is small is
encoded on the loop that sends it. All else is a thread's: the samples of a tick arrive together, so it encodes all that
is there before it wakes the loop, unless that takes longer than `HOLD_S`.
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

ON_LOOP = 4096  # bytes of pixels of an answer up to which the loop encodes it; a PNG of so many is not deflated
HOLD_S = 0.002  # how long a finished body may wait for those that are encoded after it


class _Job(NamedTuple):
    done: "asyncio.Future[Any]"
    work: Callable[[], Any]


class Encoders:
    """Do work for coroutines.

    Args:
        num_threads: threads for what is not small.
    """

    def __init__(self, num_threads: int) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()  # None: a thread ends
        self._threads = [
            threading.Thread(target=self._run, name=f"fewstep-encoder-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, done: "asyncio.Future[T]", num_bytes: int, work: Callable[[], T]) -> None:
        """Do the work, and end the future with what it returns or raises. May be called from any thread.

        Args:
            done: the future.
            num_bytes: of the pixels that are encoded.
            work: what to do, in a thread or on the future's loop.
        """
        job = _Job(done, work)
        if num_bytes > ON_LOOP:
            self._jobs.put(job)
            return
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody listens
            done.get_loop().call_soon_threadsafe(_do, job)

    async def run(self, num_bytes: int, work: Callable[..., T], *arguments: Any) -> T:
        """What the work returns; see `submit`."""
        if num_bytes <= ON_LOOP:
            return work(*arguments)
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.submit(done, num_bytes, partial(work, *arguments))
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


def _do(job: _Job) -> None:
    if not job.done.done():
        _settle([(job, *_outcome(job.work))])


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
