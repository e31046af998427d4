"""HTTP/1.1 for a load generator: one request a connection at a time, connections kept, nothing else.

On httptools, which the server parses with too. The client shares the machine with what it measures, and general
clients take several times the CPU time a request.
"""

import asyncio
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import httptools


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said."""

    status: int
    body: bytes


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.is_open = False
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[Answer] | None = None

    def ask(self, request: bytes) -> asyncio.Future[Answer]:
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._waiter = self._loop.create_future()
        self._transport.write(request)
        return self._waiter

    def close(self) -> None:
        self.is_open = False
        self._transport.abort()

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        if self._waiter is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"not HTTP: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._fail(ConnectionError("the server closed the connection"))

    # httptools' calls

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            return
        self.is_open = self.is_open and self._parser.should_keep_alive()
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(Answer(status, b"".join(self._parts)))

    def _fail(self, error: Exception) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)


class HttpClient:
    """Requests to one server; as many connections as there are requests under way.

    Args:
        url: ``http://host:port`` or ``https://...``, without a path.
        headers: of every request, such as ``Authorization``.
        cafile: certificates to trust, PEM; the system's when left out.
    """

    def __init__(self, url: str, headers: dict[str, str] | None = None, cafile: Path | None = None) -> None:
        parts = urlsplit(url)
        self._tls = ssl.create_default_context(cafile=cafile) if parts.scheme == "https" else None
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if self._tls else 80)
        told = {"Host": parts.netloc, **(headers or {})}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in told.items())
        self._idle: list[_Connection] = []

    async def request(self, method: str, path: str, body: bytes = b"", headers: str = "") -> Answer:
        """One request and its answer, whatever its status.

        Args:
            method: such as POST.
            path: such as ``/v2``.
            body: sent as it is.
            headers: further ones, each ended by CR LF.

        Raises:
            OSError: no connection, or it ended before the answer.
        """
        length = f"Content-Length: {len(body)}\r\n" if body or method == "POST" else ""
        head = f"{method} {path} HTTP/1.1\r\n{self._headers}{length}{headers}\r\n"
        connection = self._kept() or await self._connect()
        try:
            answer = await connection.ask(head.encode() + body)
        except BaseException:  # cancelled, too: the answer would be taken for the next one's
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return answer

    def close(self) -> None:
        """Close what is open."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _kept(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return connection
