"""`fewstep serve` as a Ray Serve application: replicas of the whole server, behind Ray's own proxy and autoscaler.

    fewstep ray BUNDLE --min-replicas 2                                  here, or on the cluster RAY_ADDRESS names
    serve run fewstep.deploy.ray_app:app bundles=BUNDLE min_replicas=2   the same by Ray's command; or in its YAML

Each replica is one process with its own engines, and batches by itself: Ray chooses the replica for a request, the
engine's scheduler all else. Ray refuses with 429 what is more than its line takes, as a replica does for its own, so
that OpenAI's clients come back by themselves. A request that was under way on a replica that died ends with 500, or
with 408 where Ray gave it to another one when its body had been read; they ask both again.

Where the settings have a ``repository``, its students are multiplexed over the replicas. A request names one in Ray's
header, and goes to a replica that has it where there is one; else a replica loads it, and lets go of the one that was
asked for the longest ago when it has ``students`` of them: no request is under way on it then, for it waits for those.
"""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..server import Settings
from ..server.errors import ApiError
from ..server.service import Service

NAME = "fewstep"
HEADER = "x-fewstep-replica"


class Arguments(BaseModel):
    """What the application may be told; as ``NAME=VALUE`` by Ray's command, or ``args`` in its YAML."""

    model_config = ConfigDict(extra="forbid")

    bundles: str | None = None  # folders or embedded names, with commas between
    config: Path | None = None  # TOML file with the server's settings
    threads: int | None = Field(default=1, ge=1)  # CPU threads of one network call
    num_cpus: float = Field(default=1, gt=0)  # that Ray keeps for a replica
    num_gpus: float = Field(default=0, ge=0)
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=4, ge=1)
    students: int = Field(default=4, ge=1)  # of the repository, that a replica has at once
    max_queued: int = Field(default=256, ge=1)  # requests in the proxy's line; more are refused with 429
    up_s: float = Field(default=5, ge=0)  # a load that lasts so long starts replicas
    down_s: float = Field(default=60, ge=0)  # and one that stays away so long ends them


def app(arguments: Arguments) -> serve.Application:
    """The application.

    Raises:
        SettingsError: the file, or one of its values, cannot be used.
    """
    flags = {"bundles": tuple(arguments.bundles.split(",")) if arguments.bundles else None}
    settings = Settings.load(arguments.config, {**flags, "threads": arguments.threads, "grpc": False})

    def replica() -> Any:
        """Made in the replica: the whole server, without uvicorn."""
        from ..server.app import create_app
        from ..server.gate import gated
        from ..server.logs import set_up_logs

        set_up_logs(settings.log_format, settings.log_level, settings.access_log)
        service = _Replica(settings)
        return _signed(gated(_multiplexed(create_app(service), service, arguments.students), service))

    decorate = serve.deployment(
        name=NAME,
        # A replica runs max_rows samples at once; with twice as many in line its slots never wait for a request.
        max_ongoing_requests=3 * settings.max_rows,
        max_queued_requests=arguments.max_queued,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        autoscaling_config=AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=max(arguments.min_replicas, arguments.max_replicas),
            target_ongoing_requests=settings.max_rows,
            upscale_delay_s=arguments.up_s,
            downscale_delay_s=arguments.down_s,
        ),
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
    )
    deployment: Any = decorate(serve.ingress(replica)())
    application: serve.Application = deployment.bind()
    return application


def _signed(app: ASGIApp) -> ASGIApp:
    """The application, which says in a header of each answer which replica it is from, as Ray's logs name it."""
    name = serve.get_replica_context().replica_id.unique_id.encode()

    async def asked(scope: Scope, receive: Receive, send: Send) -> None:
        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (HEADER.encode(), name)]}
            await send(message)

        await app(scope, receive, signed)

    return asked


class _Replica(Service):
    """What a replica serves: a request that names no student itself gets the one of its header."""

    @property
    def default(self) -> str | None:
        """See `Service.default`."""
        return serve.get_multiplexed_model_id() or super().default


class _Held:
    """A student of the repository that a replica has; ``__del__`` is the instance's, as Ray calls it."""

    def __init__(self, service: Service, name: str) -> None:
        self.under_way = 0
        self.is_idle = asyncio.Event()
        self.is_idle.set()

        async def let_go() -> None:
            await self.is_idle.wait()
            with suppress(ApiError):  # somebody unloaded it by its name
                service.unload(name)

        self.__del__ = let_go


def _multiplexed(app: ASGIApp, service: Service, students: int) -> ASGIApp:
    """The application, with the student that a request's header names loaded when the request comes to it."""
    resident = {*service.engines, *service.aliases}

    async def load(name: str) -> _Held:
        await service.load(name, {})
        return _Held(service, name)

    student: Any = serve.multiplexed(load, max_num_models_per_replica=students)

    async def asked(scope: Scope, receive: Receive, send: Send) -> None:
        name = serve.get_multiplexed_model_id() if scope["type"] == "http" else ""
        if not name or name in resident:
            await app(scope, receive, send)
            return
        held = await student(name)
        held.under_way += 1
        held.is_idle.clear()
        try:
            await app(scope, receive, send)
        finally:
            held.under_way -= 1
            if not held.under_way:
                held.is_idle.set()

    return asked


def run(arguments: Arguments, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM, on the cluster that ``RAY_ADDRESS`` names or on one of this machine."""
    application = app(arguments)
    start(application, host, port)
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray took the one; a shell may have started us to ignore the other
        signal.signal(number, lambda *_: told.set())
    print(f"fewstep on Ray Serve at http://{host}:{port}  (Ctrl-C ends)", flush=True)
    try:
        told.wait()
    finally:
        stop()


def start(application: serve.Application, host: str, port: int, resources: Sequence[tuple[str, Any]] = ()) -> None:
    """Start Ray where it does not run, and the application on it; returns when it answers.

    Args:
        application: see `app`.
        host: address of the proxy.
        port: of the proxy.
        resources: further arguments of ``ray.init``.
    """
    # Ray kills a proxy that is not up after 5 s, which a busy machine can take, and with it the wait for the first.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    ray.init(logging_level=logging.WARNING, log_to_driver=False, ignore_reinit_error=True, **dict(resources))
    serve.start(http_options={"host": host, "port": port})
    serve.run(application, name=NAME)


def stop() -> None:
    """End the application, and Ray if it was started here."""
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()
