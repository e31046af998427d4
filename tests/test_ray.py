"""Replicas on Ray Serve: a real Ray on this machine, with several replicas, one of which is killed under load."""

import base64
import http.client
import inspect
import io
import json
import logging
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from fewstep.cli import ray_serve
from fewstep.deploy.triton_server import free_ports
from fewstep.runtime import Bundle, Engine, Request
from fewstep.runtime.simulated import simulated

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, when it is imported
    import ray
    from ray import serve
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from fewstep.deploy.ray_app import HEADER, NAME, Arguments, app

# Ray's own threads and sockets end when they like.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
Address = tuple[str, int]
IMAGES = "/v1/images/generations"
SLOTS = 4  # of a replica
STEP_MS = 20
HELD = 3 * SLOTS  # requests that Ray gives to a replica at once
LINE = 32  # that wait at the proxy
OTHERS = ("one", "two", "three", "four")  # in the repository; a replica has two of them at once


@pytest.fixture(scope="module")
def address(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """The command: two replicas, three at most, on simulated accelerators, so load does not depend on this machine."""
    config = tmp_path_factory.mktemp("ray") / "server.toml"
    repository = config.parent / "students"
    for name in OTHERS:
        shutil.copytree(make_bundle(), repository / name)
        manifest = json.loads((repository / name / "bundle.json").read_text())
        (repository / name / "bundle.json").write_text(json.dumps({**manifest, "name": name}))
    config.write_text(f'simulate = "{STEP_MS}+0"\nmax_rows = {SLOTS}\nrepository = "{repository}"\n')
    host, port = "127.0.0.1", free_ports(1)[0]
    command = [sys.executable, "-m", "fewstep", "ray", str(make_bundle()), "--config", str(config)]
    command += ["--host", host, "--port", str(port), "--cpus", "0.1", "--min-replicas", "2", "--max-replicas", "3"]
    command += ["--max-queued", str(LINE), "--up-s", "1", "--down-s", "2", "--students", "2"]
    log = config.with_name("log")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: " at http://" in log.read_text() or process.poll() is not None, 300)
        assert process.poll() is None, log.read_text()
        ray.init("auto", namespace="serve", logging_level=logging.WARNING, log_to_driver=False)
        yield host, port
    finally:
        ray.shutdown()
        process.terminate()
        assert process.wait(120) == 0


def ask(address: Address, student: str | None = None, **body: Any) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection(*address, timeout=60)
    headers = {"serve_multiplexed_model_id": student} if student else {}
    connection.request("POST", IMAGES, json.dumps({"prompt": "digit 3", **body}), headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    try:
        content = json.loads(text)
    except ValueError:
        content = text
    return answer.status, content, {name.lower(): value for name, value in answer.getheaders()}


def replicas() -> list[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["name"].startswith(f"SERVE_REPLICA::{NAME}#")]


def num_running() -> int:
    states: Any = serve.status().applications[NAME].deployments[NAME].replica_states
    return int(states.get("RUNNING", 0))


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    end_s = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.2)


