"""Jobs, aliases and spans: what is asked for now and fetched later, under which name, and where its time went."""

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from conftest import ask, free_port
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tritonclient.grpc import service_pb2, service_pb2_grpc

from fewstep.server import Service, Settings, SettingsError
from fewstep.server.app import create_app
from fewstep.server.gate import gated
from fewstep.server.keys import hashed
from fewstep.server.kserve_grpc import GrpcServer
from fewstep.server.traces import Traces

Address = tuple[str, int]
Serving = Callable[..., AbstractContextManager[tuple[Any, Address]]]
IMAGES = "/v1/images/generations"


@pytest.fixture(scope="module")
def address(serving: Serving, make_bundle: Callable[..., Path]) -> Iterator[Address]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_MAX_JOBS", "6")
        patch.setenv("FEWSTEP_ALIASES", json.dumps({"stable": "digits", "split": {"digits": 3, "digits-guided": 1}}))
        with serving(make_bundle(), make_bundle(is_guided=True), "--max-rows", "1", "--no-grpc") as (_, address):
            yield address


def finished(address: Address, job: str) -> Any:
    start_s = time.monotonic()
    while (found := ask(address, "GET", f"/v1/jobs/{job}")[1])["status"] in ("queued", "running"):
        assert time.monotonic() - start_s < 60
        time.sleep(0.01)
    return found


# --- jobs


def test_a_job_gives_what_the_image_route_gives(address: Address) -> None:
    body = {"prompt": "digit 4", "seed": 7, "n": 2}
    status, job = ask(address, "POST", "/v1/jobs", body)
    assert (status, job["object"]) == (202, "job")
    assert job["poll_url"] == f"/v1/jobs/{job['id']}"
    found = finished(address, job["id"])
    assert found["status"] == "completed"
    assert found["result"]["data"] == ask(address, "POST", IMAGES, body)[1]["data"]
    assert found["ended"] >= found["created"]
    assert ask(address, "POST", f"/v1/jobs/{job['id']}/cancel")[0] == 409
    listed = ask(address, "GET", "/v1/jobs")[1]["data"]
    assert job["id"] in [one["id"] for one in listed]
    assert all("result" not in one for one in listed)


def test_a_name_makes_asking_twice_the_same_as_once(address: Address) -> None:
    body = {"prompt": "1", "n": 3}
    first, again = (ask(address, "PUT", "/v1/jobs/my-job.1", body) for _ in range(2))
    assert (first[0], again[0]) == (202, 200)
    made = finished(address, "my-job.1")["result"]
    assert ask(address, "PUT", "/v1/jobs/my-job.1", body)[1]["result"] == made
    status, answer = ask(address, "PUT", "/v1/jobs/my-job.1", {"prompt": "2"})
    assert (status, answer["error"]["code"]) == (409, "job_exists")
    assert ask(address, "PUT", "/v1/jobs/" + "a" * 65, body)[1]["error"]["param"] == "id"


def test_a_job_in_line_knows_its_place_and_can_be_cancelled(address: Address) -> None:
    slow = {"prompt": "1", "n": 64, "solver": "heun", "num_inference_steps": 7}
    jobs = [ask(address, "POST", "/v1/jobs", slow)[1] for _ in range(4)]
    assert [job["status"] for job in jobs[1:]] == ["queued"] * 3
    places = [ask(address, "GET", f"/v1/jobs/{job['id']}")[1]["queue_position"] for job in jobs[1:]]
    assert places == sorted(places)
    assert 50 <= places[2] - places[1] <= 64  # it moves on meanwhile
    for job, (method, path) in zip(jobs, [("POST", "/cancel"), ("DELETE", "")] * 2, strict=True):
        status, over = ask(address, method, f"/v1/jobs/{job['id']}{path}")
        assert (status, over["status"]) == (200, "cancelled")
    start_s = time.monotonic()
    assert ask(address, "POST", IMAGES, {"prompt": "1"})[0] == 200  # the line is free again
    assert time.monotonic() - start_s < 10


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": "shoe"}, 400, "prompt: 'shoe' is no class"),
        ({"prompt": "1", "stream": True}, 400, "stream: a job is not streamed"),
        ({"prompt": "1", "num_inference_steps": 5}, 400, "num_inference_steps: digits has no table"),
        ({"prompt": "1", "deadline_ms": 1e-3}, 429, "deadline_ms: "),
        ([], 400, "the body: "),
    ],
)
def test_what_is_refused_is_refused_at_once(address: Address, body: Any, status: int, message: str) -> None:
    before = len(ask(address, "GET", "/v1/jobs")[1]["data"])
    got, answer = ask(address, "POST", "/v1/jobs", body)
    assert got == status
    assert answer["error"]["message"].startswith(message)
    assert len(ask(address, "GET", "/v1/jobs")[1]["data"]) == before


