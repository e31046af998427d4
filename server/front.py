"""In front of the application: the one route that carries the load, without FastAPI's machinery.

FastAPI serves documentation, administration and the other protocols. Its middleware and dependency solving cost about
as much CPU time as all else an image request needs from HTTP, so that request is matched and answered before it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from .app import IMAGES, create_app
from .errors import ApiError, answer_api_error, answer_crash
from .images import generate_images
from .service import Service


def create_front(service: Service) -> Starlette:
    """The whole server over a service: what uvicorn runs."""
    app: FastAPI = create_app(service)

    async def images(request: Request) -> Response:
        return await generate_images(request, service)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with app.router.lifespan_context(app):
            yield

    # A request of another method falls through to the application, which has the route too and answers 405.
    routes = [Route(IMAGES, images, methods=["POST"]), Mount("", app)]
    handlers = {ApiError: answer_api_error, Exception: answer_crash}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
