"""Both ways of a request, the short one and the application's, against a running server and by raw sockets."""

import gzip
import http.client
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from conftest import free_port
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fewstep.server.connection import Connection
from fewstep.server.keys import hashed

Address = tuple[str, int]
Serving = Callable[..., AbstractContextManager[tuple["subprocess.Popen[str]", Address]]]
IMAGES = "/v1/images/generations"
LONG = {"Origin": "http://fewstep"}  # a header with which a request goes through the application


@pytest.fixture(scope="module")
def address(
    serving: Serving, make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Address]:
    file = tmp_path_factory.mktemp("settings") / "fewstep.toml"
    file.write_text("request_timeout_s = 3.0\n")
    with serving(make_bundle(), "--no-grpc", "--config", file) as (_, where):
        yield where


def request(body: Any, headers: dict[str, str] | None = None, version: str = "1.1", path: str = IMAGES) -> bytes:
    """A request as it is sent."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: fewstep", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


def receive(sock: socket.socket) -> tuple[int, dict[str, str], Any]:
    """The next answer on a connection, and no byte more: status, headers, JSON or other content."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1) or b"the connection ended\r\n\r\n"
    first, *lines = head.decode().split("\r\n")[:-2]
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    content = b""
    while len(content) < int(headers["content-length"]):
        content += sock.recv(int(headers["content-length"]) - len(content))
    is_json = headers["content-type"] == "application/json" and "content-encoding" not in headers
    return int(first.split()[1]), headers, json.loads(content) if is_json else content


def ask(address: Address, sent: bytes) -> tuple[int, dict[str, str], Any]:
    with socket.create_connection(address, timeout=30) as sock:
        sock.sendall(sent)
        return receive(sock)


def test_uvicorn_still_has_what_the_short_way_stands_on() -> None:
    for name in ("_start_asgi_task", "on_message_complete", "on_response_complete", "connection_lost"):
        assert hasattr(HttpToolsProtocol, name)
        assert name in vars(Connection)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "3", "seed": 1},
        {"prompt": "3", "seed": 1, "n": 3, "response_format": "url", "output_format": "webp"},
        {"prompt": "sandwich"},
        {"num_inference_steps": 77, "prompt": "1"},
        {"prompt": "1", "guidance_scale": 9.0},
        {"prompt": "1", "deadline_ms": 0.001},
        {"prompt": "1", "model": "no-such"},
        {"sed": 1},
        {"n": 0},
        b"{",
        b"",
        b"\xff\x00",
    ],
    ids=str,
)
def test_both_ways_answer_alike(address: Address, body: Any) -> None:
    def told(headers: dict[str, str]) -> tuple[int, set[str], Any]:
        status, names, answer = ask(address, request(body, {"X-Request-ID": "mine", **headers}))
        assert names["x-request-id"] == "mine"
        for varying in ("timings", "created"):
            answer.pop(varying, None)
        if "error" in answer and "ms are not enough" in answer["error"]["message"]:
            answer["error"]["message"] = answer["error"]["message"].partition(":")[0]  # the rest is measured
        return status, set(names), answer

    assert told({}) == told(LONG)


