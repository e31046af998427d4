"""Running the application under uvicorn: signals, draining, and the line that says where it listens.

On SIGTERM or SIGINT the server stops being ready, refuses new work, answers what it has accepted, and leaves. All
doors have one deadline, ``drain_timeout_s`` from then: what is not answered by it is cut off.
"""

import gc
import signal
import socket
import ssl
import time
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ..kernels import native_step
from .app import create_app
from .connection import Connection, connection_to
from .gate import gated
from .logs import set_up_logs
from .service import Service
from .settings import Settings, SettingsError

if TYPE_CHECKING:
    from .kserve_grpc import GrpcServer


class _DrainingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, where: str, grpc: "GrpcServer | None") -> None:
        super().__init__(config)
        self._service = service
        self._where = where
        self._grpc = grpc

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # what starting made stays: no collection walks it again
        gc.set_threshold(50_000, 20, 20)  # requests leave few cycles behind; the default looks after every few of them
        also = f", gRPC at {await self._grpc.start()}" if self._grpc else ""
        names = ", ".join(self._service.engines)
        if self._service.simulated:
            names += f" on a SIMULATED accelerator ({self._service.simulated})"
        if self._service.settings.device == "cpu" and native_step() is None:
            also += "; the fused step in numpy, as none could be compiled"
        # Only now would a connection be accepted.
        print(f"fewstep serves {names} at {self._where}  (page at /, API at /docs{also}; Ctrl-C ends)", flush=True)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # once a second
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.look_after(time.monotonic())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        until_s = time.monotonic() + self._service.settings.drain_timeout_s
        if self._grpc is not None:  # HTTP answers meanwhile
            await self._grpc.stop(self._service.settings.drain_timeout_s)
        self.config.timeout_graceful_shutdown = max(0.1, until_s - time.monotonic())  # type: ignore[assignment]
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.is_draining = True
        super().handle_exit(sig, frame)


def serve(settings: Settings) -> None:
    """Serve until told to stop.

    Raises:
        BundleError: a bundle cannot be loaded.
        SettingsError: the address cannot be listened on.
    """
    signal.signal(signal.SIGTERM, _leave)  # uvicorn hands the signal back to it when all is answered
    set_up_logs(settings.log_format, settings.log_level, settings.access_log)
    _refuse_bad_tls(settings)
    service = Service(settings)
    config = uvicorn.Config(
        gated(create_app(service), service),
        http=connection_to(service),
        host=settings.host,
        port=settings.port,
        access_log=False,  # the gate writes it
        log_config=None,
        log_level="debug" if settings.log_level == "debug" else "warning",
        ssl_certfile=settings.tls_certfile,
        ssl_keyfile=settings.tls_keyfile,
        server_header=False,
        proxy_headers=False,
        ws="none",
    )
    listener = _bound(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    grpc = None
    if settings.grpc:
        from .kserve_grpc import GrpcServer  # 14 MB of memory that a server without gRPC does not need

        wanted = settings.grpc_port if settings.grpc_port is not None else settings.port and (settings.port + 1) % 65536
        with _bound(settings.host, wanted, " for gRPC; choose another grpc_port, or --no-grpc") as trial:
            grpc_port = trial.getsockname()[1]  # gRPC takes no socket of ours, and tells less when it fails
        grpc = GrpcServer(service, grpc_port)
    scheme = "https" if settings.tls_certfile else "http"
    _DrainingServer(config, service, f"{scheme}://{host}:{port}", grpc).run(sockets=[listener])


def _bound(host: str, port: int, hint: str = "") -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(f"{host}:{port} cannot be listened on{hint}: {error.strerror}") from None
    return listener


def _refuse_bad_tls(settings: Settings) -> None:
    if settings.tls_certfile is None:
        return
    for name, file in (("tls_certfile", settings.tls_certfile), ("tls_keyfile", settings.tls_keyfile)):
        if file is None or not file.is_file():
            raise SettingsError(f"{name}: there is no file {file}")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certfile, settings.tls_keyfile)
    except (ssl.SSLError, OSError) as error:
        raise SettingsError(f"tls_certfile, tls_keyfile: cannot be used together: {error}") from None


def _leave(*_: object) -> None:
    raise SystemExit(0)
