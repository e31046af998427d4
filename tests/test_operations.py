"""Who may call, how often, under which name; certificates, settings and logs: against a running server."""

import http.client
import json
import queue
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from conftest import exchange, free_port
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from fewstep.server import Settings, SettingsError
from fewstep.server.keys import ApiKey, Bucket, Keys, hashed

Address = tuple[str, int]
Serving = Callable[..., AbstractContextManager[tuple["subprocess.Popen[str]", Address]]]
IMAGES = "/v1/images/generations"
CLI = [sys.executable, "-m", "fewstep"]


def ask(
    address: Address, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, dict[str, str]]:
    status, content, told = exchange(address, method, path, body, headers)
    is_json = told.get("content-type", "").startswith("application/json")
    return status, json.loads(content) if is_json else content, told


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --- keys


@pytest.fixture(scope="module")
def where(
    serving: Serving, make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Address, str]]:
    """A server with keys: ``open-sesame`` for users, ``root`` for admins, ``slow`` with 4 images and few after."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(
        f'[api_keys.alice]\nsha256 = "{hashed("open-sesame")}"\n'
        f'[api_keys.boss]\nsha256 = "{hashed("root")}"\nadmin = true\n'
        f'[api_keys.slow]\nsha256 = "{hashed("slow")}"\nimages_per_s = 0.01\nburst = 4\n'
    )
    port = free_port()
    with serving(make_bundle(), "--api-keys-file", file, "--grpc-port", str(port)) as (_, address):
        yield address, f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "missing_api_key"),
        (bearer(""), 401, "missing_api_key"),
        ({"Authorization": "Basic open-sesame"}, 401, "missing_api_key"),
        (bearer("open-sesam"), 401, "invalid_api_key"),
        (bearer(hashed("open-sesame")), 401, "invalid_api_key"),
        ({"X-API-Key": "\xff"}, 401, "invalid_api_key"),
        (bearer("open-sesame"), 200, None),
        ({"X-API-Key": "open-sesame"}, 200, None),
        ({"authorization": "bearer root"}, 200, None),
    ],
)
def test_only_callers_with_a_key_are_served(
    where: tuple[Address, str], headers: dict[str, str], status: int, code: str | None
) -> None:
    got, answer, told = ask(where[0], "POST", IMAGES, {"prompt": "1"}, headers)
    assert got == status
    if code:
        assert answer["error"]["code"] == code
        assert told["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("method", "path", "anybody", "user", "admin"),
    [
        ("GET", "/", 200, 200, 200),
        ("GET", "/v2/health/live", 200, 200, 200),
        ("GET", "/v2/health/ready", 200, 200, 200),
        ("GET", "/openapi.json", 200, 200, 200),
        ("GET", "/metrics", 401, 200, 200),
        ("GET", "/v1/models", 401, 200, 200),
        ("GET", "/v2/models/digits/tables", 401, 200, 200),
        ("POST", "/v2/models/digits/generate", 401, 200, 200),
        ("POST", "/v2/models/digits/versions/1/infer", 401, 200, 200),
        ("POST", "/v2/repository/index", 401, 200, 200),
        ("POST", "/v2/models/digits/tables", 401, 403, 400),
        ("POST", "/v2/models/digits/tables/", 401, 403, 307),
        ("DELETE", "/v2/models/digits/tables/ddim/4", 401, 403, 404),
        ("POST", "/v2/repository/models/digits/load", 401, 403, 200),
        ("POST", "/v2/repository/models/nobody/unload", 401, 403, 404),
        ("POST", "/v2/repository/models/../models/digits/load", 401, 403, 404),
        ("PUT", "/anything", 401, 403, 404),
    ],
)
def test_what_is_open_to_whom(
    where: tuple[Address, str], method: str, path: str, anybody: int, user: int, admin: int
) -> None:
    body = b"{}" if method == "POST" else None
    for headers, status in (({}, anybody), (bearer("open-sesame"), user), (bearer("root"), admin)):
        got, answer, _ = ask(where[0], method, path, body, headers)
        assert got == status, answer
        if status in (401, 403) and path.startswith("/v2"):
            assert isinstance(answer["error"], str)


def test_stock_clients_send_their_keys(where: tuple[Address, str]) -> None:
    (host, port), grpc_address = where
    with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="open-sesame") as client:
        assert client.images.generate(prompt="1").data
    with (
        openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError, match="this API key is not known here"),
    ):
        client.images.generate(prompt="1")
    with triton_http.InferenceServerClient(f"{host}:{port}") as client:
        client.infer("digits", [], headers=bearer("open-sesame"))
        with pytest.raises(InferenceServerException, match="an API key is needed") as caught:
            client.infer("digits", [])
        assert caught.value.status() == "401"
    with triton_grpc.InferenceServerClient(grpc_address) as client:
        assert client.is_server_live()
        client.infer("digits", [], headers={"authorization": "Bearer open-sesame"})
        for headers, status, message in (
            ({}, "UNAUTHENTICATED", "an API key is needed"),
            ({"x-api-key": "wrong"}, "UNAUTHENTICATED", "not known here"),
            ({"x-api-key": "open-sesame"}, "PERMISSION_DENIED", "the key alice may not do this"),
        ):
            with pytest.raises(InferenceServerException, match=message) as caught:
                client.load_model("digits", headers=headers)
            assert caught.value.status() == f"StatusCode.{status}"
        client.load_model("digits", headers={"x-api-key": "root"})


def test_streams_and_reflection_over_grpc_need_a_key_and_health_does_not(where: tuple[Address, str]) -> None:
    with triton_grpc.InferenceServerClient(where[1]) as client:
        seen: list[Any] = []
        client.start_stream(lambda result, error: seen.append(error), headers={"x-api-key": "wrong"})
        with suppress(InferenceServerException):  # the refusal may be faster than this
            client.async_stream_infer("digits", [])
        while not seen:
            time.sleep(0.01)
        client.stop_stream()
        assert "not known here" in str(seen[0])
    with grpc.insecure_channel(where[1]) as channel:
        assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == 1
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = [reflection_pb2.ServerReflectionRequest(list_services="")]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ServerReflectionInfo(iter(question)))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert list(stub.ServerReflectionInfo(iter(question), metadata=[("x-api-key", "open-sesame")]))


def test_a_rate_limit_counts_images_over_all_protocols(where: tuple[Address, str]) -> None:
    address, grpc_address = where
    assert ask(address, "POST", IMAGES, {"prompt": "1", "n": 2}, bearer("slow"))[0] == 200
    body = {"prompt": "1", "deadline_ms": 1e-3}
    assert ask(address, "POST", IMAGES, body, bearer("slow"))[1]["error"]["code"] == "deadline_infeasible"  # is free
    assert ask(address, "POST", "/v2/models/digits/generate", {}, bearer("slow"))[0] == 200
    with triton_grpc.InferenceServerClient(grpc_address) as client:
        client.infer("digits", [], headers={"x-api-key": "slow"})
        with pytest.raises(InferenceServerException, match="the rate limit of the key slow is reached") as caught:
            client.infer("digits", [], headers={"x-api-key": "slow"})
        assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    status, answer, headers = ask(address, "POST", IMAGES, {"prompt": "1"}, bearer("slow"))
    assert (status, answer["error"]["code"]) == (429, "rate_limited")
    assert 60 < int(headers["retry-after"]) <= 100
    assert ask(address, "POST", IMAGES, {"prompt": "1"}, bearer("open-sesame"))[0] == 200


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0, 2)), max_size=60))
def test_a_bucket_gives_no_more_than_its_rate_and_burst(asked: list[tuple[int, float]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        now_s = 50.0
        patch.setattr("fewstep.server.keys.time.monotonic", lambda: now_s)
        bucket, given_, over = Bucket(3.0, 10.0), 0, 0
        for num, pause_s in asked:
            now_s += pause_s
            wait_s = bucket.take(num)
            if not wait_s:
                given_ += num
                over = max(over, num - 10)
                assert given_ <= 10 + over + 3.0 * (now_s - 50.0) + 1e-6
            else:
                now_s += wait_s + 1e-9
                assert bucket.take(num) == 0.0  # the wait that was told is enough
                given_ += num
                over = max(over, num - 10)


def test_a_key_is_made_for_the_settings(tmp_path: Path) -> None:
    done = subprocess.run([*CLI, "key", "carol", "--admin"], capture_output=True, text=True, check=True)
    secret = done.stderr.split()[-1]
    file = tmp_path / "keys.toml"
    file.write_text(done.stdout)
    settings = Settings.load(None, {"api_keys_file": file})
    assert Keys(settings.api_keys).caller({"x-api-key": secret}, needs_admin=True).name == "carol"
    assert secret not in settings.to_toml()


def test_a_connection_in_use_is_kept_however_old(
    serving: Serving, make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is idle whenever one looks, and not one request takes long."""
    monkeypatch.setenv("FEWSTEP_REQUEST_TIMEOUT_S", "1.5")
    with serving(make_bundle(), "--no-grpc") as (_, address):
        connection = http.client.HTTPConnection(*address, timeout=60)
        connection.connect()
        port = connection.sock.getsockname()[1]
        start_s = time.monotonic()
        while time.monotonic() - start_s < 5:
            connection.request("GET", "/v2/health/live")
            assert connection.getresponse().read()
            time.sleep(0.05)
        assert connection.sock.getsockname()[1] == port
        connection.close()


