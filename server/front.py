"""In front of the application: the one route that carries the load, without FastAPI's machinery.

FastAPI serves documentation, administration and the other protocols. Its middleware and dependency solving cost about
as much CPU time as all else an image request needs from HTTP, so that request is matched and answered before it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from .app import IMAGES, create_app
from .errors import ApiError, answer_api_error, answer_crash
from .service import Service


def create_front(service: Service) -> Starlette:
    """The whole server over a service: what uvicorn runs."""
    app: FastAPI = create_app(service)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with app.router.lifespan_context(app):
            yield

    # The application's own route, matched first. Another method falls through to the application, which answers 405.
    images = next(route for route in app.routes if isinstance(route, Route) and route.path == IMAGES)
    handlers = {ApiError: answer_api_error, Exception: answer_crash}
    return Starlette(routes=[images, Mount("", app)], lifespan=lifespan, exception_handlers=handlers)
