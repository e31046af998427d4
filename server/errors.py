"""Errors as clients see them: a status, one clear line, and the field it is about.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

This is OpenAI's shape, which its clients turn into typed exceptions; below /v2 it is the Open Inference Protocol's,
``{"error": "one line"}``. A traceback never leaves the server.
"""

import math
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.routing import Match

from ..runtime.call import CallError, in_words
from .logs import REQUEST_ID


class ApiError(Exception):
    """An answer that is not a result."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """The same in the words of a protocol: ``names`` has its word for each field that has another there."""
        name = names.get(self.param or "")
        if name is None:
            return self
        message = in_words(self.message, self.param, names)
        return ApiError(self.status, message, param=name, code=self.code, retry_after_s=self.retry_after_s)

    @property
    def is_final(self) -> bool:
        """Whether clients should not ask again by themselves: they would be late again."""
        return self.code in ("deadline_expired", "deadline_infeasible")

    @property
    def headers(self) -> dict[str, str]:
        """What HTTP clients are told beside the body."""
        headers = {"x-should-retry": "false"} if self.is_final else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.retry_after_s is None:
            return headers
        return {
            **headers,
            "Retry-After": str(math.ceil(self.retry_after_s)),
            "retry-after-ms": str(math.ceil(self.retry_after_s * 1000)),
        }

    def response(self, is_plain: bool = False) -> JSONResponse:
        """The HTTP response, in OpenAI's shape or, ``is_plain``, in that of the Open Inference Protocol."""
        return JSONResponse({"error": self.message} if is_plain else self.body(), self.status, self.headers)

    def body(self) -> dict[str, Any]:
        """OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Refusals:
    """What is refused within ``with refusals:`` is an `ApiError` with status 400."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, CallError):
            raise ApiError(400, error.message, param=error.field, code=error.code) from None


refusals = Refusals()


def crashed(request_id: str) -> ApiError:
    """What a client is told of an error that was not foreseen."""
    message = f"the server failed on this request; its log says why, at request_id={request_id}"
    return ApiError(500, message, code="internal_error")


async def answer_api_error(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler for `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response(_is_plain(request))


async def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """Unknown paths and methods, in the same shape."""
    status = getattr(error, "status_code", 500)
    messages = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.method} is not allowed at {request.url.path}",
    }
    response = ApiError(status, messages.get(status, "the request failed")).response(_is_plain(request))
    if status == 405:
        found = [route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE]
        response.headers["Allow"] = ", ".join(sorted({name for route in found for name in route.methods or ()}))
    return response


async def answer_crash(request: Request, _: Exception) -> JSONResponse:
    """Whatever was not foreseen; uvicorn logs the traceback."""
    return crashed(REQUEST_ID.get()).response(_is_plain(request))


def _is_plain(request: Request) -> bool:
    """Whether its errors are in the Open Inference Protocol's shape: that of all paths below /v2."""
    return request.url.path.startswith("/v2")