def test_a_key_that_floods_the_line_keeps_nobody_out(
    serving: Serving, make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One caller asks for far more than the line holds; another is taken, and does not wait for all of that."""
    monkeypatch.setenv("FEWSTEP_API_KEYS", json.dumps({name: {"sha256": hashed(name)} for name in ("many", "few")}))
    flags = ("--simulate", "20+0", "--max-rows", "2", "--max-waiting", "64", "--no-grpc")
    with serving(make_bundle(), *flags) as (_, address):
        flood = {"prompt": "1", "n": 16, "num_inference_steps": 8}
        codes = [ask(address, "POST", "/v1/jobs", flood, bearer("many")) for _ in range(6)]
        refused = [answer["error"] for status, answer, _ in codes if status == 429]
        assert 2 <= len(refused) < 5
        assert "of 32 samples wait that the key many may have in line" in refused[0]["message"]
        status, answer, _ = ask(address, "POST", IMAGES, {"prompt": "1", "num_inference_steps": 8}, bearer("few"))
        assert status == 200
        # Two places of 8 steps of 20 ms: behind all of the flood it would wait for 16 rounds, and it waits for one.
        assert answer["timings"]["queue_ms"] < 8 * 160
        assert ask(address, "GET", "/metrics", None, bearer("few"))[0] == 200


# --- settings


def test_the_environment_wins_over_the_file_and_flags_over_both(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('port = 1\nmax_rows = 1\nmax_images = 1\nbundles = ["x"]\n')
    environment = {
        "FEWSTEP_CONFIG": str(file), "FEWSTEP_PORT": "2", "FEWSTEP_MAX_ROWS": "2", "FEWSTEP_ACCESS_LOG": "true",
        "FEWSTEP_CORS_ORIGINS": "https://a.example, https://b.example", "FEWSTEP_API_KEY": "s1",
        "FEWSTEP_ADMIN_KEY": "s2", "FEWSTEP_API_KEYS": json.dumps({"al": {"sha256": hashed("s3"), "weight": 2}}),
        "FEWSTEP_THREADS": "", "PATH": "/bin",
    }  # fmt: skip
    settings = Settings.load(None, {"port": 3, "host": None}, environment)
    assert (settings.port, settings.max_rows, settings.max_images, settings.bundles) == (3, 2, 1, ("x",))
    assert settings.access_log
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert settings.threads is None
    keys = Keys(settings.api_keys)
    names = {keys.caller({"x-api-key": f"s{i}"}, needs_admin=False).name for i in (1, 2, 3)}
    assert names == {"api_key", "admin_key", "al"}
    assert settings.api_keys["admin_key"].admin
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 4


def test_every_setting_can_be_said_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"max_images": "3", "cors-origins": "https://a.example, *", "aliases": '{"a": "b"}', "port": "1"}
    pairs = [f"{name}={value}" for name, value in said.items()]
    settings = Settings.load(None, {"port": 5}, {"FEWSTEP_MAX_IMAGES": "2", "FEWSTEP_MAX_STEPS": "7"}, pairs)
    assert (settings.max_images, settings.max_steps, settings.port) == (3, 7, 5)
    assert (settings.cors_origins, settings.aliases) == (("https://a.example", "*"), {"a": "b"})
    monkeypatch.setenv("FEWSTEP_MAX_IMAGES", "2")
    command = [*CLI, "serve", "--print-config", "--set", "max_images=9", "--set", "drain_timeout_s=0.5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "max_images = 9\n" in done.stdout
    assert "drain_timeout_s = 0.5\n" in done.stdout
    for wrong, message in (
        ("max_image=9", "--set max_image is not a setting; did you mean --set max_images?"),
        ("max_images", "--set max_images: must be NAME=VALUE, such as max_images=8"),
        ("max_images=many", "max_images = 'many': Input should be a valid integer"),
        ("aliases={", "--set aliases: must be JSON"),
    ):
        with pytest.raises(SettingsError) as caught:
            Settings.load(None, {}, None, [wrong])
        assert str(caught.value).startswith(message)


def test_what_is_printed_gives_the_same_settings_again(tmp_path: Path) -> None:
    keys = {'odd "name" ü': ApiKey(sha256=hashed("x"), images_per_s=0.5), "b": ApiKey(sha256=hashed("y"), admin=True)}
    for settings in (Settings(), Settings(api_keys=keys, tables_folder=tmp_path, cors_origins=("*",), port=0)):
        file = tmp_path / "again.toml"
        file.write_text(settings.to_toml(), "utf-8")
        assert Settings.load(file, {}) == settings


def test_print_config_prints_and_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_ADMIN_KEY", "very-secret")
    done = subprocess.run([*CLI, "serve", "--print-config", "--port", "7"], capture_output=True, text=True, check=True)
    assert "port = 7\n" in done.stdout
    assert hashed("very-secret") in done.stdout
    assert "very-secret" not in done.stdout


@pytest.mark.parametrize(
    ("environment", "text", "message"),
    [
        ({"FEWSTEP_PROT": "1"}, "", "FEWSTEP_PROT is not a setting; did you mean FEWSTEP_PORT?"),
        ({"FEWSTEP_PORT": "many"}, "", "port = 'many': Input should be a valid integer"),
        ({"FEWSTEP_API_KEYS": "{"}, "", "FEWSTEP_API_KEYS: must be JSON"),
        ({}, '[api_keys.a]\nsha256 = "12"\n', r"api_keys.a.sha256 = ...: String should match pattern"),
        ({}, f'[api_keys.a]\nsha = "{hashed("x")}"\n', r"api_keys.a.sha256 = ...: Field required"),
        (
            {}, f'[api_keys.a]\nsha256 = "{hashed("x")}"\nadmn = true\n',
            "api_keys.a.admn is not a setting; did you mean admin?",
        ),
        ({}, 'tls_certfile = "a.pem"\n', "tls_certfile and tls_keyfile belong together"),
        ({}, 'device = "gpu"\n', "device = 'gpu': Input should be 'cpu', 'cuda' or 'tensorrt'"),
        ({"FEWSTEP_SIMULATE": "40+1"}, 'precision = "int8-cpu"\n', "simulate runs no network"),
        ({}, 'log_format = "xml"\n', "log_format = 'xml': Input should be 'text' or 'json'"),
        ({"FEWSTEP_STUDENT_WEIGHTS": '{"a": 0}'}, "", "student_weights.a = 0: Input should be greater than 0"),
        ({}, "[student_weights]\na = nan\n", "student_weights.a = nan: Input should be a finite number"),
        ({}, "drain_timeout_s = inf\n", "drain_timeout_s = inf: Input should be a finite number"),
        ({"FEWSTEP_API_KEYS_FILE": "/no/such"}, "", "/no/such: cannot be read: No such file"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_named(
    environment: dict[str, str], text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        Settings.load(file, {}, environment)
    assert str(caught.value).startswith(message)


# --- TLS and CORS


def test_http_and_grpc_speak_tls(
    serving: Serving, make_bundle: Callable[..., Path], certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    port = free_port()
    flags = ("--tls-certfile", cert, "--tls-keyfile", key, "--grpc-port", str(port))
    with serving(make_bundle(), *flags) as (_, (host, http_port)):
        trust = ssl.create_default_context(cafile=str(cert))
        connection = http.client.HTTPSConnection(host, http_port, context=trust, timeout=60)
        connection.request("POST", IMAGES, json.dumps({"prompt": "1"}))
        assert connection.getresponse().status == 200
        connection.close()
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{port}", ssl=True, root_certificates=str(cert)) as client:
            assert client.infer("digits", []).as_numpy("IMAGE").shape == (1, 8, 8, 1)


def test_a_key_that_does_not_fit_its_certificate_is_said(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    for files, message in (
        ((certificate[0], certificate[0]), "tls_certfile, tls_keyfile: cannot be used together: "),
        ((tmp_path / "no.pem", certificate[1]), f"tls_certfile: there is no file {tmp_path / 'no.pem'}"),
    ):
        command = [*CLI, "serve", "--tls-certfile", str(files[0]), "--tls-keyfile", str(files[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert done.stderr.startswith(f"fewstep: {message}")


def test_pages_of_listed_origins_may_call(
    serving: Serving, make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_CORS_ORIGINS", "https://app.example")
    monkeypatch.setenv("FEWSTEP_API_KEY", "k")
    with serving(make_bundle(), "--no-grpc") as (_, address):
        wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        status, _, headers = ask(address, "OPTIONS", IMAGES, None, {"Origin": "https://app.example", **wish})
        assert (status, headers["access-control-allow-origin"]) == (200, "https://app.example")
        assert ask(address, "OPTIONS", IMAGES, None, {"Origin": "https://evil.example", **wish})[0] == 400
        for key, status in (("k", 200), ("wrong", 401)):
            origin = {"Origin": "https://app.example", **bearer(key)}
            got, _, headers = ask(address, "POST", IMAGES, {"prompt": "1"}, origin)
            assert (got, headers["access-control-allow-origin"]) == (status, "https://app.example")


@pytest.fixture(scope="module")
def open_address(serving: Serving, make_bundle: Callable[..., Path]) -> Iterator[Address]:
    """A server without keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CORS_ORIGINS", "https://app.example")
        with serving(make_bundle(), "--no-grpc") as (_, address):
            yield address


@pytest.mark.parametrize(
    ("headers", "is_welcome"),
    [
        ({}, True),  # no page
        ({"Origin": "http://HERE"}, True),
        ({"Origin": "https://HERE"}, True),  # something before the server speaks TLS
        ({"Origin": "https://app.example"}, True),
        ({"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"}, True),
        (
            {"Origin": "https://public.example", "Sec-Fetch-Site": "same-origin"},
            True,
        ),  # a proxy has another Host
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "http://HERE.evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://HERE", "Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
    ],
)
def test_pages_of_others_change_nothing_on_a_server_without_keys(
    open_address: Address, headers: dict[str, str], is_welcome: bool
) -> None:
    here = f"{open_address[0]}:{open_address[1]}"
    sent = {name: value.replace("HERE", here) for name, value in headers.items()}
    for method, path, body, status in (
        ("POST", "/v2/repository/models/nobody/unload", None, 404),
        ("POST", "/v2/models/digits/tables", b"none", 400),
        ("DELETE", "/v2/models/digits/tables/ddim/4", None, 404),
        ("PUT", "/v1/jobs/mine", {"steps": 1}, 400),
        ("POST", IMAGES, {"prompt": "1"}, 200),
        ("POST", "/v2/models/digits/infer", {}, 200),
    ):
        got, answer, _ = ask(open_address, method, path, body, sent)
        assert got == (status if is_welcome else 403), answer
        if not is_welcome:
            message = answer["error"] if path.startswith("/v2") else answer["error"]["message"]
            assert message.endswith("may not do this; a server lets them in by its setting cors_origins")
    assert ask(open_address, "GET", "/v2/health/ready", None, sent)[0] == 200  # the browser keeps what it is from them


# --- logs and ids


def test_each_request_is_one_line_of_json_with_its_id(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    port = free_port()
    flags = ("--access-log", "--log-format", "json", "--grpc-port", str(port))
    with serving(make_bundle(), *flags) as (process, address):
        _, _, headers = ask(address, "POST", IMAGES, {"prompt": "1"}, {"X-Request-Id": "mine-1"})
        assert headers["x-request-id"] == "mine-1"
        ids = [ask(address, "GET", "/v1/models/nobody")[2]["x-request-id"] for _ in range(2)]
        assert ids[0] != ids[1]
        forged = ask(address, "GET", "/", None, {"X-Request-Id": 'a b"'})[2]["x-request-id"]
        assert forged != 'a b"'
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            _, call = stub.Check.with_call(health_pb2.HealthCheckRequest(), metadata=[("x-request-id", "mine-2")])
            assert dict(call.trailing_metadata())["x-request-id"] == "mine-2"
        process.terminate()
        _, written = process.communicate(timeout=60)
    lines = [json.loads(line) for line in written.splitlines()]
    assert [line["request_id"] for line in lines] == ["mine-1", *ids, forged, "mine-2"]
    assert [(line["request"], line["status"]) for line in lines[:2]] == [
        (f"POST {IMAGES}", 200),
        ("GET /v1/models/nobody", 404),
    ]
    assert lines[-1]["status"] == "StatusCode.OK"
    assert all(line["ms"] > 0 and line["level"] == "info" and line["logger"] == "fewstep.access" for line in lines)


def test_text_logs_are_for_people_and_off_by_default(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    for flags, wanted in (((), ""), (("--access-log",), "GET /v2 200 ")):
        with serving(make_bundle(), "--no-grpc", *flags) as (process, address):
            ask(address, "GET", "/v2", None, {"X-Request-Id": "a1"})
            process.terminate()
            _, written = process.communicate(timeout=60)
        assert written.count("\n") == bool(wanted)
        assert wanted in written
        assert ("request_id=a1" in written) == bool(wanted)


def test_every_line_of_the_log_is_true(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    """A path cannot forge one, a call that was cut short is none that went well, and a failure names its request."""
    port = free_port()
    flags = ("--access-log", "--max-rows", "2", "--grpc-port", str(port))
    with serving(make_bundle(nan_label=3), *flags) as (process, address):
        forged = "/x%0a2026-01-01%2000:00:00,000%20INFO%20fewstep.access:%20forged%e2%80%a8"
        assert ask(address, "GET", forged)[0] == 404
        for path, body in ((IMAGES, {"prompt": "3"}), ("/v2/models/digits/generate_stream", {"text_input": "3"})):
            ask(address, "POST", path, body, {"X-Request-Id": f"nan{path}"})
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            request = service_pb2.ModelInferRequest(model_name="digits")
            request.parameters["label"].int64_param = 3
            with pytest.raises(grpc.RpcError, match="not finite"):
                stub.ModelInfer(request, metadata=[("x-request-id", "nan-grpc")])
            for name, value in (("label", 4), ("steps", 8), ("preview_every", 1)):  # long enough to be cut
                request.parameters[name].int64_param = value
            seeds = request.inputs.add(name="SEED", datatype="UINT64", shape=[64])
            seeds.contents.uint64_contents.extend(range(64))
            asked: queue.Queue[Any] = queue.Queue()
            asked.put(request)
            call = stub.ModelStreamInfer(iter(asked.get, None), metadata=[("x-request-id", "cut")])
            assert next(call).infer_response.model_name == "digits"
            call.cancel()
            asked.put(None)
            for _ in range(5):  # the server hears of the cancelled call before these, and before it is told to leave
                stub.ServerLive(service_pb2.ServerLiveRequest())
        process.terminate()
        _, written = process.communicate(timeout=60)
    lines = written.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|ERROR) fewstep", line) for line in lines)
    assert not any("INFO fewstep.access: forged" in line.partition("GET /x")[0] for line in lines)
    assert any(r"GET /x\n2026-01-01 00:00:00,000 INFO fewstep.access: forged\u2028 404 " in line for line in lines)
    for name in (f"nan{IMAGES}", "nan/v2/models/digits/generate_stream", "nan-grpc"):
        (line,) = [line for line in lines if " ERROR " in line and line.endswith(f" request_id={name}")]
        assert "digits: the sample is not finite" in line
    (cut,) = [line for line in lines if line.endswith(" request_id=cut")]
    assert "ModelStreamInfer StatusCode.CANCELLED " in cut
    (failed,) = [line for line in lines if "ModelInfer " in line]
    assert "StatusCode.INTERNAL" in failed
