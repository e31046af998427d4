"""The gate: what every request passes before a door, whichever protocol it speaks.

It finds out who calls, gives the request an id, and writes a line about it when it is over. `gated` puts it before
the application, and an interceptor stands before the gRPC service; what is open to whom is said here for both.

    open       the page, the documentation, health
    admin      loading and unloading of students and tables, and whatever is not listed
    any key    all the rest

A server without keys is no toy of every page that a browser beside it has open: what changes or costs something is
refused to pages of other origins, unless ``cors_origins`` lets them in.
"""

import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import count

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .keys import ANYBODY, CALLER, Caller, Keys
from .logs import REQUEST_ID
from .service import Service

access = logging.getLogger("fewstep.access")

# what scripts of other pages may read
EXPOSED_HEADERS = ["x-request-id", "retry-after", "retry-after-ms", "x-should-retry", "inference-header-content-length"]

_OPEN = re.compile(r"/|/docs|/openapi\.json|/v2/health/(live|ready)")
_FOR_ALL = re.compile(
    r"/v1/images/generations|/v1/jobs(/[^/]+(/cancel)?)?|/v2/repository/index"
    r"|/v2/models/[^/]+(/versions/[^/]+)?/(infer|generate|generate_stream)"
)
_READING = ("GET", "HEAD", "OPTIONS")
_OPEN_CALLS = re.compile(r"/grpc\.health\.v1\.Health/.*|/inference\.GRPCInferenceService/Server(Live|Ready)")
_ADMIN_CALLS = re.compile(r"/inference\.GRPCInferenceService/RepositoryModel(Load|Unload)")
_GIVEN_ID = re.compile(r"[\x21-\x7e]{1,128}")

_PREFIX = secrets.token_hex(5)
_numbers = count(1)


def request_id(given: str) -> str:
    """The id that the client gave, if it can be one; else a new one."""
    return given if _GIVEN_ID.fullmatch(given) else f"{_PREFIX}-{next(_numbers)}"


@dataclass(slots=True)
class Visit:
    """A request on its way through."""

    what: str  # method and path
    request_id: str
    start_s: float
    caller: Caller = ANYBODY

    @property
    def header(self) -> tuple[bytes, bytes]:
        """What every answer has."""
        return b"x-request-id", self.request_id.encode("latin-1")


class Gate:
    """What is asked of each HTTP request.

    Args:
        service: for its keys and settings.
    """

    def __init__(self, service: Service) -> None:
        self._keys = service.keys
        self._is_logging = service.settings.access_log

    def visit(self, scope: Scope) -> Visit:
        """A request arrives."""
        given = b""
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                given = value
        what = f"{scope['method']} {scope['path']}"
        return Visit(what, request_id(given.decode("latin-1")), time.perf_counter())

    def admit(self, visit: Visit, scope: Scope) -> None:
        """Find out who calls.

        Raises:
            ApiError: nobody who may.
        """
        if self._keys:
            visit.caller = _caller(self._keys, scope)

    def leave(self, visit: Visit, status: int) -> None:
        """It is over."""
        if self._is_logging:
            log_access(visit.what, status, visit.start_s, visit.request_id, visit.caller)


def gated(app: ASGIApp, service: Service) -> ASGIApp:
    """The application behind the gate, and pages of other origins where they are let in."""
    gate, traces, origins = Gate(service), service.traces, service.settings.cors_origins

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        visit = gate.visit(scope)
        REQUEST_ID.set(visit.request_id)
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], visit.header]}
            await send(message)

        try:
            _refuse_foreign(scope, origins)
            gate.admit(visit, scope)
            CALLER.set(visit.caller)
            if traces is None:
                await app(scope, receive, answer)
            else:
                with traces.request(visit.what, _headers(scope), visit.request_id) as tell:
                    try:
                        await app(scope, receive, answer)
                    finally:
                        tell(str(status), status >= 500)
        except ApiError as error:
            await error.response(is_plain=scope["path"].startswith("/v2"))(scope, receive, answer)
        finally:
            gate.leave(visit, status)

    if not origins:
        return guarded
    return CORSMiddleware(
        guarded, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"], expose_headers=EXPOSED_HEADERS
    )


def _refuse_foreign(scope: Scope, welcome: Collection[str]) -> None:
    """Look at which page a browser sends a request from: it says so itself, and no script can say otherwise.

    ``Sec-Fetch-Site`` knows the address that the browser sees, whatever proxies stand between; it comes over HTTPS and
    from this machine. ``Origin`` comes with every POST, PUT and DELETE. Who sends neither is no page.

    Raises:
        ApiError: the page is of another origin, and not let in.
    """
    if scope["method"] in _READING:
        return
    headers = _headers(scope)
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    is_foreign = origin is not None and origin.partition("://")[2] != headers.get("host")
    if site is not None:
        is_foreign = site not in ("same-origin", "none")
    if is_foreign and origin not in welcome and "*" not in welcome:
        page = f"of {origin[:100]} " if origin else ""
        message = f"Origin: pages {page}may not do this; a server lets them in by its setting cors_origins"
        raise ApiError(403, message, param="Origin", code="foreign_origin")


def _caller(keys: Keys, scope: Scope) -> Caller:
    path, is_reading = scope["path"], scope["method"] in _READING
    if is_reading and _OPEN.fullmatch(path):
        return ANYBODY
    return keys.caller(_headers(scope), needs_admin=not is_reading and not _FOR_ALL.fullmatch(path))


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def caller_of_call(keys: Keys, method: str, metadata: Mapping[str, str]) -> Caller:
    """Who makes a gRPC call.

    Raises:
        ApiError: nobody who may.
    """
    if not keys or _OPEN_CALLS.fullmatch(method):
        return ANYBODY
    return keys.caller(metadata, needs_admin=bool(_ADMIN_CALLS.fullmatch(method)))


def log_access(what: str, status: int | str, start_s: float, name: str, caller: Caller) -> None:
    """Write the line about a request that is over."""
    took_ms = round(1000 * (time.perf_counter() - start_s), 3)
    fields = {"request": what, "status": status, "ms": took_ms, "request_id": name, "caller": caller.name}
    access.info("%s %s %.1f ms", what, status, took_ms, extra={"fields": fields})
