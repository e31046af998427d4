"""Errors that nobody foresaw: one neutral line for the client, whatever it speaks, and all the rest in the log."""

import asyncio
import io
import json
import logging
import re
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import grpc
import httpx
import openai
import pytest
import uvicorn
from conftest import free_port
from fastapi.testclient import TestClient
from tritonclient.grpc import service_pb2, service_pb2_grpc

from fewstep.runtime import Sample
from fewstep.server import Service, Settings, create_app, images, kserve, kserve_grpc
from fewstep.server.connection import connection_to
from fewstep.server.gate import gated
from fewstep.server.kserve_grpc import GrpcServer
from fewstep.server.logs import TextFormatter

IMAGES = "/v1/images/generations"
SECRET = "secret of /etc/path"
FORGED = "2026-01-01 00:00:00,000 INFO fewstep.access: forged"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the server's own formatter writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger().handlers.insert(0, handler)  # before others: the first one formats a traceback for all
    yield stream
    logging.getLogger().removeHandler(handler)


@asynccontextmanager
async def running(service: Service) -> AsyncGenerator[tuple[str, str]]:
    """Both doors of a service, in this process: where they listen."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(gated(create_app(service), service), http=connection_to(service), log_config=None)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        door = GrpcServer(service, free_port())
        where = await door.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", where
        finally:
            await door.stop(1.0)
            server.should_exit = True
            await serving


def test_a_client_reads_one_neutral_line_and_the_log_has_the_traceback(
    make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, written: io.StringIO
) -> None:
    def broken(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"{SECRET}\n{FORGED}")

    for module, name in ((images, "request_of"), (kserve, "requests_of"), (kserve_grpc, "requests_of")):
        monkeypatch.setattr(module, name, broken)
    told: dict[str, Any] = {}

    async def main() -> None:
        async with (
            running(Service(Settings(bundles=(str(make_bundle()),), threads=1))) as (url, where),
            httpx.AsyncClient() as client,
            grpc.aio.insecure_channel(where) as channel,
        ):
            long = {"Origin": url}  # a header with which a request goes through the application
            for name, path, headers in (
                ("images", IMAGES, {}), ("images-long", IMAGES, long),
                ("infer", "/v2/models/digits/infer", {}), ("infer-long", "/v2/models/digits/infer", long),
            ):  # fmt: skip
                answer = await client.post(url + path, json={}, headers={"x-request-id": name, **headers})
                assert answer.status_code == 500
                error = answer.json()["error"]
                told[name] = error["message"] if "images" in name else error
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            request = service_pb2.ModelInferRequest(model_name="digits", id="mine")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(request, metadata=[("x-request-id", "grpc")])
            assert caught.value.code() == grpc.StatusCode.INTERNAL
            told["grpc"] = caught.value.details()
            stream = stub.ModelStreamInfer(metadata=[("x-request-id", "grpc-stream")])
            for _ in range(2):  # the stream goes on
                await stream.write(request)
                async with asyncio.timeout(30):
                    answer = await stream.read()
                told["grpc-stream"] = answer.error_message
                assert answer.infer_response.id == "mine"
            await stream.done_writing()

    asyncio.run(main())
    lines = written.getvalue().splitlines()
    for name, message in told.items():
        assert message == f"the server failed on this request; its log says why, at request_id={name}"
        assert any(line.startswith("ERROR ") and line.endswith(f" request_id={name}") for line in lines), name
    assert len(told) == 6
    assert sum(line == f"    RuntimeError: {SECRET}" for line in lines) == 7
    assert all(re.match("ERROR |    ", line) for line in lines if line)  # nothing that was raised looks like a record


def test_a_job_that_crashed_says_no_more_than_that(
    make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, written: io.StringIO
) -> None:
    def broken(*_: Any) -> NoReturn:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(images, "_answer", broken)
    service = Service(Settings(bundles=(str(make_bundle()),), threads=1))
    with TestClient(gated(create_app(service), service)) as client:
        job = client.put("/v1/jobs/mine", json={"prompt": "1"}, headers={"x-request-id": "a-job"}).json()
        start_s = time.monotonic()
        while job["status"] in ("queued", "running"):
            assert time.monotonic() - start_s < 60
            time.sleep(0.01)
            job = client.get(job["poll_url"]).json()
    assert (job["status"], job["error"]["message"]) == ("failed", "the job failed; the log says why")
    lines = written.getvalue().splitlines()
    assert lines[0] == "ERROR fewstep: job mine: an error that was not foreseen request_id=a-job"
    assert lines[-1] == f"    RuntimeError: {SECRET}"


def test_what_a_library_says_within_a_step_is_for_the_log(
    make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, written: io.StringIO
) -> None:
    def broken(*_: Any) -> NoReturn:
        raise RuntimeError(SECRET)

    service = Service(Settings(bundles=(str(make_bundle()),), threads=1))
    monkeypatch.setattr(service.engines["digits"], "_network", broken)
    told: dict[str, str] = {}

    async def main() -> None:
        async with (
            running(service) as (url, where),
            httpx.AsyncClient() as client,
            grpc.aio.insecure_channel(where) as channel,
        ):
            answer = await client.post(url + IMAGES, json={}, headers={"x-request-id": "images"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "sample_failed")
            told["images"] = answer.json()["error"]["message"]
            answer = await client.post(f"{url}/v2/models/digits/infer", json={}, headers={"x-request-id": "infer"})
            assert answer.status_code == 500
            told["infer"] = answer.json()["error"]
            job = await client.put(f"{url}/v1/jobs/mine", json={}, headers={"x-request-id": "job"})
            while "error" not in (said := job.json()):
                assert said["status"] in ("queued", "running")
                await asyncio.sleep(0.01)
                job = await client.get(url + said["poll_url"])
            told["job"] = said["error"]["message"]
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(
                    service_pb2.ModelInferRequest(model_name="digits"), metadata=[("x-request-id", "grpc")]
                )
            assert caught.value.code() == grpc.StatusCode.INTERNAL
            told["grpc"] = caught.value.details()

    asyncio.run(main())
    lines = written.getvalue().splitlines()
    assert len(told) == 4
    for name, message in told.items():
        assert message == f"the server failed on this request; its log says why, at request_id={name}"
        assert f"ERROR fewstep: digits: the step failed: {SECRET} request_id={name}" in lines


@pytest.mark.parametrize("what", ["network", "encoder"])
def test_a_stream_that_breaks_off_ends_with_an_error_that_stock_clients_raise(
    make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, written: io.StringIO, what: str
) -> None:
    """After previews: the network raises, or what writes the events crashes."""
    service = Service(Settings(bundles=(str(make_bundle()),), threads=1))
    engine = service.engines["digits"]
    network, told = engine._network, dict[str, str]()
    types: list[str] = []
    bodies: list[Any] = []

    def network_but_the_last_step(rows: int) -> Any:
        if engine._slots.left(0) == 1:
            raise RuntimeError(SECRET)
        return network(rows)

    def event_of_previews(event_of: Callable[..., bytes], *arguments: Any) -> bytes:
        if any(isinstance(argument, Sample) for argument in arguments):
            raise RuntimeError(SECRET)
        return event_of(*arguments)

    if what == "network":
        monkeypatch.setattr(engine, "_network", network_but_the_last_step)
    else:
        for module in (images, kserve):
            monkeypatch.setattr(module, "_event", partial(event_of_previews, module._event))

    async def main() -> None:
        async with (
            running(service) as (url, _),
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            httpx.AsyncClient() as plain,
        ):
            stream = await client.images.generate(
                prompt="3", stream=True, partial_images=3, extra_headers={"x-request-id": "openai"}
            )
            try:
                async for event in stream:
                    types.append(event.type)
            except openai.APIError as error:
                told["openai"] = error.message
                bodies.append(error.body)
            asked = {"label": 3, "preview_every": 1}
            answer = await plain.post(
                f"{url}/v2/models/digits/generate_stream", json=asked, headers={"x-request-id": "triton"}
            )
            assert answer.status_code == 200
            *before, last = answer.text.strip().split("\n\n")
            assert before
            told["triton"] = json.loads(last.removeprefix("data: "))["error"]

    asyncio.run(main())
    assert set(types) == {"image_generation.partial_image"}
    assert [body["code"] for body in bodies] == ["sample_failed" if what == "network" else "internal_error"]
    lines = written.getvalue().splitlines()
    assert set(told) == {"openai", "triton"}
    for name, message in told.items():
        assert message == f"the server failed on this request; its log says why, at request_id={name}"
        assert any(line.startswith("ERROR ") and line.endswith(f" request_id={name}") for line in lines)
    assert f"    RuntimeError: {SECRET}" in lines


def test_what_the_protocol_has_and_we_have_not_is_said_so(
    make_bundle: Callable[..., Path], written: io.StringIO
) -> None:
    async def main() -> None:
        service = Service(Settings(bundles=(str(make_bundle()),), threads=1))
        door = GrpcServer(service, free_port())
        async with grpc.aio.insecure_channel(await door.start()) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for method in ("TraceSetting", "LogSettings", "CudaSharedMemoryStatus", "SystemSharedMemoryStatus"):
                with pytest.raises(grpc.aio.AioRpcError, match=f"{method} is not served: ") as caught:
                    await getattr(stub, method)(getattr(service_pb2, f"{method}Request")())
                assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        await door.stop(1.0)
        service.encoders.stop()

    asyncio.run(main())
    assert written.getvalue() == ""
