"""The demonstration: a real server in a process of its own, real HTTP requests, a picture and the latency.

It uses the standard library's HTTP client, so what it measures is what any client sees.
"""

import base64
import http.client
import io
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..runtime.pictures import Pixels, grid
from .settings import SettingsError

COLUMNS = 10
CLIENTS = 16


def run(bundle: str | None, output: Path, port: int, stay: bool) -> None:
    """Serve, ask, draw, report.

    Args:
        bundle: what to serve; the embedded student when None.
        output: the PNG file to write.
        port: port to serve on; 0 takes a free one.
        stay: go on serving until interrupted.

    Raises:
        SettingsError: the server did not start.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server is stopped too
    with _server(bundle, port) as (server, address):
        first_s = time.perf_counter()
        student = _ask(address, "GET", "/v1/models")["data"][0]
        labels = student["labels"] or [""]
        first_image = _generate(address, prompt=labels[0], seed=0)
        first_s = time.perf_counter() - first_s
        rows = []
        for i, label in enumerate(labels):
            answer = _generate(address, prompt=label, n=COLUMNS, seed=1000 * i)
            rows.append([_pixels(image) for image in answer["data"]])
        height = rows[0][0].shape[0]
        output.parent.mkdir(parents=True, exist_ok=True)
        grid(rows, labels, scale=max(1, 56 // height)).save(output, "PNG")

        alone = sorted(_timed(address, labels[i % len(labels)], i) for i in range(40))
        start_s = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as clients:
            jobs = [clients.submit(_timed, address, labels[i % len(labels)], i) for i in range(8 * CLIENTS)]
            together = sorted(job.result() for job in jobs)
        took_s = time.perf_counter() - start_s
        host, number = address
        print(f"{student['id']}: {student['description']}")
        print(
            f"{output}: {len(rows) * COLUMNS} images, one row a class, {first_image['num_inference_steps']} steps each"
        )
        print(f"one client:  p50 {1000 * statistics.median(alone):.1f} ms, p99 {1000 * alone[-1]:.1f} ms a request")
        middle, last = statistics.median(together), together[round(0.99 * (len(together) - 1))]
        rate = len(together) / took_s
        print(f"{CLIENTS} clients:  p50 {1000 * middle:.1f} ms, p99 {1000 * last:.1f} ms, {rate:.0f} images/s")
        if stay:
            print(f"Serving at http://{host}:{number}/ until Ctrl-C", flush=True)
            server.wait()
        else:
            print(f"The page was at http://{host}:{number}/ ; 'make serve' or 'fewstep serve' keeps it there")


@contextmanager
def _server(bundle: str | None, port: int) -> Iterator[tuple["subprocess.Popen[str]", tuple[str, int]]]:
    command = [sys.executable, "-m", "fewstep", "serve", *([bundle] if bundle else []), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at http://" not in line:
            raise SettingsError("the server did not start; its message is above")
        host, _, number = line.split(" at http://")[1].split()[0].rpartition(":")
        yield process, (host, int(number))
    finally:
        process.terminate()
        process.wait()


def _generate(address: tuple[str, int], **body: Any) -> dict[str, Any]:
    return _ask(address, "POST", "/v1/images/generations", body)


def _timed(address: tuple[str, int], label: str, seed: int) -> float:
    start_s = time.perf_counter()
    _generate(address, prompt=label, seed=seed)
    return time.perf_counter() - start_s


def _ask(address: tuple[str, int], method: str, path: str, body: Any = None) -> dict[str, Any]:
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        content: dict[str, Any] = json.loads(answer.read())
        if answer.status != 200:
            raise SettingsError(f"{path}: {answer.status} {content}")
        return content
    finally:
        connection.close()


def _pixels(image: dict[str, Any]) -> Pixels:
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))))
    return decoded[:, :, None] if decoded.ndim == 2 else decoded