def test_old_jobs_make_room_and_running_ones_do_not(address: Address) -> None:
    slow = {"prompt": "1", "n": 64, "solver": "heun", "num_inference_steps": 7}
    jobs = [ask(address, "POST", "/v1/jobs", slow)[1]["id"] for _ in range(6)]
    status, answer = ask(address, "POST", "/v1/jobs", slow)
    assert (status, answer["error"]["message"]) == (429, "6 jobs are under way; try again in 1 s")
    for job in jobs:
        ask(address, "DELETE", f"/v1/jobs/{job}")
    assert ask(address, "POST", "/v1/jobs", {"prompt": "1"})[0] == 202
    assert ask(address, "GET", f"/v1/jobs/{jobs[0]}")[1]["error"]["code"] == "job_not_found"


def test_jobs_belong_to_their_caller_and_end_with_their_time(make_bundle: Callable[..., Path]) -> None:
    keys = {name: {"sha256": hashed(name)} for name in ("ann", "bob")}
    settings = Settings.load(None, {"bundles": (str(make_bundle()),), "api_keys": keys, "threads": 1, "job_ttl_s": 0.5})
    service = Service(settings)
    with TestClient(gated(create_app(service), service)) as client:
        ann, bob = ({"X-API-Key": name} for name in ("ann", "bob"))
        assert client.put("/v1/jobs/same", json={"prompt": "1"}, headers=ann).status_code == 202
        assert client.get("/v1/jobs/same", headers=bob).status_code == 404
        assert client.delete("/v1/jobs/same", headers=bob).status_code == 404
        assert client.put("/v1/jobs/same", json={"prompt": "2"}, headers=bob).status_code == 202
        while client.get("/v1/jobs/same", headers=ann).status_code == 200:
            time.sleep(0.02)
        assert client.get("/v1/jobs", headers=ann).json()["data"] == []


def test_no_caller_pushes_out_the_jobs_of_another(make_bundle: Callable[..., Path]) -> None:
    """Neither by their number nor by the size of their results; one's own oldest go."""
    keys = {name: {"sha256": hashed(name)} for name in ("ann", "bob")}
    said = {"bundles": (str(make_bundle()),), "api_keys": keys, "threads": 1, "max_jobs": 4, "max_job_bytes": 3000}
    service = Service(Settings.load(None, said))
    with TestClient(gated(create_app(service), service)) as client:
        ann, bob = ({"X-API-Key": name} for name in ("ann", "bob"))

        def put(name: str, caller: dict[str, str], num: int) -> None:
            answer = client.put(f"/v1/jobs/{name}", json={"prompt": "1", "n": num}, headers=caller)
            assert answer.status_code == 202
            while client.get(f"/v1/jobs/{name}", headers=caller).json()["status"] != "completed":
                time.sleep(0.01)

        put("hers", ann, 1)
        for i in range(6):
            put(f"small-{i}", bob, 1)
        kept = [job["id"] for job in client.get("/v1/jobs", headers=bob).json()["data"]]
        assert kept == [f"small-{i}" for i in range(2, 6)]
        put("large", bob, 32)  # and this alone is more than 3000 bytes
        assert [job["id"] for job in client.get("/v1/jobs", headers=bob).json()["data"]] == ["large"]
        assert len(client.get("/v1/jobs/large", headers=bob).json()["result"]["data"]) == 32
        assert client.get("/v1/jobs/hers", headers=ann).status_code == 200


def test_the_places_of_all_jobs_are_told_at_once(address: Address) -> None:
    slow = {"prompt": "1", "n": 32, "solver": "heun", "num_inference_steps": 7}
    jobs = [ask(address, "POST", "/v1/jobs", slow)[1]["id"] for _ in range(3)]
    listed = {job["id"]: job for job in ask(address, "GET", "/v1/jobs")[1]["data"]}
    places = [listed[job]["queue_position"] for job in jobs[1:]]
    assert [listed[job]["status"] for job in jobs[1:]] == ["queued"] * 2
    assert places[1] - places[0] == 32
    for job in jobs:
        ask(address, "DELETE", f"/v1/jobs/{job}")


# --- aliases


def test_an_alias_is_its_student(address: Address) -> None:
    with openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none") as client:
        answer = client.images.generate(model="stable", prompt="1", extra_body={"seed": 1})
        assert (answer.model_extra or {})["model"] == "digits"
        assert [model.id for model in client.models.list()] == ["digits", "digits-guided", "stable", "split"]
        assert (client.models.retrieve("split").model_extra or {})["alias_of"] == {"digits": 3, "digits-guided": 1}


