"""In front of the application: the one route that carries the load, without FastAPI's machinery.

FastAPI serves documentation, administration and the other protocols. Its middleware, routing and dependency solving
cost more CPU time than all else an image request needs of us, so that request is matched and answered before it.
"""

import logging

from fastapi import Request as HttpRequest
from fastapi import Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from .app import create_app
from .bodies import answer_nobody
from .errors import ApiError, crashed
from .gate import HttpGate
from .generation import ClientGone
from .images import generate_images
from .openapi import IMAGES
from .service import Service

# what scripts of other pages may read
EXPOSED_HEADERS = ["x-request-id", "retry-after", "retry-after-ms", "x-should-retry", "inference-header-content-length"]

log = logging.getLogger("fewstep")


def create_front(service: Service) -> ASGIApp:
    """The whole server over a service: what uvicorn runs."""
    app = create_app(service)

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        # The application has the same route, for its documentation; another method falls through to it and its 405.
        if scope["type"] != "http" or scope["path"] != IMAGES or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        http = HttpRequest(scope, receive)
        response: Response
        try:
            response = await generate_images(http, service)
        except ApiError as error:
            response = error.response()
        except ClientGone as error:
            response = await answer_nobody(http, error)
        except Exception:
            log.exception("%s: an error that was not foreseen", IMAGES)
            response = crashed().response()
        await response(scope, receive, send)

    gate = HttpGate(front, service)
    origins = list(service.settings.cors_origins)
    if not origins:
        return gate
    return CORSMiddleware(
        gate, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=EXPOSED_HEADERS
    )
