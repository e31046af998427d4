"""The middle of every protocol: what a person means becomes requests, and requests become samples.

A protocol's door reads its own wire format, calls `engine_of` and `call.request_of`, then awaits `make` or iterates
over `follow`, and writes the answer. What is wrong is an `ApiError` in the words below, which the door turns into its
own with `ApiError.renamed`.

    prompt  label  seed  num_steps  min_steps  max_steps  solver  guidance  n  model  priority  deadline_ms

Cancelling the coroutine, or closing the iterator, cancels the requests within one step.
"""

import asyncio
import logging
import math
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope

from ..runtime import (
    DeadlineExpired,
    DeadlineInfeasible,
    Engine,
    EngineStopped,
    Preview,
    QueueFull,
    Request,
    Sample,
    SampleFailed,
    StepFailed,
)
from .errors import ApiError, crashed
from .keys import ANYBODY, CALLER
from .logs import REQUEST_ID
from .service import Service

T = TypeVar("T")

log = logging.getLogger("fewstep")


@dataclass(frozen=True, slots=True)
class Door:
    """A protocol's HTTP route whose answers are one piece; the application has it, and so has `Connection`.

    Attributes:
        path: the route's.
        begin: puts in line what a request asks for, for the current caller; takes its scope, body and time of arrival.
            Gives the answer to come, which fails with `ApiError`, and which cancelling gives up; None where the answer
            is a stream. Raises `ApiError` where it is refused; nothing of it was kept then.
        refusal: an error as an answer.
    """

    path: re.Pattern[str]
    begin: "Callable[[Service, Scope, bytes, float], asyncio.Future[Response] | None]"
    refusal: Callable[[ApiError], Response]


class ClientGone(Exception):
    """The client went away; its requests are cancelled and nobody reads an answer."""


def engine_of(service: Service, model: str | None = None, version: str | None = None) -> Engine:
    """The engine of a student, the first one served when none is named.

    Raises:
        ApiError: it is not served, or not in this version.
    """
    name = model or service.default
    engine = service.engine(name) if name is not None else None
    if engine is None:
        served = ", ".join(service.answering)
        message = f"model: {model!r} is not served; there is: {served}" if served else "model: no student is served"
        raise ApiError(404, message, param="model", code="model_not_found")
    if version and version != engine.bundle.manifest.version:
        message = f"model: {name} is served in version {engine.bundle.manifest.version}, not {version!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return engine


def image_limit(service: Service, engine: Engine) -> int:
    """Images that one request may ask for."""
    return min(service.settings.max_images, engine.max_waiting)


def make(
    service: Service, engine: Engine, requests: Sequence[Request], answer: Callable[[list[Sample]], T]
) -> "asyncio.Future[T]":
    """What ``answer`` makes of the samples, in the order asked for: to be awaited. Cancelling it cancels the requests.

    The engine hands the samples straight to the encoders, which run ``answer``, and the event loop wakes once, when all
    is done or, if it is little, to do it.

    Raises:
        ApiError: a request was refused or failed; the others of this call are cancelled.
    """
    return outcome(service, engine, submit(service, engine, requests), answer)


def outcome(
    service: Service, engine: Engine, futures: Sequence[Future[Sample]], answer: Callable[[list[Sample]], T]
) -> "asyncio.Future[T]":
    """The second half of `make`, for futures from `submit`: what is awaited. Cancelling it cancels the requests."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    if service.traces:
        answer = service.traces.around(engine, answer)
    futures = list(futures)
    num_bytes = num_bytes_of(engine, len(futures))
    unfinished = count(len(futures) - 1, -1)  # its steps are atomic, wherever futures end
    name = REQUEST_ID.get()

    def fail(error: BaseException) -> None:
        if not done.done():
            done.set_exception(_end_of(service, error, engine, name))

    def on_end(future: Future[Sample]) -> None:
        is_last = next(unfinished) == 0
        try:
            error = future.exception()
        except CancelledError:
            return
        if error:
            with suppress(RuntimeError):  # the loop was closed meanwhile: nobody listens
                loop.call_soon_threadsafe(fail, error)
        elif is_last:
            service.encoders.submit(done, num_bytes, lambda: answer([future.result() for future in futures]))

    def give_up(done: "asyncio.Future[T]") -> None:
        if done.cancelled() or done.exception():
            _cancel(futures)
        futures.clear()  # a future keeps its callbacks, and these would keep it: pixels until the next collection

    for future in futures:
        future.add_done_callback(on_end)
    done.add_done_callback(give_up)
    return done


def follow(
    service: Service, engine: Engine, requests: Sequence[Request], is_wanted: Callable[[Preview], bool]
) -> AsyncGenerator[tuple[int, Preview | Sample]]:
    """What happens to requests, as it happens: previews, and samples as each is finished.

    Args:
        service: for the state of the server.
        engine: the student's.
        requests: one for each image.
        is_wanted: whether to pass a preview on; called by the engine, so it must be quick.

    Returns:
        An iterator over the number of an image and its preview or sample. It raises `ApiError` as `make` does.

    Raises:
        ApiError: the requests were refused, here and now.
    """
    loop = asyncio.get_running_loop()
    name = REQUEST_ID.get()
    events: asyncio.Queue[tuple[int, Preview | Sample | BaseException]] = asyncio.Queue()

    def tell(i: int, event: Preview | Sample | BaseException) -> None:
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody listens
            loop.call_soon_threadsafe(events.put_nowait, (i, event))

    def on_preview(i: int, preview: Preview) -> None:
        if is_wanted(preview):
            tell(i, preview)

    def on_done(i: int, future: Future[Sample]) -> None:
        if not future.cancelled():
            tell(i, future.exception() or future.result())

    futures = submit(service, engine, requests, on_preview)
    for i, future in enumerate(futures):
        future.add_done_callback(partial(on_done, i))

    async def listen() -> AsyncGenerator[tuple[int, Preview | Sample]]:
        missing = len(futures)
        try:
            while missing:
                i, event = await events.get()
                if isinstance(event, BaseException):
                    raise _end_of(service, event, engine, name)
                if isinstance(event, Sample):
                    missing -= 1
                    if service.traces:
                        service.traces.record(engine, [event])
                yield i, event
        finally:
            _cancel(futures)

    return listen()


async def encoded(service: Service, engine: Engine, num_images: int, work: Callable[..., T], *arguments: Any) -> T:
    """What the encoders make of some of a stream's images."""
    if service.traces:
        work = service.traces.encoding(work, num_images)
    return await service.encoders.run(num_bytes_of(engine, num_images), work, *arguments)


