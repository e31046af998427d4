"""The connection: uvicorn's, with a short way for the doors that carry the load.

A generation request that is there body and all, and whose answer is one piece, needs none of what ASGI is for: no task,
no messages, no event for a client that leaves. It is read, admitted and put in line here, and its answer is one write.
All else goes through the application: other routes, streams, packed or slow bodies, clients that do not read their
answers, pages in browsers, servers that trace. Both ways share a door's ``begin`` and the `Gate`, so they differ in
nothing that a client sees.
"""

import asyncio
import logging
from typing import Any

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from . import images, kserve
from .errors import ApiError, crashed
from .gate import Gate, Visit
from .generation import Door
from .keys import CALLER
from .logs import REQUEST_ID
from .service import Service

_DOORS = (images.DOOR, kserve.DOOR)
MAX_HEAD = 65536  # bytes of a request's line and headers, and of all else that is no body
MAX_HEADERS = 256
_LARGE = 65536  # bytes of a body from which on uvicorn wants the application to read it piece by piece

log = logging.getLogger("fewstep")


class _InOneWrite:
    """A cycle's transport that holds an answer's head back until its body comes, and sends both at once.

    tritonclient's asyncio client asks for health and readiness without reading the body, and lets go of its connection
    only where that came with the head.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = b""  # None: it was sent
        self.close, self.is_closing = transport.close, transport.is_closing

    def write(self, data: bytes) -> None:
        """Head first, then pieces of the body."""
        if self._head is None:
            self._transport.write(data)
        elif not self._head:
            self._head = data
        else:
            self._transport.write(self._head + data)
            self._head = None


class Connection(HttpToolsProtocol):
    """One client's connection. `connection_to` makes the class for a server."""

    service: Service
    gate: Gate
    _arriving: tuple[RequestResponseCycle, Any, Door] | None = None  # what may go the short way once its body is there
    _work: "asyncio.Future[Response] | None" = None  # what is being made on the short way
    _unread = 0  # bytes since the parser last made something of them, up to a read of the socket
    _is_head_too_large = False
    _last: tuple[RequestResponseCycle | None, float] | None = None  # request that was over at some look, and when

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See uvicorn; one too many is told so and closed."""
        super().connection_made(transport)
        limit = self.service.settings.max_connections
        if len(self.connections) > limit:
            error = ApiError(503, f"{limit} connections are open already", code="too_many_connections", retry_after_s=1)
            self._refuse(error)

    def data_received(self, data: bytes) -> None:
        """See uvicorn; but a head has its bounds. The parser keeps what has no end yet, and tells nothing of it."""
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MAX_HEAD and not self.transport.is_closing():
            self._is_head_too_large = True
            self.send_400_response("")

    def on_headers_complete(self) -> None:
        """See uvicorn."""
        if self._unread > MAX_HEAD or len(self.headers) > MAX_HEADERS:  # else they cannot be too large
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            self._is_head_too_large = size > MAX_HEAD or len(self.headers) > MAX_HEADERS
            if self._is_head_too_large:
                raise ValueError("the head is too large")  # the parser stops, and `send_400_response` comes next
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """See uvicorn."""
        self._unread = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """See uvicorn."""
        if not self._is_head_too_large:
            super().send_400_response(msg)
            return
        message = f"the request's line and headers are more than {MAX_HEAD} bytes or {MAX_HEADERS} headers"
        self._refuse(ApiError(431, message, code="headers_too_large"))

    def _refuse(self, error: ApiError) -> None:
        """Answer what never became a request, and close."""
        response = error.response()
        lines = [STATUS_LINE[response.status_code]]
        for name, value in response.raw_headers:
            lines += (name, b": ", value, b"\r\n")
        self.transport.write(b"".join([*lines, b"connection: close\r\n\r\n", bytes(response.body)]))
        self.transport.close()

    def look_after(self, now_s: float) -> None:
        """Once a second: a slow body goes the long way, which has its limits; a silent connection is closed.

        So no request needs a timer. uvicorn has one that closes silent connections after an answer, and none for
        those on which a request does not get as far as its body.
        """
        if self._arriving is not None:
            self._take_long_way()
        elif self.cycle is None or self.cycle.response_complete:
            if self._last is None or self._last[0] is not self.cycle:
                self._last = self.cycle, now_s
            elif now_s - self._last[1] > self.service.settings.request_timeout_s:
                self.transport.close()

    def on_response_complete(self) -> None:
        """See uvicorn; without its timer."""
        if self.pipeline:
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        scope = cycle.scope
        if scope["method"] == "GET":  # none of them is a stream, and each has a body
            cycle.transport = _InOneWrite(cycle.transport)  # type: ignore[assignment]
        door = next((door for door in _DOORS if door.path.fullmatch(scope["path"])), None)
        if door is None or scope["method"] != "POST" or self.service.traces or self._is_unusual(cycle):
            super()._start_asgi_task(cycle, app)
            return
        self._arriving = cycle, app, door
        if not cycle.more_body:  # it was pipelined, and all there
            self._take_short_way()

    def on_message_complete(self) -> None:
        """See uvicorn."""
        self._unread = 0
        super().on_message_complete()
        if self._arriving is not None and self._arriving[0] is self.cycle:
            self._take_short_way()

    def connection_lost(self, error: Exception | None) -> None:
        """See uvicorn."""
        super().connection_lost(error)
        self._arriving = None
        if self._work is not None:
            self._work.cancel()

    def _take_long_way(self) -> None:
        assert self._arriving is not None
        arriving, self._arriving = self._arriving, None
        super()._start_asgi_task(*arriving[:2])

    def _take_short_way(self) -> None:
        assert self._arriving is not None
        if self.flow.write_paused:  # the application's answer waits until the client has read those before it
            self._take_long_way()
            return
        cycle, _, door = self._arriving
        scope: Any = cycle.scope
        visit = self.gate.visit(scope)
        try:
            self.gate.admit(visit, scope)
            before, name = CALLER.set(visit.caller), REQUEST_ID.set(visit.request_id)
            try:
                work = door.begin(self.service, scope, bytes(cycle.body), visit.start_s)
            finally:
                CALLER.reset(before)
                REQUEST_ID.reset(name)
        except Exception as error:
            self._arriving = None
            self._write(cycle, visit, _refusal(door, visit, error))
            return
        if work is None:
            self._take_long_way()
            return
        self._arriving = None
        cycle.body = bytearray()  # it was read, and connection and cycle stay until the next collection
        self._work = work
        self.tasks.add(work)  # type: ignore[arg-type]  # what uvicorn waits for, and cancels, when it stops
        work.add_done_callback(lambda work: self._finish(cycle, visit, door, work))

    def _finish(self, cycle: RequestResponseCycle, visit: Visit, door: Door, work: "asyncio.Future[Response]") -> None:
        self._work = None
        self.tasks.discard(work)
        if work.cancelled():  # the client left, or the server stops
            self.transport.close()
            self.gate.leave(visit, 499)
            return
        error = work.exception()
        self._write(cycle, visit, _refusal(door, visit, error) if error else work.result())

    def _write(self, cycle: RequestResponseCycle, visit: Visit, response: Response) -> None:
        if not cycle.disconnected:
            lines = [STATUS_LINE[response.status_code]]
            for name, value in (*self.server_state.default_headers, *response.raw_headers, visit.header):
                lines += (name, b": ", value, b"\r\n")
            if not cycle.keep_alive:
                lines.append(b"connection: close\r\n")
            lines += (b"\r\n", bytes(response.body))
            self.transport.write(b"".join(lines))
            cycle.response_started = cycle.response_complete = True
            if not cycle.keep_alive:
                self.transport.close()
            cycle.on_response()
        self.gate.leave(visit, response.status_code)

    def _is_unusual(self, cycle: RequestResponseCycle) -> bool:
        headers = dict(cycle.scope["headers"])
        return (
            cycle.waiting_for_100_continue
            or not headers.keys().isdisjoint((b"content-encoding", b"transfer-encoding", b"origin", b"sec-fetch-site"))
            or int(headers.get(b"content-length", b"0")) > min(_LARGE, self.service.settings.max_body_bytes)
        )


def _refusal(door: Door, visit: Visit, error: BaseException) -> Response:
    if not isinstance(error, ApiError):
        beside = {"fields": {"request_id": visit.request_id}}
        log.error("%s: an error that was not foreseen", visit.what, exc_info=error, extra=beside)
        error = crashed(visit.request_id)
    return door.refusal(error)


def connection_to(service: Service) -> type[Connection]:
    """The class of the connections to a service."""
    return type("ConnectionToService", (Connection,), {"service": service, "gate": Gate(service)})
