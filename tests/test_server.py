"""The HTTP server as its users meet it: a process of its own, stock clients, bad input, and leaving in good order."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from conftest import exchange
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from fewstep.runtime import Bundle, Engine, Request

Address = tuple[str, int]
Serving = Callable[..., AbstractContextManager[tuple["subprocess.Popen[str]", Address]]]


@pytest.fixture(scope="module")
def address(serving: Serving, make_bundle: Callable[..., Path]) -> Iterator[Address]:
    """A server with two students, the first of them without guidance."""
    with serving(make_bundle(), make_bundle(is_guided=True)) as (_, address):
        yield address


def ask(address: Address, method: str, path: str, body: Any = None) -> tuple[int, Any, dict[str, str]]:
    status, content, headers = exchange(address, method, path, body)
    is_json = headers.get("content-type", "").startswith("application/json")
    return status, json.loads(content) if is_json and content else content.decode(), headers


def generate(address: Address, **body: Any) -> Any:
    status, answer, _ = ask(address, "POST", "/v1/images/generations", body)
    assert status == 200, answer
    return answer


def decode(image: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))


def metric(address: Address, name: str, **labels: str) -> float:
    _, text, _ = ask(address, "GET", "/metrics")
    values = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert values, name
    return sum(values)


# --- what is asked for is what comes


def test_an_image_is_the_one_the_engine_makes(address: Address, make_bundle: Callable[..., Path]) -> None:
    bundle = Bundle.load(make_bundle())
    (sample,) = Engine(bundle, threads=1).generate([Request(7, bundle.tableau("ddim", 3), 4)])
    answer = generate(address, prompt="digit 4", seed=7, solver="ddim", num_inference_steps=3)
    assert np.array_equal(decode(answer["data"][0]["b64_json"]), sample.to_uint8()[:, :, 0])
    assert (answer["solver"], answer["num_inference_steps"], answer["model"]) == ("ddim", 3, "digits")
    assert answer["data"][0]["seed"] == 7
    assert answer["size"] == "8x8"
    assert all(value >= 0 for value in answer["timings"].values())


def test_image_i_of_n_is_the_image_of_seed_plus_i(address: Address) -> None:
    several = generate(address, prompt="3", n=3, seed=40)["data"]
    single = [generate(address, prompt="3", seed=40 + i)["data"][0] for i in range(3)]
    assert several == single


def test_without_a_seed_images_differ_and_the_seed_is_told(address: Address) -> None:
    first, second = (generate(address, prompt="3")["data"][0] for _ in range(2))
    assert first["b64_json"] != second["b64_json"]
    assert generate(address, prompt="3", seed=first["seed"])["data"][0] == first


def test_guidance_changes_a_guided_student(address: Address) -> None:
    answers = [generate(address, model="digits-guided", prompt="3", seed=1, guidance_scale=g) for g in (1, 2, 4)]
    assert len({answer["data"][0]["b64_json"] for answer in answers}) == 3
    default = generate(address, model="digits-guided", prompt="3", seed=1)
    assert default["data"] == answers[1]["data"]
    assert default["guidance_scale"] == 2


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_every_format_decodes(address: Address, image_format: str) -> None:
    answer = generate(address, prompt="1", output_format=image_format, response_format="url")
    kind, _, data = answer["data"][0]["url"].partition(";base64,")
    assert kind == f"data:image/{image_format}"
    assert decode(data).shape[:2] == (8, 8)


def test_the_stock_openai_client_works_unchanged(address: Address) -> None:
    client = openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none")
    answer = client.images.generate(
        model="digits", prompt="digit 7", n=2, size="auto", response_format="b64_json", user="a", quality="auto",
        extra_body={"seed": 5, "num_inference_steps": 2},
    )  # fmt: skip
    assert answer.data is not None
    assert [decode(image.b64_json or "").shape for image in answer.data] == [(8, 8)] * 2
    assert (answer.model_extra or {})["num_inference_steps"] == 2
    assert [(image.model_extra or {})["seed"] for image in answer.data] == [5, 6]
    assert [model.id for model in client.models.list()] == ["digits", "digits-guided"]
    assert client.models.retrieve("digits").owned_by == "fewstep"
    with pytest.raises(openai.BadRequestError, match="prompt: 'digit 77' is no class of this student"):
        client.images.generate(model="digits", prompt="digit 77")
    with pytest.raises(openai.NotFoundError, match="model: 'dall-e-3' is not served"):
        client.images.generate(model="dall-e-3", prompt="digit 7")
    client.close()


def test_what_can_be_read_has_a_head(address: Address) -> None:
    for path in ("/", "/v2/health/live", "/v2/health/ready", "/metrics", "/v1/models", "/v2", "/v2/models/digits"):
        status, content, headers = ask(address, "HEAD", path)
        assert (status, content) == (200, ""), path
        assert int(headers["content-length"]) > 0
    assert ask(address, "HEAD", "/v1/models/nobody")[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/images/generations", "POST"),
        ("PATCH", "/v1/jobs/mine", "DELETE, GET, HEAD, PUT"),
        ("POST", "/v2/health/live", "GET, HEAD"),
        ("PUT", "/v2/models/digits/tables", "GET, HEAD, POST"),
    ],
)
def test_a_method_that_is_not_allowed_learns_which_are(address: Address, method: str, path: str, allowed: str) -> None:
    status, _, headers = ask(address, method, path)
    assert (status, headers["allow"]) == (405, allowed)


def test_models_say_what_a_request_may_ask_for(address: Address) -> None:
    _, answer, _ = ask(address, "GET", "/v1/models")
    first = answer["data"][0]
    assert first["labels"][3] == "digit 3"
    for table in first["tableaus"]:
        generate(address, prompt="0", solver=table["solver"], num_inference_steps=table["num_steps"])


def test_health_metrics_page_and_documentation_answer(address: Address) -> None:
    assert ask(address, "GET", "/v2/health/live")[:2] == (200, {"live": True})
    assert ask(address, "GET", "/v2/health/ready")[:2] == (200, {"ready": True})
    before = metric(address, "nv_inference_request_success", model="digits")
    generate(address, prompt="1", n=4)
    assert metric(address, "nv_inference_request_success", model="digits") == before + 4
    assert metric(address, "nv_inference_count") >= metric(address, "nv_inference_exec_count") > 0
    buckets = [
        metric(address, "fewstep_sample_duration_seconds_bucket", model="digits", le=le) for le in ("0.005", "+Inf")
    ]
    assert buckets[0] <= buckets[1] == metric(address, "nv_inference_request_success", model="digits")
    assert metric(address, "fewstep_sample_duration_seconds_count", model="digits") == buckets[1]
    total_us = metric(address, "nv_inference_request_duration_us", model="digits")
    assert metric(address, "fewstep_sample_duration_seconds_sum", model="digits") == pytest.approx(total_us / 1e6)
    assert metric(address, "nv_model_load_duration_secs", model="digits") > 0
    assert "<title>fewstep</title>" in ask(address, "GET", "/")[1]
    schema = ask(address, "GET", "/openapi.json")[1]
    body = schema["paths"]["/v1/images/generations"]["post"]["requestBody"]
    name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert "num_inference_steps" in schema["components"]["schemas"][name]["properties"]
    assert "GeneratedImage" in schema["components"]["schemas"]


# --- bad input


@pytest.mark.parametrize(
    ("body", "status", "field", "message"),
    [
        ({"prompt": "shoe"}, 400, "prompt", "prompt: 'shoe' is no class of this student; it has 0 to 9: digit 0"),
        ({"prompt": "10"}, 400, "prompt", "prompt: '10' is no class"),
        ({"prompt": "-1"}, 400, "prompt", "prompt: '-1' is no class"),
        ({"prompt": "1", "model": "x"}, 404, "model", "model: 'x' is not served; there is: digits, digits-guided"),
        ({"prompt": "1", "num_inference_steps": 5}, 400, "num_inference_steps", "no table for ancestral with 5 steps"),
        ({"prompt": "1", "num_inference_steps": 0}, 400, "num_inference_steps", "greater than or equal to 1"),
        ({"prompt": "1", "min_steps": 2}, 400, "min_steps", "min_steps: needs deadline_ms"),
        ({"prompt": "1", "max_steps": 0, "deadline_ms": 9}, 400, "max_steps", "greater than or equal to 1"),
        ({"prompt": "1", "min_steps": 9, "deadline_ms": 9}, 400, "min_steps", "ancestral with 9 to 8 steps; it has 1"),
        ({"prompt": "1", "min_steps": 1, "deadline_ms": 9, "solver": "x"}, 400, "solver", "digits has no table for x"),
        ({"prompt": "1", "num_inference_steps": 4, "solver": "x"}, 400, "solver", "solver: digits has no table for x"),
        (
            {"prompt": "1", "min_steps": 1, "deadline_ms": 9, "num_inference_steps": 4},
            400,
            "num_inference_steps",
            "num_inference_steps: leave it out where min_steps or max_steps is said",
        ),
        ({"prompt": "1", "solver": "magic"}, 400, "solver", "solver: digits has no table for magic"),
        ({"prompt": "1", "n": 0}, 400, "n", "n: input should be greater than or equal to 1, got 0"),
        ({"prompt": "1", "n": 65}, 400, "n", "n: at most 64 images in one request, got 65"),
        ({"prompt": "1", "n": "many"}, 400, "n", "n: input should be a valid integer"),
        ({"prompt": "1", "size": "512x512"}, 400, "size", "size: digits makes 8x8, got '512x512'"),
        ({"prompt": "1", "seed": -1}, 400, "seed", "seed: input should be greater than or equal to 0"),
        ({"prompt": "1", "seed": 2**64}, 400, "seed", "seed: "),
        ({"prompt": "1", "guidance_scale": 3}, 400, "guidance_scale", "takes 1 only: its guidance is fixed"),
        ({"prompt": "1", "sede": 3}, 400, "sede", "sede is not a field; did you mean seed?"),
        ({"prompt": "1", "response_format": "gif"}, 400, "response_format", "response_format: input should be"),
        ({"prompt": ["1"]}, 400, "prompt", "prompt: "),
        (b"{", 400, None, "the body is not JSON"),
        (b"", 400, None, "the body is not JSON"),
        (b"[1]", 400, None, "the body: input should be an object"),
        (b"\xff\xfe", 400, None, "the body is not JSON"),
        (b'{"prompt": "' + b"a" * (1 << 20) + b'"}', 413, None, "the body is larger than 1048576 bytes"),
        ({"prompt": "1", "model": "digits-guided", "guidance_scale": 9}, 400, "guidance_scale", "takes 1 to 5"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(
    address: Address, body: Any, status: int, field: str | None, message: str
) -> None:
    got, answer, _ = ask(address, "POST", "/v1/images/generations", body)
    assert got == status
    assert answer["error"]["param"] == field
    assert message in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    generate(address, prompt="1")  # and the server goes on


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/images/generations", 405),
        ("GET", "/v1/models/nobody", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/../../etc/passwd", 404),
    ],
)
def test_other_paths_answer_with_an_error_object(address: Address, method: str, path: str, status: int) -> None:
    got, answer, _ = ask(address, method, path)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_half_a_request_and_garbage_do_not_stop_the_server(address: Address) -> None:
    for data in (b"\x00" * 100, b"POST /v1/images/generations HTTP/1.1\r\nContent-Length: 50\r\n\r\n{"):
        with socket.create_connection(address) as raw:
            raw.sendall(data)
    generate(address, prompt="1")


# --- under load


@pytest.mark.parametrize("limit", ["max_waiting=4", "max_waiting_pixels=319"])  # of 64 pixels each
def test_a_full_queue_is_429_and_says_when_to_come_back(
    serving: Serving, make_bundle: Callable[..., Path], limit: str
) -> None:
    with serving(make_bundle(), "--set", limit, "--max-rows", "1", "--no-grpc") as (_, address):
        body = {"prompt": "1", "n": 4, "solver": "heun", "num_inference_steps": 7}
        answers: list[Any] = []

        def client() -> None:
            answers.append(ask(address, "POST", "/v1/images/generations", body))

        threads = [threading.Thread(target=client) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [(answer, headers) for status, answer, headers in answers if status == 429]
        assert {status for status, *_ in answers} == {200, 429}
        for answer, headers in refused:
            assert answer["error"]["code"] == "queue_full"
            assert int(headers["retry-after"]) >= 1
            assert float(headers["retry-after-ms"]) > 0
        assert metric(address, "nv_inference_request_failure", reason="REJECTED") == 4 * len(refused)
        assert metric(address, "nv_inference_request_success") == 4 * (12 - len(refused))
        status, answer, _ = ask(address, "POST", "/v1/images/generations", {"prompt": "1", "n": 5})
        assert (status, answer["error"]["message"]) == (400, "n: at most 4 images in one request, got 5")


def test_a_deadline_that_cannot_be_met_is_429_and_nobody_asks_again(address: Address) -> None:
    before = metric(address, "nv_inference_request_failure", reason="REJECTED")
    body = {"prompt": "1", "deadline_ms": 1e-3}
    status, answer, headers = ask(address, "POST", "/v1/images/generations", body)
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (429, "deadline_ms", "deadline_infeasible")
    assert "4 steps would take" in answer["error"]["message"]
    assert headers["x-should-retry"] == "false"
    assert answer["error"]["message"].endswith("since no wait will help")
    assert not headers.keys() & {"retry-after", "retry-after-ms"}
    with (
        openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none", max_retries=2) as client,
        pytest.raises(openai.RateLimitError, match="ms are not enough"),
    ):
        client.images.generate(prompt="1", extra_body={"deadline_ms": 1e-3})
    assert metric(address, "nv_inference_request_failure", reason="REJECTED") == before + 2


def test_a_deadline_chooses_the_steps(address: Address) -> None:
    """However busy the machine, a minute is enough for the most steps."""
    asked = {"prompt": "1", "seed": 3, "deadline_ms": 60_000}
    for bounds, steps in (({"max_steps": 4}, 4), ({"min_steps": 2}, 8), ({"min_steps": 2, "max_steps": 3}, 3)):
        answer = generate(address, **asked, **bounds)
        assert (answer["num_inference_steps"], answer["solver"]) == (steps, "ancestral")
        del answer["timings"], answer["created"]
        fixed = generate(address, prompt="1", seed=3, num_inference_steps=steps)
        assert fixed | answer == fixed
    assert generate(address, **asked, min_steps=1, solver="heun")["num_inference_steps"] == 7


def test_requests_of_a_client_that_goes_away_are_cancelled(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    with serving(make_bundle(), "--max-rows", "1") as (_, address):
        generate(address, prompt="1")
        body = json.dumps({"prompt": "1", "n": 64, "solver": "heun", "num_inference_steps": 7}).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        for _ in range(8):
            with socket.create_connection(address) as raw:
                raw.sendall(head + body)
                time.sleep(0.02)
        start_s = time.monotonic()
        while metric(address, "fewstep_running_rows") + metric(address, "nv_inference_pending_request_count"):
            assert time.monotonic() - start_s < 20
            time.sleep(0.01)
        assert metric(address, "nv_inference_request_failure", reason="CANCELED") > 0
        made = metric(address, "nv_inference_request_success")
        assert made + metric(address, "nv_inference_request_failure", reason="CANCELED") == 8 * 64 + 1


def test_mixed_requests_at_once_give_the_bits_of_each_alone(address: Address) -> None:
    rng = np.random.default_rng(0)
    _, models, _ = ask(address, "GET", "/v1/models")
    bodies = []
    for i in range(120):
        model = models["data"][int(rng.integers(2))]
        table = model["tableaus"][int(rng.integers(len(model["tableaus"])))]
        body = {"model": model["id"], "prompt": str(rng.integers(10)), "seed": i, "n": int(rng.integers(1, 4))}
        bodies.append(body | {"solver": table["solver"], "num_inference_steps": table["num_steps"]})
        if model["id"] == "digits-guided":
            bodies[-1]["guidance_scale"] = float(rng.integers(1, 5))
    alone = [generate(address, **body)["data"] for body in bodies]
    together: list[Any] = [None] * len(bodies)

    def client(first: int) -> None:
        for i in range(first, len(bodies), 24):
            together[i] = generate(address, **bodies[i])["data"]

    threads = [threading.Thread(target=client, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_sigterm_answers_what_was_accepted_and_exits_0(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    with serving(make_bundle(), "--max-rows", "2") as (process, address):
        generate(address, prompt="1")
        answers: list[Any] = []

        def client(seed: int) -> None:
            answers.append(ask(address, "POST", "/v1/images/generations", {"prompt": "2", "n": 40, "seed": seed}))

        threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        parts = ("nv_inference_pending_request_count", "fewstep_running_rows", "nv_inference_request_success")
        while sum(metric(address, part) for part in parts) < 1 + 8 * 40:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert [status for status, *_ in answers] == [200] * 8
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


# --- starting


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder"], "no/such/folder: no such folder, and no embedded bundle of that name"),
        (["--config", "missing.toml"], "missing.toml: cannot be read: No such file or directory"),
        (["--max-rows", "0"], "max_rows = 0: Input should be greater than or equal to 1"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "fewstep", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"fewstep: {message}")
    assert done.stderr.count("\n") == 1


def test_a_taken_port_is_named(make_bundle: Callable[..., Path], address: Address) -> None:
    command = [sys.executable, "-m", "fewstep", "serve", str(make_bundle()), "--port", str(address[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"fewstep: 127.0.0.1:{address[1]} cannot be listened on: Address already in use\n"


def test_settings_come_from_the_file_and_flags_win(
    serving: Serving, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "fewstep.toml"
    file.write_text(f'bundles = ["{make_bundle()}"]\nmax_images = 2\nmax_waiting = 1\n')
    with serving("--config", file, "--max-waiting", "64") as (_, address):
        generate(address, prompt="1", n=2)
        assert ask(address, "POST", "/v1/images/generations", {"prompt": "1", "n": 3})[0] == 400
    file.write_text("max_image = 2\n")
    command = [sys.executable, "-m", "fewstep", "serve", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr == "fewstep: max_image is not a setting; did you mean max_images?\n"


def test_the_first_image_of_a_cold_process_takes_at_most_three_seconds(
    serving: Serving, make_bundle: Callable[..., Path]
) -> None:
    before = os.times()
    with serving(make_bundle()) as (_, address):
        generate(address, prompt="1")
    after = os.times()
    used_s = after.children_user - before.children_user + after.children_system - before.children_system
    assert used_s < 3  # CPU time: what it takes on a machine that is not busy with something else
