"""Bodies: reading one that may be too large or compressed, and writing one that goes on for as long as it is read."""

import asyncio
import json
import logging
import re
import zlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, crashed
from .generation import ClientGone, unless_gone
from .logs import REQUEST_ID
from .settings import Settings

log = logging.getLogger("fewstep")

_WINDOW = {"gzip": 31, "deflate": 15}  # zlib's wbits: which wrapping
_NOT_AT_ALL = re.compile(r";\s*q=0(\.0*)?\s*$")


async def answer_nobody(_: HttpRequest, __: Exception) -> Response:
    """FastAPI's handler for `ClientGone`: nobody reads the answer, it is for the log."""
    return Response(status_code=499)


async def read_body(http: HttpRequest, settings: Settings) -> bytes:
    """The body of a request, unpacked; of it no more than ``max_body_bytes`` are ever held, packed or not.

    Raises:
        ApiError: it is larger, or slower, or packed in a way that is not understood.
        ClientGone: the client left before it was all there.
    """
    limit = settings.max_body_bytes
    body, is_all = b"", False
    try:
        async with asyncio.timeout(settings.request_timeout_s):
            while not is_all:
                message = await http.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                is_all = not message.get("more_body", False)
                if len(body) > limit:
                    raise ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    except TimeoutError:
        told = f"the body was not there within {settings.request_timeout_s:g} s"
        raise ApiError(408, told, code="body_too_slow") from None
    encodings = [value for name, value in http.scope["headers"] if name == b"content-encoding"]
    encoding = encodings[-1].decode("latin-1").lower() if encodings else "identity"
    return body if encoding == "identity" else _unpacked(body, encoding, limit)


def packed(body: bytes, accepted: str) -> tuple[bytes, dict[str, str]]:
    """A body and its headers, packed when the client's ``Accept-Encoding`` says so and it makes the body smaller."""
    words = (word for word in accepted.lower().split(",") if not _NOT_AT_ALL.search(word))
    wanted = {word.split(";")[0].strip() for word in words}
    name = next((name for name in _WINDOW if name in wanted), None)
    if name is None or len(body) < 1024:
        return body, {}
    packer = zlib.compressobj(1, zlib.DEFLATED, _WINDOW[name])
    small = packer.compress(body) + packer.flush()
    return (small, {"Content-Encoding": name}) if len(small) < len(body) else (body, {})


def _unpacked(body: bytes, encoding: str, limit: int) -> bytes:
    if encoding not in _WINDOW:
        raise ApiError(415, f"Content-Encoding: {encoding[:40]!r} is not gzip or deflate", code="unknown_encoding")
    unpacker = zlib.decompressobj(_WINDOW[encoding])
    try:
        whole = unpacker.decompress(body, limit + 1)
    except zlib.error:
        raise ApiError(400, f"the body is not {encoding}", code="bad_encoding") from None
    if len(whole) > limit:
        raise ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    if not unpacker.eof:
        raise ApiError(400, f"the body is not all of its {encoding}", code="bad_encoding")
    return whole


class EventStream(Response):
    """Server-sent events, written as they come. A client that leaves closes the iterator, and so cancels the work.

    Args:
        events: what to write.
        failure: what the protocol tells of an error, as the data of the last event: the status was sent long before.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], failure: Callable[[ApiError], dict[str, Any]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._failure = events, failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write it."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def write() -> None:
            end = b""
            try:
                async with aclosing(self._events) as events:
                    async for event in events:
                        await send({"type": "http.response.body", "body": event, "more_body": True})
            except Exception as error:
                end = event_of(self._failure(_foreseen(error, f"{scope['method']} {scope['path']}")))
            await send({"type": "http.response.body", "body": end})

        with suppress(ClientGone):
            await unless_gone(receive, write())


def event_of(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def _foreseen(error: Exception, what: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    log.error("%s: an error that was not foreseen", what, exc_info=error)
    return crashed(REQUEST_ID.get())