def test_replicas_answer_with_the_engines_pixels(address: Address, make_bundle: Callable[..., Path]) -> None:
    bundle = Bundle.load(make_bundle())
    engine = Engine(bundle, backend=simulated("0+0"))
    asked = [("ddim", 4, 7), ("ancestral", 3, 8), ("heun", 3, 9), ("dpmpp_2m", 8, 10)] * 4
    requests = [Request(seed, bundle.tableau(solver, steps), 3) for solver, steps, seed in asked]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda a: ask(address, solver=a[0], num_inference_steps=a[1], seed=a[2]), asked))
    assert [status for status, *_ in answers] == [200] * len(asked)
    for (_, body, _), sample in zip(answers, engine.generate(requests), strict=True):
        picture = np.array(Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"]))))
        assert np.array_equal(picture, sample.to_uint8()[:, :, 0])


def test_previews_pass_through_as_they_come(address: Address) -> None:
    client = openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none", max_retries=0)
    with client:
        begin_s = time.monotonic()
        came = []
        stream: Any = client.images.generate(
            prompt="digit 3", stream=True, partial_images=3, extra_body={"num_inference_steps": 8}
        )
        came = [(event.type, time.monotonic() - begin_s) for event in stream]
    assert [kind for kind, _ in came] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert came[-1][1] - came[0][1] > 2 * STEP_MS / 1000  # not all at the end


def test_students_of_the_repository_are_loaded_as_they_are_asked_for_and_let_go_when_nobody_is_on_them(
    address: Address, make_bundle: Callable[..., Path]
) -> None:
    """Four students over replicas of two each, with eight steps of a request under way when a student has to go."""
    (status, refused, _) = ask(address, "five")
    assert (status, refused["error"]["code"]) == (404, "model_not_found")
    bundle = Bundle.load(make_bundle())
    engine = Engine(bundle, backend=simulated("0+0"))
    samples = engine.generate([Request(i, bundle.tableau("ddim", 8), 3) for i in range(32)])
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda i: ask(address, OTHERS[i // 2 % 4], solver="ddim", num_inference_steps=8, seed=i), range(32)
            )
        )
    assert [status for status, *_ in answers] == [200] * 32
    for i, (_, body, _) in enumerate(answers):
        assert body["model"] == OTHERS[i // 2 % 4]
        picture = np.array(Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"]))))
        assert np.array_equal(picture, samples[i].to_uint8()[:, :, 0])
    for _ in range(8):  # whichever replica answers
        connection = http.client.HTTPConnection(*address, timeout=60)
        connection.request("GET", "/v1/models")
        served = {one["id"] for one in json.load(connection.getresponse())["data"]}
        connection.close()
        assert served >= {"digits"}
        assert 1 <= len(served & set(OTHERS)) <= 2
    assert ask(address, "digits")[1]["model"] == ask(address)[1]["model"] == "digits"


def test_what_is_too_much_is_429_with_when_to_come_back(address: Address) -> None:
    """Three replicas hold 12 requests each and the line 32: of a hundred clients that do not rest some are refused."""
    end_s = time.monotonic() + 40
    refused: list[int] = []  # seconds after which to come back

    def load(i: int) -> Counter[int]:
        counted = Counter[int]()
        while not refused and time.monotonic() < end_s:
            status, _, headers = ask(address, seed=i, n=12, num_inference_steps=8)
            counted[status] += 1
            if status == 429:
                refused.append(int(headers["retry-after"]))
        return counted

    with ThreadPoolExecutor(100) as pool:
        statuses = sum(pool.map(load, range(100)), Counter[int]())
    assert set(statuses) == {200, 429}, statuses
    assert min(refused) >= 1


def test_a_replica_that_is_killed_under_load_loses_only_what_it_held(address: Address) -> None:
    """With two or three times as many under way. OpenAI's client, which asks again by itself, loses nothing."""
    wait_until(lambda: num_running() >= 2)
    client = openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none", max_retries=6)
    answered = Counter[str]()  # by replica
    last = ""
    is_over = threading.Event()

    def plainly(i: int) -> Counter[int]:
        nonlocal last
        statuses = Counter[int]()
        while not is_over.is_set():
            status, _, headers = ask(address, seed=i, num_inference_steps=8)
            statuses[status] += 1
            if status == 200:
                last = headers[HEADER]
                answered[last] += 1
            else:
                time.sleep(0.2)
        return statuses

    def by_openai(i: int) -> int:
        made = 0
        while not is_over.is_set():
            image = client.images.generate(prompt="digit 3", extra_body={"seed": i, "num_inference_steps": 8})
            made += bool(image.data and image.data[0].b64_json)
        return made

    with client, ThreadPoolExecutor(3 * HELD) as pool:
        plain = [pool.submit(plainly, i) for i in range(3 * HELD - 4)]
        patient = [pool.submit(by_openai, i) for i in range(4)]
        try:
            wait_until(lambda: sum(number > HELD for number in answered.values()) >= 2)  # so both are full
            victim = last  # it answered just now, and has had more to do ever since
            ray.kill(ray.get_actor(f"SERVE_REPLICA::{NAME}#{NAME}#{victim}", namespace="serve"))
            time.sleep(0.5)
            begin = Counter(answered)
            wait_until(lambda: sum((answered - begin).values()) > 6 * HELD)
            assert victim not in answered - begin
            wait_until(lambda: num_running() >= 2 and not any(name.endswith(victim) for name in replicas()))
        finally:
            is_over.set()
        statuses = sum((one.result(60) for one in plain), Counter[int]())
        assert all(one.result(60) for one in patient)
    assert set(statuses) <= {200, 408, 429, 500, 503}  # 408: another replica got it, without the body
    lost = statuses[408] + statuses[500] + statuses[503]
    assert 1 <= lost <= HELD, statuses  # what was under way there; the others had at least as much under way
    assert ask(address, seed=1)[0] == 200


def test_replicas_come_and_go_under_load_without_errors(address: Address) -> None:
    wait_until(lambda: num_running() == 2)
    seen, statuses, end_s = 2, Counter[int](), time.monotonic() + 40

    def load(i: int) -> Counter[int]:
        counted = Counter[int]()
        while seen < 3 and time.monotonic() < end_s:
            counted[ask(address, seed=i, num_inference_steps=8)[0]] += 1
        return counted

    with ThreadPoolExecutor(16) as pool:
        running = [pool.submit(load, i) for i in range(16)]
        while seen < 3 and time.monotonic() < end_s:
            time.sleep(0.2)
            seen = max(seen, num_running())
        for one in running:
            statuses += one.result(60)
    assert seen == 3
    light = Counter[int]()
    while num_running() > 2:  # with somebody asking all the while
        light[ask(address, seed=1, num_inference_steps=8)[0]] += 1
        assert time.monotonic() < end_s + 60
    assert set(statuses | light) == {200}


def test_the_application_is_told_by_rays_command_in_words(make_bundle: Callable[..., Path]) -> None:
    """As ``serve run fewstep.deploy.ray_app:app bundles=...`` does it."""
    words = {"bundles": str(make_bundle()), "min_replicas": "2", "num_cpus": "0.5", "up_s": "1.5"}
    build: Any = call_user_app_builder_with_args_if_necessary
    application = build(app, words)
    deployment = application._bound_deployment
    assert deployment.name == NAME
    assert deployment.ray_actor_options["num_cpus"] == 0.5
    scaling = deployment._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas, scaling.upscale_delay_s) == (2, 4, 1.5)
    with pytest.raises(ValueError, match="min_replica\n"):
        build(app, {"min_replica": "2"})


def test_each_argument_of_the_application_is_a_flag_of_the_command() -> None:
    flags = set(inspect.signature(ray_serve).parameters)
    assert {name.removeprefix("num_") for name in Arguments.model_fields} == flags - {"host", "port"}


def test_the_command_refuses_what_it_cannot_serve(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text("max_rows = 0\n")
    command = [sys.executable, "-m", "fewstep", "ray", "--config", str(tmp_path / "server.toml")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("fewstep: max_rows")
    assert done.stdout.count("\n") == 1
