"""A server whose latencies are known: it sleeps for as long as it is told, and answers as OpenAI's or KServe's would.

    python synthetic_server.py '{"fast": 0.05, "slow": 0.2, "slow_every": 5, "serial": false}'

Request number k, its seed, takes ``slow`` seconds when ``slow_every`` divides k + 1, else ``fast``. With ``serial`` one
at a time, in the order they come. It prints its port, and when its standard input ends the service times it gave.
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

said = json.loads(sys.argv[1])
took: list[float] = []
line = threading.Lock()
INPUTS = [
    {"name": "noise", "datatype": "FP16", "shape": [-1, 3, 8, 8]},
    {"name": "mask", "datatype": "INT64", "shape": [-1, 4]},
    {"name": "text", "datatype": "BYTES", "shape": [-1, 1]},
]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """What the server is."""
        answers: dict[str, Any] = {
            "/v2": {"name": "synthetic", "version": "1", "extensions": ["binary_tensor_data"]},
            "/v2/models/sleeper": {"name": "sleeper", "inputs": INPUTS, "outputs": []},
        }
        held = answers.get(self.path)
        self._answer(404 if held is None else 200, held or {"error": "nothing here"})

    def do_POST(self) -> None:
        """Sleep and answer."""
        start_s = time.perf_counter()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/v2"):
            header = self.headers["Inference-Header-Content-Length"]
            asked = json.loads(body[: int(header)])
            sizes = [one["parameters"]["binary_data_size"] for one in asked["inputs"] if "parameters" in one]
            is_whole = len(body) == int(header) + sum(sizes)
            held = [(one["name"], one["shape"]) for one in asked["inputs"]] if is_whole else "cut"
            self._answer(200, {"outputs": [], "held": held})
            return
        number = json.loads(body)["seed"]
        is_slow = said["slow_every"] and (number + 1) % said["slow_every"] == 0
        service_s = said["slow"] if is_slow else said["fast"]
        if said["serial"]:
            with line:
                time.sleep(service_s)
        else:
            time.sleep(start_s + service_s - time.perf_counter())
        took.append(time.perf_counter() - start_s)
        self._answer(200, {"data": [{"b64_json": "AAAA"}]})

    def _answer(self, status: int, held: Any) -> None:
        body = json.dumps(held).encode()
        head = f"HTTP/1.1 {status} OK\r\nContent-Length: {len(body)}\r\nContent-Type: application/json\r\n\r\n"
        self.wfile.write(head.encode() + body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    """As many connections as come."""

    request_queue_size = 128
    daemon_threads = True


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)  # noqa: T201
    sys.stdin.read()
    print(json.dumps(took), flush=True)  # noqa: T201
