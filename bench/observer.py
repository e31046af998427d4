"""The server from outside: its network calls from its metrics, CPU time and memory from the operating system."""

import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from .errors import BenchError

_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Counts:
    """What an engine has done so far, and what it is."""

    rows: float  # moved by one step
    calls: float  # of the network
    busy_s: float  # in these
    at_s: float  # when it was read
    max_rows: int | None = None
    deviation_s: float | None = None  # of a call from its mean cost

    def since(self, before: "Counts") -> "Counts":
        """What it did meanwhile."""
        done = self.rows - before.rows, self.calls - before.calls, self.busy_s - before.busy_s
        return replace(self, rows=done[0], calls=done[1], busy_s=done[2], at_s=self.at_s - before.at_s)

    def for_report(self) -> dict[str, Any]:
        """Its words in a report."""
        return {
            "rows_per_call": self.rows / self.calls if self.calls else None,
            "ms_per_call": 1000 * self.busy_s / self.calls if self.calls else None,
            "busy": self.busy_s / self.at_s if self.at_s else None,
            "max_rows": self.max_rows,
            "call_deviation_ms": None if self.deviation_s is None else 1000 * self.deviation_s,
        }


_COUNTED = ("nv_inference_count", "nv_inference_exec_count", "nv_inference_compute_infer_duration_us")  # Triton's names
_TOLD = ("fewstep_max_rows", "fewstep_tick_deviation_seconds")


def counts(url: str, model: str, key: str | None = None, cafile: Path | None = None) -> Counts | None:
    """From a server's metrics; None where it does not tell."""
    trust = ssl.create_default_context(cafile=cafile) if url.startswith("https:") else None
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(asked, timeout=5, context=trust) as answer:
            text = answer.read().decode("utf-8", "replace")
    except (OSError, ValueError, urllib.error.URLError):
        return None
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, rest = line.partition("{")
        if name in (*_COUNTED, *_TOLD) and f'model="{model}"' in rest:
            found[name] = found.get(name, 0.0) + float(rest.rpartition(" ")[2])
    if not found.keys() >= set(_COUNTED):
        return None
    rows, calls, busy_us = (found[name] for name in _COUNTED)
    max_rows, deviation_s = (found.get(name) for name in _TOLD)
    return Counts(
        rows, calls, busy_us / 1e6, time.monotonic(), None if max_rows is None else int(max_rows), deviation_s
    )


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

    @property
    def is_alive(self) -> bool:
        """Whether the process itself still runs."""
        with suppress(psutil.Error):
            return bool(self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE)
        return False

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
