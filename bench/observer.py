"""The server from outside: rows a network call from its metrics, CPU time and memory from the operating system."""

import urllib.error
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import psutil

from .errors import BenchError

_LOCAL = ("127.0.0.1", "localhost", "::1")


def counts(url: str, model: str) -> tuple[float, float] | None:
    """Rows moved by one step and network calls so far, by Triton's names for them; None where there are none."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode("utf-8", "replace")
    except (OSError, ValueError, urllib.error.URLError):
        return None
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, rest = line.partition("{")
        if name in ("nv_inference_count", "nv_inference_exec_count") and f'model="{model}"' in rest:
            found[name] = found.get(name, 0.0) + float(rest.rpartition(" ")[2])
    if len(found) < 2:
        return None
    return found["nv_inference_count"], found["nv_inference_exec_count"]


class ProcessTree:
    """A process and its descendants.

    Args:
        pid: the process.

    Raises:
        BenchError: there is no such process.
    """

    def __init__(self, pid: int) -> None:
        try:
            self._root = psutil.Process(pid)
        except psutil.Error as error:
            raise BenchError(f"--server-pid: {pid}: {type(error).__name__}") from None
        self.pid = pid

    def cpu_s(self) -> float:
        """CPU time so far, of those that ended too."""
        total = 0.0
        for process in self._all():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    def memory_mb(self) -> float:
        """Resident memory. What processes share is counted for each."""
        total = 0
        for process in self._all():
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total / 1e6

    def _all(self) -> Iterable[Any]:
        with suppress(psutil.Error):
            return [self._root, *self._root.children(recursive=True)]
        return []


def listener(url: str) -> int | None:
    """The process that listens on the port of a URL, when that is on this machine and may be seen."""
    parts = urlsplit(url if "://" in url else f"grpc://{url}")
    if parts.hostname not in _LOCAL:
        return None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with suppress(psutil.Error):
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid is not None:
                return int(one.pid)
    return None
