"""Running the application under uvicorn: signals, draining, and the line that says where it listens.

On SIGTERM or SIGINT the server stops being ready, refuses new work, answers what it has accepted, and leaves.
"""

import signal
import socket
from types import FrameType

import uvicorn

from .app import create_app
from .service import Service
from .settings import Settings, SettingsError


class _DrainingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, greeting: str) -> None:
        super().__init__(config)
        self._service = service
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)  # only now would a connection be accepted

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
    service = Service(settings)
    config = uvicorn.Config(
        create_app(service),
        host=settings.host,
        port=settings.port,
        access_log=settings.access_log,
        log_level="info" if settings.access_log else "warning",
        timeout_graceful_shutdown=int(settings.drain_timeout_s) or 1,
        server_header=False,
        proxy_headers=False,
        ws="none",
    )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        raise SettingsError(f"{settings.host}:{settings.port} cannot be listened on: {error.strerror}") from None
    host, port = listener.getsockname()[:2]
    names = ", ".join(service.engines)
    greeting = f"fewstep serves {names} at http://{host}:{port}  (page at /, API at /docs; Ctrl-C ends)"
    _DrainingServer(config, service, greeting).run(sockets=[listener])


def _leave(*_: object) -> None:
    raise SystemExit(0)