def num_bytes_of(engine: Engine, num_images: int) -> int:
    """Bytes of the pixels of so many images."""
    return num_images * math.prod(engine.bundle.manifest.sample_shape)


def evenly(wanted: int) -> Callable[[Preview], bool]:
    """Which previews to pass on so that there are at most ``wanted`` of each image, evenly spread over its steps."""

    def is_wanted(preview: Preview) -> bool:
        among = preview.num_steps - 1  # the last step gives the image itself
        return wanted >= among or (preview.step * wanted) // among > ((preview.step - 1) * wanted) // among

    return is_wanted if wanted else lambda _: False


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Do the work of an HTTP request, whose body was read, for as long as its client is there.

    Raises:
        ClientGone: the client left; the work was cancelled.
    """
    task = asyncio.current_task()
    assert task is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watcher = task.get_loop().create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if left and not task.uncancel():
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()


def draining() -> ApiError:
    """What new requests are told while the server shuts down."""
    return ApiError(503, "the server is shutting down", code="draining", retry_after_s=1)


def submit(
    service: Service,
    engine: Engine,
    requests: Sequence[Request],
    on_preview: Callable[[int, Preview], None] | None = None,
) -> list[Future[Sample]]:
    """Put the requests of the current caller in line; see `Engine.submit`.

    Raises:
        ApiError: they were refused.
    """
    if service.is_draining:
        raise draining()
    caller = CALLER.get()
    if caller is not ANYBODY:
        waiting, line = engine.num_waiting_of(caller.name), engine.max_waiting
        try:
            caller.refuse_to_fill(waiting, len(requests), line, engine.seconds_to_start(waiting))
            caller.spend(len(requests))
        except ApiError:
            engine.counters.add("rejected", len(requests))
            raise
        requests = [replace(request, caller=caller.name, weight=caller.weight) for request in requests]
    is_accepted = False
    try:
        futures = engine.submit(requests, on_preview)
        is_accepted = True
        return futures
    except QueueFull as error:
        raise ApiError(429, str(error), code="queue_full", retry_after_s=error.retry_after_s) from None
    except DeadlineInfeasible as error:
        raise ApiError(
            429, f"deadline_ms: {error}", param="deadline_ms", code="deadline_infeasible",
            retry_after_s=error.retry_after_s,
        ) from None  # fmt: skip
    except EngineStopped as error:
        raise _stopped(service, error) from None
    except ValueError as error:
        raise ApiError(400, str(error), param=str(error).partition(":")[0]) from None
    finally:
        if not is_accepted:
            caller.refund(len(requests))


def _stopped(service: Service, error: EngineStopped) -> ApiError:
    if service.is_draining:
        return draining()
    return ApiError(503, str(error), code="engine_stopped", retry_after_s=1)


def _end_of(service: Service, error: BaseException, engine: Engine, request_id: str) -> BaseException:
    if isinstance(error, EngineStopped):
        return _stopped(service, error)
    if isinstance(error, DeadlineExpired):
        return ApiError(504, f"deadline_ms: {error}", param="deadline_ms", code="deadline_expired")
    if isinstance(error, SampleFailed):
        log.error("%s: %s", engine.bundle.name, error, extra={"fields": {"request_id": request_id}})
        said = crashed(request_id).message if isinstance(error, StepFailed) else str(error)
        return ApiError(500, said, code="sample_failed")
    return error


def _cancel(futures: Sequence[Future[Sample]]) -> None:
    for future in futures:
        future.cancel()  # no effect on those that are done
