"""A benchmark from beginning to end: the load in its process, the server watched meanwhile, the report."""

import multiprocessing
import signal
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
    ends_on_interrupt: bool = False,
) -> Round:
    """Load a target and measure it.

    Args:
        address: who is asked.
        workload: what is asked.
        timeout_s: a request that takes longer is an error.
        metrics: URL of its Prometheus metrics; that of its HTTP server when left out.
        server_pid: the server's process, whose children count too; found by its port when left out.
        is_quiet: show no progress.
        ends_on_interrupt: Ctrl-C ends the load and what was measured so far is returned; a second one leaves at once.

    Raises:
        BenchError: it could not be measured.
        KeyboardInterrupt: without ``ends_on_interrupt``, or before anything was measured.
    """
    if not timeout_s > 0:
        raise BenchError(f"--timeout: {timeout_s:g} must be more than 0")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    plan = Plan(address, workload, timeout_s)
    process = context.Process(target=generate, args=(plan, theirs), name="fewstep-bench")
    with _interrupts(signal.SIG_IGN):  # the process inherits it: Ctrl-C is this one's to hear
        process.start()
    theirs.close()
    try:
        watch = _Watch(address, workload, metrics, server_pid, process.pid, is_quiet)
        with _interrupts(lambda *_: watch.interrupt(ours)) if ends_on_interrupt else nullcontext():
            return watch.follow(ours)
    except EOFError:
        process.join()
        raise BenchError(f"the load generator ended with status {process.exitcode}; its message is above") from None
    except BaseException:
        process.terminate()
        raise
    finally:
        ours.close()
        process.join(5)
        if process.is_alive():
            process.terminate()
            process.join()


@contextmanager
def _interrupts(handler: Any) -> Iterator[None]:
    """What Ctrl-C does meanwhile; as before in any thread but the main one, which alone hears of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
    scheme = ""
    if target and "://" in target:
        try:
            parts = urlsplit(target)
            scheme, is_whole = parts.scheme, bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_whole = False
        if not is_whole:
            raise BenchError(f"{target}: is no URL of a server; one looks like http://127.0.0.1:8000")
    for option, number in (("--max-rows", max_rows), ("--threads", threads)):
        if number is not None and number < 1:
            raise BenchError(f"{option}: {number} must be at least 1")
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
        self._edges = 0
        self._is_interrupted = False

    def interrupt(self, connection: Any) -> None:
        """End the load, when there is something to report; the second time, or before that, leave."""
        if self._is_interrupted or self._edges < 2:
            raise KeyboardInterrupt
        self._is_interrupted = True
        connection.send("end")

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
                    name = "Ending" if self._is_interrupted else name
                    progress.update(task, description=name, completed=now_s, told=text)
                elif word == "edge":
                    tree = self._tree if self._tree and self._tree.is_alive else None
                    cpu_s.append(tree.cpu_s() if tree else None)
                    memory_mb = tree.memory_mb() if tree else None
                    self._edges = told + 1
                    if told == 0:
                        before = self._counts(about)
                    elif told == SLICES:
                        after = self._counts(about)
                elif word == "done":
                    break
        records: Records = told
        if records.slices < SLICES:
            after = self._counts(about)
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
