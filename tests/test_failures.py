"""What goes wrong while serving is told to whoever asked for it, in one line, and to nobody else."""

import asyncio
import base64
import json
import re
import resource
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from conftest import ask, free_port
from tritonclient.grpc import service_pb2, service_pb2_grpc

import fewstep
from fewstep.client import FinishedImage, Preview
from fewstep.runtime.bundle import MANIFEST, NETWORK
from fewstep.runtime.schedules import karras
from fewstep.runtime.solvers import ddim

Serving = Callable[..., AbstractContextManager[tuple[Any, tuple[str, int]]]]
ROOT = Path(__file__).parents[1]


# --- a bundle that cannot be read


def spoil_network(folder: Path) -> None:
    (folder / NETWORK).write_bytes((folder / NETWORK).read_bytes()[:1000])


def spoil_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format": 1, "name": ')


def spoil_network_and_hash(folder: Path) -> None:
    """As one who replaces the network and writes its hash into the manifest."""
    from fewstep.runtime.bundle import write_manifest

    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["format"], manifest["files"]
    spoil_network(folder)
    write_manifest(folder, manifest)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_network, "model.onnx was altered"),
        (spoil_network_and_hash, "digits: "),
        (spoil_manifest, "bundle.json: "),
        (lambda folder: (folder / NETWORK).unlink(), "model.onnx"),
    ],
    ids=["truncated", "truncated and hashed", "no JSON", "missing"],
)
def test_a_bundle_that_cannot_be_read_is_refused_and_the_old_one_serves_on(
    spoiling: tuple[tuple[str, int], Path], make_bundle: Callable[..., Path], spoil: Any, message: str
) -> None:
    address, repository = spoiling
    shutil.rmtree(repository / "digits")
    shutil.copytree(make_bundle(), repository / "digits")
    before = ask(address, "POST", "/v1/images/generations", {"prompt": "3", "seed": 1})[1]["data"]
    spoil(repository / "digits")
    config = {"parameters": {"config": json.dumps({"bundle": "digits"})}}
    status, answer = ask(address, "POST", "/v2/repository/models/digits/load", config)
    assert status == 400
    assert message in answer["error"]
    assert "\n" not in answer["error"]
    assert "Traceback" not in answer["error"]
    assert ask(address, "POST", "/v1/images/generations", {"prompt": "3", "seed": 1})[1]["data"] == before
    assert ask(address, "GET", "/v2/health/ready")[0] == 200


@pytest.fixture(scope="module")
def spoiling(
    serving: Serving, make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[tuple[str, int], Path]]:
    repository = tmp_path_factory.mktemp("repository")
    (repository / "digits").mkdir()
    with serving(make_bundle(), "--repository", repository, "--no-grpc") as (_, address):
        yield address, repository


# --- a disk that is full


