"""NVIDIA's perf_analyzer, the load generator that Triton's users know, in an environment of its own.

It comes in an old wheel of ``tritonclient``, and is linked to libraries that the Triton server's wheel has.
"""

import asyncio
import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .triton_server import Environment, TritonError

WHEEL = "tritonclient==2.41.1"  # the last one whose wheel has it


@dataclass(frozen=True)
class Load:
    """What perf_analyzer saw."""

    images_per_s: float
    p50_ms: float
    p99_ms: float


def perf_analyzer(
    environment: Environment,
    address: str,
    model: str,
    inputs: Sequence[Mapping[str, Any]],
    *,
    protocol: Literal["http", "grpc"] = "grpc",
    clients: int = 16,
    requests: int = 200,
) -> Load:
    """A closed loop.

    Args:
        environment: whose libraries it takes.
        address: host and port.
        model: which one is asked.
        inputs: by name, the values of each request. Each client takes every ``clients``-th of them, over and over: so
            that all take all, the number of inputs and that of clients should have no divisor in common.
        protocol: of the Open Inference Protocol.
        clients: requests under way.
        requests: in each of its windows, at least.

    Raises:
        TritonError: it cannot be installed, or was refused; its own words.
    """
    tool = _tool(environment)
    with tempfile.TemporaryDirectory() as place:
        data, report = Path(place) / "inputs.json", Path(place) / "report.csv"
        data.write_text(json.dumps({"data": inputs}))
        command = [str(tool / "bin" / "perf_analyzer"), "-m", model, "-u", address, "-i", protocol, "-f", str(report)]
        command += ["--concurrency-range", str(clients), "--percentile", "99", "--input-data", str(data)]
        command += ["--measurement-mode", "count_windows", "--measurement-request-count", str(requests)]
        command += ["--max-trials", "10", "--stability-percentage", "900"]  # how stable it is, runs in turn tell
        variables = {**os.environ, "LD_LIBRARY_PATH": str(tool / "lib")}
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode or not report.exists():
            raise TritonError(f"perf_analyzer: {model}: {done.stdout[-2000:].strip()}")
        (row,) = csv.DictReader(report.read_text().splitlines())
    return Load(float(row["Inferences/Second"]), float(row["p50 latency"]) / 1000, float(row["p99 latency"]) / 1000)


@dataclass
class Relay:
    """Something to ask in a server's place."""

    address: str
    inferences: int = 0  # that were asked for


@contextmanager
def without_sequences(address: str) -> Iterator[Relay]:
    """A relay before a server's HTTP that keeps from its clients which models have sequences.

    To such a model perf_analyzer marks each request as the first and the last of a sequence, and Triton does not bring
    back a request that its client marked as the end: an iterative model could not be loaded as other clients load it,
    who name no sequence.
    """
    loop = asyncio.new_event_loop()
    host, _, port = address.rpartition(":")
    made = Relay("")

    async def relay(client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        server, ask = await asyncio.open_connection(host, int(port))
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    head, body = await _message(client)
                    ask.write(head + body)
                    path = head.split(b" ", 2)[1]
                    made.inferences += path.endswith(b"/infer")
                    head, body = await _message(server)
                    if path.endswith(b"/config"):
                        config = json.loads(body)
                        config.pop("sequence_batching", None)
                        body = json.dumps(config).encode()
                        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                        head += b"Content-Length: %d\r\n\r\n" % len(body)
                    answer.write(head + body)
        finally:
            for stream in (ask, answer):
                stream.close()
                with suppress(ConnectionError):
                    await stream.wait_closed()

    async def end() -> None:
        listening.close()
        relays = asyncio.all_tasks() - {asyncio.current_task()}
        for task in relays:
            task.cancel()
        await asyncio.gather(*relays, return_exceptions=True)

    listening = loop.run_until_complete(asyncio.start_server(relay, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, name="fewstep-relay", daemon=True)
    thread.start()
    try:
        made.address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        yield made
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _message(stream: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """One message of HTTP: its head, and its body of the length that the head tells."""
    head = await stream.readuntil(b"\r\n\r\n")
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if line)
    return head, await stream.readexactly(int(fields.get(b"content-length", 0)))


def _tool(environment: Environment) -> Path:
    tool = Environment.default().folder.with_name("perf-analyzer")
    if (tool / "bin" / "perf_analyzer").exists():
        return tool
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", tool], check=True)
        python = str(tool / "bin" / "python")
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
        for name, pattern in (("libb64.so.0d", "libb64-*"), ("libcudart.so.12", "libcudart-*")):
            (tool / "lib" / name).symlink_to(next(environment.libraries.glob(pattern)))
        subprocess.run([*pip, WHEEL], check=True)
    except (subprocess.CalledProcessError, StopIteration) as error:
        raise TritonError(f"perf_analyzer cannot be installed: {error}") from None
    return tool