def test_a_canary_gets_its_part(address: Address) -> None:
    taken = Counter(ask(address, "POST", IMAGES, {"model": "split", "prompt": "1"})[1]["model"] for _ in range(160))
    assert 15 <= taken["digits-guided"] <= 70  # 40 expected, standard deviation 5.5
    assert taken.total() == 160


def test_aliases_are_changed_through_the_repository(address: Address) -> None:
    with triton_http.InferenceServerClient(f"{address[0]}:{address[1]}") as client:
        client.load_model("blue", config=json.dumps({"alias": {"digits": 1, "digits-guided": 0}}))
        assert {client.infer("blue", []).get_response()["model_name"] for _ in range(8)} == {"digits"}
        client.load_model("blue", config=json.dumps({"alias": "digits-guided"}))
        assert client.infer("blue", []).get_response()["model_name"] == "digits-guided"
        index = {one["name"]: one["reason"] for one in client.get_model_repository_index()}
        assert index["blue"] == "alias of digits-guided"
        for alias, message in (
            ({"nobody": 1}, "nobody is not served"),
            ({}, "a student, or students with the parts"),
            ({"digits": -1}, "a number from 0 on"),
            ({"digits": "x"}, "a number from 0 on"),
            ({"digits": 0}, "must be above 0"),
            ([1], "a student, or students with the parts"),
        ):
            with pytest.raises(triton_http.InferenceServerException, match=message):
                client.load_model("blue", config=json.dumps({"alias": alias}))
        with pytest.raises(triton_http.InferenceServerException, match="a student is called that"):
            client.load_model("digits", config=json.dumps({"alias": "digits-guided"}))
        assert client.infer("blue", []).get_response()["model_name"] == "digits-guided"
        client.unload_model("blue")
        with pytest.raises(triton_http.InferenceServerException, match="'blue' is not served"):
            client.infer("blue", [])


