"""fewstep: an inference serving runtime for fast students."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import AsyncClient, Client, ClientError

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "ClientError", "__version__"]


def __getattr__(name: str) -> Any:
    """The clients, imported when they are first asked for: the extra ``[client]``."""
    if name not in ("AsyncClient", "Client", "ClientError"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import client

    return getattr(client, name)