def test_a_server_on_a_full_disk_serves_loads_and_keeps_jobs(
    serving: Serving, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Serving writes no file: images, jobs, tables, another student and the log of it all need no byte of the disk."""
    shutil.copytree(make_bundle(), tmp_path / "digits")
    table = tmp_path / "t.safetensors"
    ddim(karras(6)).save(table)
    with serving(make_bundle(), "--repository", tmp_path, "--no-grpc", "--access-log") as (process, address):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))
        with fewstep.Client(f"http://{address[0]}:{address[1]}") as client:
            image = client.generate("3", seed=1).images[0].data
            assert client.wait(client.submit("3", seed=1), timeout_s=60).images[0].data == image
            assert client.load_table("digits", table).num_steps == 6
            assert client.generate("3", seed=1, solver="ddim", num_inference_steps=6).num_inference_steps == 6
            config = {"parameters": {"config": json.dumps({"bundle": "digits"})}}
            assert ask(address, "POST", "/v2/repository/models/digits/load", config)[0] == 200
            assert client.generate("3", seed=1).images[0].data == image
        process.send_signal(signal.SIGTERM)
        _, written = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in written


# --- one row that fails


def test_a_row_that_is_not_finite_fails_alone_on_every_unary_door(
    serving: Serving, make_bundle: Callable[..., Path]
) -> None:
    """Others that share its steps are answered with the bits they have alone; the one call is 500 and says why."""
    port = free_port()
    flags = ("--max-rows", "16", "--grpc-port", str(port))
    with serving(make_bundle(nan_label=3), *flags) as (_, address):
        path = "/v1/images/generations"
        alone = ask(address, "POST", path, {"prompt": "4", "seed": 1, "n": 2})[1]["data"]
        answers: list[tuple[int, Any]] = []

        def good() -> None:
            answers.append(ask(address, "POST", path, {"prompt": "4", "seed": 1, "n": 2}))

        threads = [threading.Thread(target=good) for _ in range(8)]
        for thread in threads:
            thread.start()
        status, failed = ask(address, "POST", path, {"prompt": "3", "n": 2})
        assert (status, failed["error"]["code"], failed["error"]["type"]) == (500, "sample_failed", "server_error")
        assert failed["error"]["message"] == "the sample is not finite: the network gave NaN or infinity"
        status, plain = ask(address, "POST", "/v2/models/digits/generate", {"label": 3})
        assert (status, plain) == (500, {"error": failed["error"]["message"]})
        mixed = {"inputs": [{"name": "LABEL", "datatype": "INT64", "shape": [2], "data": [4, 3]}]}
        assert ask(address, "POST", "/v2/models/digits/infer", mixed)[0] == 500  # a call is answered whole or not
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = service_pb2.ModelInferRequest(model_name="digits")
            request.parameters["label"].int64_param = 3
            with pytest.raises(grpc.RpcError, match="not finite") as error:
                service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
            assert error.value.code() is grpc.StatusCode.INTERNAL
        with (
            fewstep.Client(f"http://{address[0]}:{address[1]}") as client,
            pytest.raises(fewstep.ClientError, match=r"^job \S+ failed: the sample is not finite"),
        ):
            client.wait(client.submit("3"), timeout_s=60)
        for thread in threads:
            thread.join()
        assert [(status, answer["data"]) for status, answer in answers] == [(200, alone)] * 8


# --- leaving


def test_sigterm_finishes_the_streams_that_are_under_way_beside_a_job(
    serving: Serving, make_bundle: Callable[..., Path]
) -> None:
    """Each stream ends with its image, over both protocols; the job, which nobody could fetch, is let go in silence."""
    port = free_port()
    flags = ("--simulate", "100+0", "--max-rows", "4", "--grpc-port", str(port))

    async def watch(process: Any, url: str) -> tuple[list[Any], list[Any]]:
        async with fewstep.AsyncClient(url) as client, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            request = service_pb2.ModelInferRequest(model_name="digits")
            request.parameters["steps"].int64_param = 8
            request.parameters["preview_every"].int64_param = 1
            request.parameters["priority"].int64_param = 1
            await client.submit("3", n=24, num_inference_steps=8)
            stream = client.stream("3", partial_images=8, num_inference_steps=8, priority=100)
            answers = aiter(stub.ModelStreamInfer(iter([request])))
            events, responses = [await anext(stream)], [await anext(answers)]
            process.send_signal(signal.SIGTERM)
            events += [event async for event in stream]
            responses += [response async for response in answers]
        return events, responses

    with serving(make_bundle(), *flags) as (process, address):
        events, responses = asyncio.run(watch(process, f"http://{address[0]}:{address[1]}"))
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""
    assert [type(event) for event in events] == [Preview] * 7 + [FinishedImage]
    assert not any(response.error_message for response in responses)
    assert responses[-1].infer_response.parameters["triton_final_response"].bool_param


# --- clients as people have them


def test_openais_client_asks_again_by_itself_when_the_line_was_full(
    serving: Serving, make_bundle: Callable[..., Path]
) -> None:
    """It waits for as long as Retry-After says, and then there is room."""
    with serving(make_bundle(), "--simulate", "40+0", "--max-rows", "1", "--max-waiting", "8", "--no-grpc") as (
        _,
        address,
    ):
        url = f"http://{address[0]}:{address[1]}"
        with fewstep.Client(url) as ours, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=10) as client:
            ours.generate("3")  # its pace is known from now on
            job = ours.submit("3", n=8, num_inference_steps=8)  # of 6.4 s
            while ours.job(job).status == "queued":
                time.sleep(0.005)
            ours.submit("3", num_inference_steps=1)
            with pytest.raises(fewstep.ClientError) as refused:
                ours.generate("3", n=8)
            assert (refused.value.status, refused.value.code) == (429, "queue_full")
            raw = client.images.with_raw_response.generate(prompt="3", n=8, extra_body={"num_inference_steps": 1})
            assert raw.retries_taken >= 1
            assert len(raw.parse().data or []) == 8


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_the_curl_command_of_the_readme_works(serving: Serving, tmp_path: Path) -> None:
    command = re.search(r"^curl -s localhost:8000/.*$", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert command is not None
    with serving("fashion-mnist-mm4", "--no-grpc") as (_, address):
        line = command[0].replace("localhost:8000", f"{address[0]}:{address[1]}")
        done = subprocess.run(shlex.split(line), capture_output=True, check=True, timeout=60)
    (image,) = json.loads(done.stdout)["data"]
    assert image["seed"] == 7
    assert base64.b64decode(image["b64_json"]).startswith(b"\x89PNG")