def test_an_alias_whose_students_are_gone_is_not_ready_and_not_offered(
    serving: Serving, make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEWSTEP_ALIASES", raising=False)
    port = free_port()
    with serving(make_bundle(), "--grpc-port", str(port)) as (_, address):
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
            client.load_model("blue", config=json.dumps({"alias": "digits"}))
            assert client.is_model_ready("blue")
            assert client.is_model_ready("blue", "1")
            assert not client.is_model_ready("digits", "2")
            client.unload_model("digits")
            assert not client.is_model_ready("blue")
            assert {model.name: model.state for model in client.get_model_repository_index().models} == {
                "digits": "UNAVAILABLE",
                "blue": "UNAVAILABLE",
            }
        for body in ({"model": "blue"}, {}):
            status, answer = ask(address, "POST", IMAGES, body)
            assert (status, answer["error"]["message"]) == (404, "model: no student is served")
        assert ask(address, "POST", "/v2/repository/models/digits/load")[0] == 200
        assert ask(address, "POST", IMAGES, {"model": "blue", "prompt": "1"})[0] == 200
        message = ask(address, "POST", IMAGES, {"model": "red"})[1]["error"]["message"]
        assert message == "model: 'red' is not served; there is: digits, blue"


def test_an_alias_of_nobody_is_refused_at_the_start(make_bundle: Callable[..., Path]) -> None:
    with pytest.raises(SettingsError, match=r"^aliases.a: nobody is not served$"):
        Service(Settings(bundles=(str(make_bundle()),), aliases={"a": "nobody"}))


# --- spans

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def hexadecimal(span: ReadableSpan) -> tuple[str, str]:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def test_a_request_is_a_trace_of_its_line_steps_and_encoding(make_bundle: Callable[..., Path]) -> None:
    exporter = InMemorySpanExporter()
    service = Service(Settings(bundles=(str(make_bundle()),), threads=1))
    service.traces = Traces(exporter=exporter)
    with TestClient(gated(create_app(service), service)) as client:
        begun_ns = time.time_ns()
        told = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        body = {"prompt": "1", "n": 2, "solver": "ddim", "num_inference_steps": 3}
        assert client.post(IMAGES, json=body, headers=told).status_code == 200
        ended_ns = time.time_ns()
        spans = exporter.get_finished_spans()
        assert Counter(span.name for span in spans) == {f"POST {IMAGES}": 1, "queue": 2, "step": 6, "encode": 1}
        (root,) = [span for span in spans if span.name.startswith("POST")]
        assert root.parent is not None
        assert (hexadecimal(root)[0], f"{root.parent.span_id:016x}") == (TRACE, PARENT)
        assert (root.attributes or {})["fewstep.request_id"] == "mine"
        assert (root.attributes or {})["fewstep.status"] == "200"
        for span in spans:
            assert hexadecimal(span)[0] == TRACE
            assert span is root or f"{span.parent.span_id:016x}" == hexadecimal(root)[1]  # type: ignore[union-attr]
            assert begun_ns - 5e7 < (span.start_time or 0) <= (span.end_time or 0) < ended_ns + 5e7
        steps = sorted((span.start_time or 0, span.end_time or 0) for span in spans if span.name == "step")
        assert len(set(steps)) == 3  # both images ran in the same three ticks
        assert all((span.attributes or {})["fewstep.rows"] == 2 for span in spans if span.name == "step")

        exporter.clear()
        told["traceparent"] = f"00-{TRACE}-{PARENT}-00"  # the caller does not want it
        assert client.post(IMAGES, json=body, headers=told).status_code == 200
        assert exporter.get_finished_spans() == ()

        with client.stream("POST", IMAGES, json=body | {"stream": True, "partial_images": 2}) as answer:
            answer.read()
        names = Counter(span.name for span in exporter.get_finished_spans())
        assert names == {f"POST {IMAGES}": 1, "queue": 2, "step": 6, "encode": 6}  # of 2 images and 4 previews

        exporter.clear()
        assert client.post(IMAGES, json={"prompt": "shoe"}).status_code == 400
        (refused,) = exporter.get_finished_spans()
        assert ((refused.attributes or {})["fewstep.status"], refused.status.is_ok) == ("400", True)


def test_a_grpc_calls_span_has_its_status(make_bundle: Callable[..., Path]) -> None:
    exporter = InMemorySpanExporter()
    service = Service(Settings(bundles=(str(make_bundle(nan_label=3)),), threads=1))
    service.traces = Traces(exporter=exporter)

    async def call() -> None:
        server = GrpcServer(service, free_port())
        service.start()
        address = await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for label in (10_000, 3):  # there is no such label; the network gives NaN on this one
                request = service_pb2.ModelInferRequest(model_name="digits")
                request.parameters["label"].int64_param = label
                with pytest.raises(grpc.aio.AioRpcError, match=r"LABEL: |not finite"):
                    await stub.ModelInfer(request)
        await server.stop(5)
        await asyncio.to_thread(service.stop)

    asyncio.run(call())
    told = [((span.attributes or {})["fewstep.status"], span.status.status_code.name)
            for span in exporter.get_finished_spans() if span.name.startswith("/")]  # fmt: skip
    assert told == [("INVALID_ARGUMENT", "UNSET"), ("INTERNAL", "ERROR")]


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_a_grpc_call_is_a_trace_too(make_bundle: Callable[..., Path], method: str) -> None:
    exporter = InMemorySpanExporter()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    service = Service(Settings(bundles=(str(make_bundle()),), threads=1))
    service.traces = Traces(exporter=exporter)

    async def call() -> None:
        server = GrpcServer(service, port)
        service.start()
        address = await server.start()
        request = service_pb2.ModelInferRequest(model_name="digits")
        request.parameters["steps"].int64_param = 3
        metadata = [("traceparent", f"00-{TRACE}-{PARENT}-01")]
        async with grpc.aio.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            if method == "ModelInfer":
                await stub.ModelInfer(request, metadata=metadata)
            else:
                assert [response async for response in stub.ModelStreamInfer(iter([request]), metadata=metadata)]
        await server.stop(5)
        await asyncio.to_thread(service.stop)

    asyncio.run(call())
    spans = exporter.get_finished_spans()
    name = f"/inference.GRPCInferenceService/{method}"
    assert Counter(span.name for span in spans) == {name: 1, "queue": 1, "step": 3, "encode": 1}
    assert {hexadecimal(span)[0] for span in spans} == {TRACE}
    (root,) = [span for span in spans if span.name == name]
    assert ((root.attributes or {})["fewstep.status"], root.status.is_ok) == ("OK", True)


def test_a_collector_that_takes_nothing_does_not_hold_up_the_exit(
    make_bundle: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as collector:  # it listens, and answers nobody
        url = f"http://127.0.0.1:{collector.getsockname()[1]}/v1/traces"
        settings = Settings(bundles=(str(make_bundle()),), threads=1, otlp_endpoint=url, drain_timeout_s=0.1)
        with TestClient(gated(create_app(service := Service(settings)), service)) as client:
            assert client.post(IMAGES, json={"prompt": "1"}).status_code == 200
            left_s = time.monotonic()
        assert time.monotonic() - left_s < 5  # the exporter itself waits for ten seconds
    for thread in threading.enumerate():
        if thread.name == "fewstep-spans":
            thread.join()
    assert "the last spans are given up: their collector did not take them within 0.1 s" in caplog.messages


def test_without_the_extra_an_endpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(SettingsError, match=r"^otlp_endpoint: needs pip install 'fewstep\[otel\]'"):
        Traces("http://localhost:4318/v1/traces")
