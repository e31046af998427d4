"""A benchmark from beginning to end: the load in its process, the server watched meanwhile, the report."""

import multiprocessing
import ssl
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .errors import BenchError
from .generator import SLICES, Plan, Records, generate
from .observer import Counts, ProcessTree, counts, listener
from .report import Round, round_of
from .targets import PROTOCOLS, About, Address
from .workload import Workload


def bench(
    address: Address,
    workload: Workload,
    *,
    timeout_s: float = 60.0,
    metrics: str | None = None,
    server_pid: int | None = None,
    is_quiet: bool = False,
) -> Round:
    """Load a target and measure it.

    Args:
        address: who is asked.
        workload: what is asked.
        timeout_s: a request that takes longer is an error.
        metrics: URL of its Prometheus metrics; that of its HTTP server when left out.
        server_pid: the server's process, whose children count too; found by its port when left out.
        is_quiet: show no progress.

    Raises:
        BenchError: it could not be measured.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    plan = Plan(address, workload, timeout_s)
    process = context.Process(target=generate, args=(plan, theirs), name="fewstep-bench")
    process.start()
    theirs.close()
    try:
        return _Watch(address, workload, metrics, server_pid, process.pid, is_quiet).follow(ours)
    except EOFError:
        process.join()
        raise BenchError(f"the load generator ended with status {process.exitcode}; its message is above") from None
    finally:
        ours.close()
        process.join(5)
        if process.is_alive():
            process.terminate()
            process.join()


def address_of(
    target: str | None,
    protocol: str | None = None,
    *,
    model: str | None = None,
    key: str | None = None,
    cafile: Path | None = None,
    max_rows: int = 16,
    threads: int | None = None,
    simulate: str | None = None,
) -> Address:
    """Who is meant: a URL is a server, anything else a bundle that runs here.

    Raises:
        BenchError: the target and the protocol do not go together.
    """
    scheme = urlsplit(target).scheme if target and "://" in target else ""
    if protocol is not None and protocol not in PROTOCOLS:
        raise BenchError(f"--protocol: {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    if scheme not in ("", "http", "https", "grpc", "grpcs"):
        raise BenchError(f"{target}: a server's URL begins with http://, https://, grpc:// or grpcs://")
    if protocol is None:
        protocol = {"": "in-process", "grpc": "grpc", "grpcs": "grpc"}.get(scheme, "openai")
    if protocol in ("openai", "http") and scheme not in ("http", "https"):
        raise BenchError(f"{target}: --protocol {protocol} needs a URL such as http://127.0.0.1:8000")
    if protocol == "grpc" and scheme in ("http", "https"):
        raise BenchError(f"{target}: --protocol grpc needs the gRPC port: grpc://HOST:PORT or grpcs://HOST:PORT")
    if protocol == "in-process" and scheme:
        raise BenchError(f"{target}: --protocol in-process needs a bundle's folder or name")
    if simulate is not None and protocol != "in-process":
        raise BenchError("--simulate: a server says itself what it runs on; start it with fewstep serve --simulate")
    if cafile is not None and scheme not in ("https", "grpcs"):
        raise BenchError("--cafile: only https:// and grpcs:// have certificates to check")
    if cafile is not None:
        try:
            ssl.create_default_context(cafile=cafile)
        except ssl.SSLError:
            raise BenchError(f"--cafile: {cafile}: holds no certificate in PEM") from None
        except OSError as error:
            raise BenchError(f"--cafile: {cafile}: {error.strerror}") from None
    return Address(target or "", protocol, model, key, cafile, max_rows, threads, simulate)


class _Watch:
    """What the parent does while the load runs."""

    def __init__(
        self,
        address: Address,
        workload: Workload,
        metrics: str | None,
        server_pid: int | None,
        generator_pid: int | None,
        is_quiet: bool,
    ) -> None:
        self._address = address
        self._workload = workload
        is_http = address.protocol in ("openai", "http")
        parts = urlsplit(address.target)
        self._metrics = metrics or (f"{parts.scheme}://{parts.netloc}/metrics" if is_http else None)
        if address.protocol == "in-process":
            server_pid = generator_pid
        elif server_pid is None:
            server_pid = listener(address.target)
        self._tree = ProcessTree(server_pid) if server_pid is not None else None
        self._is_quiet = is_quiet or not sys.stderr.isatty()

    def follow(self, connection: Any) -> Round:
        """Read what the generator tells until it is done."""
        workload, total_s = self._workload, self._workload.warmup_s + self._workload.seconds
        about = About("")
        cpu_s: list[float | None] = []
        memory_mb: float | None = None
        before: Counts | None = None
        after: Counts | None = None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[told]}"),
        )
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        with nullcontext() if self._is_quiet else progress:
            task = progress.add_task("Warming up", total=total_s, told="")
            while True:
                word, told = connection.recv()
                if word == "failed":
                    raise BenchError(told)
                if word == "about":
                    about = told
                elif word == "progress":
                    now_s, num, errors, in_flight, middle_ms = told
                    latency = f"{middle_ms:.1f} ms" if middle_ms is not None else "no answers"
                    text = f"{num} requests, {latency}, {in_flight} under way" + (
                        f", {errors} errors" if errors else ""
                    )
                    name = "Measuring" if now_s > workload.warmup_s else "Warming up"
                    progress.update(task, description=name, completed=now_s, told=text)
                elif word == "edge":
                    cpu_s.append(self._tree.cpu_s() if self._tree else None)
                    if told == 0:
                        before = self._counts(about)
                    elif told == SLICES:
                        after = self._counts(about)
                        memory_mb = self._tree.memory_mb() if self._tree else None
                elif word == "done":
                    break
        records: Records = told
        done = after.since(before) if before is not None and after is not None else records.counts
        server = {
            "pid": self._tree.pid if self._tree else None,
            "memory_mb": memory_mb,
            "rows_per_call": None,
            **(done.for_report() if done else {}),
        }
        return round_of(self._address, about, workload, records, server, cpu_s)

    def _counts(self, about: About) -> Counts | None:
        if self._metrics is None:
            return None
        return counts(self._metrics, about.model, self._address.key, self._address.cafile)
