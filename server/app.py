"""The application: its routes, and what they share.

POST /v1/images/generations    samples, as OpenAI's clients ask for them
     /v1/jobs                  the same without waiting; see `jobs`
GET  /v1/models                the students, with their labels and tables
     /v2/...                   the Open Inference Protocol; see `kserve`
POST, GET, DELETE /v2/models/{model}/tables    tables that are loaded into a student
GET  /v2/health/live, /ready   for probes
GET  /metrics                  for Prometheus
GET  /                         a page to try it
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from ..runtime import Engine
from .bodies import answer_nobody, read_body
from .errors import ApiError, answer_api_error, answer_crash, answer_http_error
from .generation import ClientGone, image_limit
from .images import IMAGES, generate_images, start_job
from .kserve import add_routes
from .metrics import registry_of
from .openapi import document_of
from .service import Service
from .tables import describe_table, load_table, unload_table

PAGE = Path(__file__).parent / "page" / "index.html"


def create_app(service: Service) -> FastAPI:
    """The application over a service; it starts and stops the service with itself."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(title="fewstep", lifespan=lifespan, docs_url="/docs", redoc_url=None)
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(ClientGone, answer_nobody)
    app.add_exception_handler(Exception, answer_crash)
    registry = registry_of(service)

    async def images(request: Request) -> Response:
        return await generate_images(request, service)

    # A plain route, since the body is checked by hand. What is simple about it never comes here; see `connection`.
    app.add_route(IMAGES, images, methods=["POST"])
    add_routes(app, service)  # before /v2/models/{model}/...
    app.openapi = lambda: document_of(app)  # type: ignore[method-assign]

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        data = [_describe(engine, service) for engine in service.engines.values()]
        data += [_describe_alias(name, parts, service.started_s) for name, parts in service.aliases.items()]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        if model in service.aliases:
            return _describe_alias(model, service.aliases[model], service.started_s)
        return _describe(engine_of(model), service)

    @app.post("/v1/jobs", status_code=202)
    async def post_job(request: Request) -> Response:
        return await start_job(request, service, None)

    @app.put("/v1/jobs/{job}", status_code=202)
    async def put_job(job: str, request: Request) -> Response:
        return await start_job(request, service, job)

    @app.get("/v1/jobs")
    async def jobs() -> dict[str, Any]:
        return {"object": "list", "data": service.jobs.describe_all()}

    @app.get("/v1/jobs/{job}")
    async def get_job(job: str) -> dict[str, Any]:
        return service.jobs.find(job).describe()

    @app.post("/v1/jobs/{job}/cancel")
    @app.delete("/v1/jobs/{job}")
    async def cancel_job(job: str) -> dict[str, Any]:
        found = service.jobs.cancel(job)
        await asyncio.sleep(0)  # so that its task has ended
        return found.describe()

    def engine_of(model: str) -> Engine:
        engine = service.engines.get(model)
        if engine is None:
            raise ApiError(404, f"model: {model!r} is not served", param="model", code="model_not_found")
        return engine

    # Loading is quick, yet it stays off the event loop: the engine's own thread may hold its lock.
    @app.post("/v2/models/{model}/tables")
    async def post_table(model: str, request: Request) -> dict[str, Any]:
        engine_of(model)  # nobody sends a body for nothing
        body = await read_body(request, service.settings)
        return await run_in_threadpool(load_table, partial(engine_of, model), body, service.changing)

    @app.get("/v2/models/{model}/tables")
    async def tables(model: str) -> dict[str, Any]:
        engine = engine_of(model)
        return {"model": model, "tables": [describe_table(engine, tableau) for tableau in engine.tableaus.values()]}

    @app.delete("/v2/models/{model}/tables/{solver}/{num_steps}")
    async def delete_table(model: str, solver: str, num_steps: str) -> dict[str, Any]:
        if not (num_steps.isascii() and num_steps.isdigit() and len(num_steps) < 9):
            raise ApiError(400, f"num_steps: {num_steps[:20]!r} is no number of steps", param="num_steps")
        found = partial(engine_of, model)
        return await run_in_threadpool(unload_table, found, solver, int(num_steps), service.changing)

    @app.get("/v2/health/live")
    async def live(response: Response) -> dict[str, bool]:
        response.status_code = 200 if service.is_live else 503
        return {"live": service.is_live}

    @app.get("/v2/health/ready")
    async def ready(response: Response) -> dict[str, bool]:
        response.status_code = 200 if service.is_ready else 503
        return {"ready": service.is_ready}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE)

    for route in [route for route in app.routes if isinstance(route, APIRoute) and "GET" in (route.methods or ())]:
        app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
    return app


def _describe_alias(name: str, parts: dict[str, float], created: int) -> dict[str, Any]:
    """The entry of an alias: what it stands for, and no tables of its own."""
    return {"id": name, "object": "model", "created": created, "owned_by": "fewstep", "alias_of": parts}


def _describe(engine: Engine, service: Service) -> dict[str, Any]:
    """One entry of ``/v1/models``: OpenAI's four fields, then what a request to this student may say."""
    manifest = engine.bundle.manifest
    channels, height, width = manifest.sample_shape
    return {
        "id": manifest.name,
        "object": "model",
        "created": service.started_s,
        "owned_by": "fewstep",
        "description": manifest.description,
        "version": manifest.version,
        "size": f"{width}x{height}",
        "channels": channels,
        "simulated": service.simulated,
        "labels": list(manifest.labels.names) if manifest.labels else [],
        "unconditional": manifest.labels is None or manifest.labels.null is not None,
        "max_images": image_limit(service, engine),
        "guidance": manifest.guidance.model_dump(),
        "default_tableau": manifest.default_tableau.model_dump(),
        "tableaus": [describe_table(engine, tableau) for tableau in engine.tableaus.values()],
    }