SEED = {"name": "SEED", "datatype": "UINT64", "shape": [2, 1], "data": [7, 8]}
PNG = {"name": "PNG", "parameters": {"binary_data": True}}


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("infer", {"id": "a", "inputs": [SEED]}, {}),
        ("infer", {"inputs": [SEED], "outputs": [PNG, {"name": "STEPS"}]}, {}),
        ("infer", {"inputs": [SEED], "parameters": {"binary_data_output": True}}, {"Accept-Encoding": "gzip"}),
        ("infer", {"inputs": [SEED | {"data": [7]}]}, {}),
        ("infer", {"inputs": [SEED | {"name": "SED"}]}, {}),
        ("infer", {"parameters": {"seed": 7, "deadline_ms": 0.001}}, {}),
        ("infer", b"{", {}),
        ("infer", b"{}1234", {"Inference-Header-Content-Length": "2"}),
        ("generate", {"text_input": "3", "seed": 7}, {}),
        ("generate", {"text_input": "3", "steps": 77}, {}),
        ("versions/1/generate", {"seed": 7}, {}),
        ("versions/9/generate", {"seed": 7}, {}),
    ],
    ids=str,
)
def test_both_ways_answer_alike_in_the_open_inference_protocol(
    address: Address, path: str, body: Any, headers: dict[str, str]
) -> None:
    with urlopen(f"http://{address[0]}:{address[1]}/v1/models") as models:
        name = json.load(models)["data"][0]["id"]

    def told(way: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        sent = request(body, {"X-Request-ID": "mine", **headers, **way}, path=f"/v2/models/{name}/{path}")
        status, names, answer = ask(address, sent)
        del names["date"]
        if status == 429:
            names.clear()
            answer = answer["error"].partition(":")[0]  # the rest is measured
        return status, names, answer

    assert told({}) == told(LONG)


def test_keys_count_the_same_both_ways(serving: Serving, make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[api_keys.few]\nsha256 = "{hashed("few")}"\nimages_per_s = 0.01\nburst = 4\n')
    with serving(make_bundle(), "--api-keys-file", file, "--no-grpc") as (_, where):
        assert ask(where, request({"prompt": "1"}))[2]["error"]["code"] == "missing_api_key"
        few = {"X-API-Key": "few"}
        statuses = [ask(where, request({"prompt": "1"}, few | way))[0] for way in ({}, LONG, {}, LONG, {}, LONG)]
    assert statuses == [200, 200, 200, 200, 429, 429]


@pytest.mark.parametrize(
    "path", ["/v2/health/live", "/v2/health/ready", "/v2/models/digits/ready", "/v2/models/no/ready"]
)
def test_health_comes_in_one_piece(address: Address, path: str) -> None:
    """Tritonclient's asyncio client reads no body of these: one that comes later costs it the connection."""
    with socket.create_connection(address, timeout=30) as sock:
        for _ in range(10):
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: fewstep\r\n\r\n".encode())
            head, _, body = sock.recv(65536).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 " if "no" not in path else b"HTTP/1.1 404 ")
            assert json.loads(body)


def test_pipelined_requests_are_answered_in_order(address: Address) -> None:
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: fewstep\r\n\r\n"
    sent = [request({"prompt": "1", "seed": 1}), request({"prompt": "1", "seed": 2}, LONG), request({"sed": 3}), live]
    sent += [request({"prompt": "1", "seed": 4})]
    with socket.create_connection(address, timeout=30) as sock:
        sock.sendall(b"".join(sent))
        answers = [receive(sock) for _ in sent]
    assert [status for status, _, _ in answers] == [200, 200, 400, 200, 200]
    assert [answers[i][2]["data"][0]["seed"] for i in (0, 1, 4)] == [1, 2, 4]
    assert answers[3][2] == {"live": True}


@pytest.mark.parametrize("pause_s", [0.0, 0.02, 1.5])
def test_a_body_may_come_in_pieces(address: Address, pause_s: float) -> None:
    sent = request({"prompt": "1", "seed": 7})
    with socket.create_connection(address, timeout=30) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in (sent[:30], sent[30:-10], sent[-10:-5], sent[-5:]):
            sock.sendall(part)
            time.sleep(pause_s / 3)
        assert receive(sock)[0] == 200
        sock.sendall(sent)  # and the connection goes on
        assert receive(sock)[2]["data"][0]["seed"] == 7


def test_a_body_that_does_not_come_is_refused_and_a_silent_connection_closed(address: Address) -> None:
    with socket.create_connection(address, timeout=30) as sock, socket.create_connection(address, timeout=30) as silent:
        sock.sendall(request({"prompt": "1"})[:-3])
        status, _, answer = receive(sock)
        assert (status, answer["error"]["code"]) == (408, "body_too_slow")
        assert silent.recv(1) == b""


@pytest.mark.parametrize(
    ("headers", "data"),
    [
        ({"Content-Encoding": "gzip"}, gzip.compress(b'{"prompt": "1", "seed": 5}')),
        ({"Expect": "100-continue"}, b'{"prompt": "1", "seed": 5}'),
        ({}, b'{"prompt": "1", "seed": 5}' + b" " * 100_000),
    ],
    ids=["gzip", "expect", "large"],
)
def test_what_is_unusual_is_answered_too(address: Address, headers: dict[str, str], data: bytes) -> None:
    with socket.create_connection(address, timeout=30) as sock:
        sent = request(data, headers)
        head, _, body = sent.partition(b"\r\n\r\n")
        sock.sendall(head + b"\r\n\r\n")
        if "Expect" in headers:
            assert sock.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        sock.sendall(body)
        status, _, answer = receive(sock)
    assert (status, answer["data"][0]["seed"]) == (200, 5)


def test_a_chunked_body(address: Address) -> None:
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: fewstep\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    status, _, answer = ask(address, head + b'8\r\n{"seed":\r\n3\r\n 5}\r\n0\r\n\r\n')
    assert (status, answer["error"]["param"] if status == 400 else answer["data"][0]["seed"]) == (200, 5)


@pytest.mark.parametrize(("headers", "version"), [({"Connection": "close"}, "1.1"), ({}, "1.0")])
@pytest.mark.parametrize("body", [{"prompt": "1"}, {"sed": 1}], ids=["good", "bad"])
def test_a_connection_that_is_to_be_closed_is(
    address: Address, headers: dict[str, str], version: str, body: Any
) -> None:
    with socket.create_connection(address, timeout=30) as sock:
        sock.sendall(request(body, headers, version))
        status, told, _ = receive(sock)
        assert (status == 200) == ("prompt" in body)
        assert told["connection"] == "close"
        assert sock.recv(1) == b""


def cancelled(address: Address) -> int:
    return samples(address, 'reason="CANCELED"')


def finished(address: Address) -> int:
    return samples(address, "nv_inference_request_success{")


def samples(address: Address, kind: str) -> int:
    caller = http.client.HTTPConnection(*address, timeout=30)
    caller.request("GET", "/metrics")
    lines = caller.getresponse().read().decode().splitlines()
    caller.close()
    return sum(int(float(line.rpartition(" ")[2])) for line in lines if kind in line)


def test_a_client_that_leaves_ends_its_work(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    with serving(make_bundle(), "--no-grpc", "--simulate", "200+0") as (_, address):
        with socket.create_connection(address, timeout=30) as sock:
            sock.sendall(request({"prompt": "1", "num_inference_steps": 8, "n": 4}))
            time.sleep(0.5)
            assert cancelled(address) == 0
        time.sleep(0.7)  # a step takes 0.2 s, all eight 1.6
        assert cancelled(address) == 4


def test_a_deadline_that_passes_after_all_is_504_and_nobody_asks_again(
    serving: Serving, make_bundle: Callable[..., Path]
) -> None:
    """It was accepted, since it fitted then; a higher priority came."""
    with serving(make_bundle(), "--no-grpc", "--simulate", "100+0", "--max-rows", "1") as (_, address):
        for way in ({}, LONG):
            with ExitStack() as stack:
                running, late, bumping = (
                    stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(3)
                )
                running.sendall(request({"prompt": "1", "num_inference_steps": 8}))
                time.sleep(0.1)
                late.sendall(request({"prompt": "1", "num_inference_steps": 8, "deadline_ms": 2400}, way))
                time.sleep(0.1)
                bumping.sendall(request({"prompt": "1", "num_inference_steps": 8, "priority": 50, "n": 2}))
                status, told, answer = receive(late)
                assert (status, told["x-should-retry"], answer["error"]["code"]) == (504, "false", "deadline_expired")
                assert [receive(sock)[0] for sock in (running, bumping)] == [200, 200]


def test_what_was_accepted_is_answered_when_the_server_stops(
    serving: Serving, make_bundle: Callable[..., Path]
) -> None:
    with serving(make_bundle(), "--no-grpc", "--simulate", "200+0") as (process, address):
        with socket.create_connection(address, timeout=30) as sock:
            sock.sendall(request({"prompt": "1", "num_inference_steps": 8}))
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            status, told, _ = receive(sock)
            assert (status, told["connection"]) == (200, "close")
        assert process.wait(10) == 0


def test_work_that_outlasts_the_drain_is_cut_off(
    serving: Serving, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "fewstep.toml"
    file.write_text("drain_timeout_s = 1.0\n")
    with serving(make_bundle(), "--no-grpc", "--simulate", "1000+0", "--config", file) as (process, address):
        with socket.create_connection(address, timeout=30) as sock:
            sock.sendall(request({"prompt": "1", "num_inference_steps": 8}))
            time.sleep(0.3)
            start_s = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert sock.recv(1) == b""
        assert process.wait(10) == 0
        assert time.monotonic() - start_s < 6


def test_what_nobody_waits_for_does_not_hold_up_the_exit(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    """A stream on which nothing is asked, one that watches the health, and jobs of a minute: it leaves at once."""
    port = free_port()
    flags = ("--simulate", "1000+0", "--max-rows", "1", "--grpc-port", str(port))
    with serving(make_bundle(), *flags) as (process, address), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        job = {"prompt": "1", "n": 8, "num_inference_steps": 8}
        assert ask(address, request(job, path="/v1/jobs"))[0] == 202
        asked = threading.Event()

        def nothing() -> Iterator[Any]:
            asked.wait()
            yield from ()

        idle = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(nothing())
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0  # drain_timeout_s is 30
        assert list(idle) == []
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        asked.set()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 300 + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 1_000_000,
        request({"prompt": "1"}) + b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 1_000_000,
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-A: " + b"a" * 1_000_000,
    ],
    ids=["long", "many", "path", "endless", "endless, pipelined", "endless, after the body"],
)
def test_a_head_without_bounds_is_refused(address: Address, sent: bytes) -> None:
    """With 431 where the client reads it before the connection is reset; it is closed in any case."""
    answers = b""
    with socket.create_connection(address, timeout=30) as sock:
        with suppress(ConnectionError):
            sock.sendall(sent)
        with suppress(ConnectionError):
            while part := sock.recv(65536):
                answers += part
    if len(sent) < 100_000:
        assert answers.startswith(b"HTTP/1.1 431 ")
        assert b'"code":"headers_too_large"' in answers


def test_a_large_head_within_the_bounds_is_read(address: Address) -> None:
    for way in ({}, LONG):
        headers = {f"X-{i}": "a" * 200 for i in range(200)}
        assert ask(address, request({"prompt": "1"}, headers | way))[0] == 200


def test_for_a_client_that_does_not_read_no_more_is_made_than_it_can_take(serving: Serving) -> None:
    """It asked for thousands of images at once on one connection; when it reads, it gets all of them."""
    num = 150
    with serving("--no-grpc", "--simulate", "0+0") as (_, address), socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(30)
        sock.connect(address)
        sock.sendall(request({"n": 64, "num_inference_steps": 1, "seed": 5}) * num)
        made, before = finished(address), -1
        while made > before:  # until it stands still
            time.sleep(1)
            before, made = made, finished(address)
        assert 0 < made < 0.8 * 64 * num
        assert [receive(sock)[0] for _ in range(num)] == [200] * num
        assert finished(address) == 64 * num


def test_connections_beyond_the_limit_are_told_so(
    serving: Serving, make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_MAX_CONNECTIONS", "2")
    with serving(make_bundle(), "--no-grpc") as (_, address), ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(2)]
        with socket.create_connection(address, timeout=30) as third:
            status, headers, answer = receive(third)
            assert (status, headers["retry-after"], answer["error"]["code"]) == (503, "1", "too_many_connections")
            assert third.recv(1) == b""
        held[0].close()
        start_s = time.monotonic()
        while ask_status(address) != 200:  # it takes the server a moment to see that
            assert time.monotonic() - start_s < 30
        held[1].sendall(request({"prompt": "1"}))
        assert receive(held[1])[0] == 200


def test_for_a_stream_that_is_not_read_no_more_is_made_than_it_can_take(serving: Serving) -> None:
    num, port = 600, free_port()
    small = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]  # what the client's side holds unread
    with (
        serving("--grpc-port", str(port), "--simulate", "0+0", "--max-waiting", "100000") as (_, address),
        grpc.insecure_channel(f"127.0.0.1:{port}", small) as channel,
    ):
        asked = service_pb2.ModelInferRequest(model_name="fashion-mnist-mm4")
        asked.parameters["n"].int64_param, asked.parameters["steps"].int64_param = 16, 1
        answers = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([asked] * num))
        next(answers)
        made, before = finished(address), -1
        while made > before:  # until it stands still
            time.sleep(1)
            before, made = made, finished(address)
        assert 0 < made < 0.8 * 16 * num
        assert not any(answer.error_message for answer in answers)
        assert finished(address) == 16 * num


def test_grpc_has_the_bounds_that_http_has(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    port = free_port()
    bounds = ("--set", "max_connections=2", "--set", "request_timeout_s=1")
    with serving(make_bundle(), "--grpc-port", str(port), *bounds) as _, ExitStack() as stack:
        where = f"127.0.0.1:{port}"
        alone = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        one, two, three = (stack.enter_context(grpc.insecure_channel(where, alone)) for _ in range(3))
        for channel in (one, two):
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == 1
        with pytest.raises(grpc.RpcError) as refused:
            health_pb2_grpc.HealthStub(three).Check(health_pb2.HealthCheckRequest())
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        watches = [health_pb2_grpc.HealthStub(one).Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        for watch in watches:
            assert next(watch).status == 1
        with pytest.raises(grpc.RpcError, match="Concurrent RPC limit exceeded") as refused:
            health_pb2_grpc.HealthStub(one).Check(health_pb2.HealthCheckRequest())
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        two.close()
        start_s = time.monotonic()
        silent: list[bytes] = []
        while not silent:  # until there is room for it
            assert time.monotonic() - start_s < 60
            with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
                while data := read(sock):
                    silent.append(data)  # gRPC greets, and later closes: nobody spoke


def read(sock: socket.socket) -> bytes:
    with suppress(ConnectionError):
        return sock.recv(1000)
    return b""


def ask_status(address: Address) -> int:
    with socket.create_connection(address, timeout=30) as sock, suppress(ConnectionError):
        sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        return receive(sock)[0]
    return 0
