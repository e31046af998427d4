"""The Open Inference Protocol over HTTP and gRPC, held against the stock clients and a running server."""

import asyncio
import base64
import gzip
import http.client
import io
import json
import queue
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from conftest import free_port
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from fewstep.runtime import Bundle, Engine, Request
from fewstep.runtime.bundle import MANIFEST, write_manifest

Address = tuple[str, int]
Serving = Callable[..., AbstractContextManager[tuple[Any, Address]]]
Where = tuple[str, str]  # of HTTP and of gRPC


@pytest.fixture(scope="module")
def repository(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two bundles, the second one of which is called ``second``."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(make_bundle(), folder / "digits")
    shutil.copytree(make_bundle(seed=1), folder / "second")
    manifest = json.loads((folder / "second" / MANIFEST).read_text())
    del manifest["format"], manifest["files"]
    write_manifest(folder / "second", manifest | {"name": "second"})
    return folder


@pytest.fixture(scope="module")
def where(serving: Serving, make_bundle: Callable[..., Path], repository: Path) -> Iterator[Where]:
    port = free_port()
    bundles = (make_bundle(), make_bundle(is_guided=True))
    with serving(*bundles, "--grpc-port", str(port), "--repository", repository, "--max-rows", "4") as (_, address):
        yield f"{address[0]}:{address[1]}", f"127.0.0.1:{port}"


def expected(bundle: Bundle, *requests: Request) -> NDArray[np.uint8]:
    samples = Engine(bundle, threads=1).generate(requests)
    return np.stack([sample.to_uint8() for sample in samples])


def inputs(module: Any, **tensors: Any) -> list[Any]:
    """Inputs as a client library has them."""
    kinds = {"PROMPT": "BYTES", "LABEL": "INT64", "SEED": "UINT64", "STEPS": "INT32", "SOLVER": "BYTES"}
    dtypes = {"BYTES": object, "INT64": np.int64, "UINT64": np.uint64, "INT32": np.int32, "FP32": np.float32}
    made = []
    for name, values in tensors.items():
        kind = kinds.get(name, "FP32")
        made.append(module.InferInput(name, [len(values), 1], kind))
        made[-1].set_data_from_numpy(np.array(values, dtypes[kind])[:, None])
    return made


def post(where: Where, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(where[0], timeout=60)
    connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if content else None


CLIENTS = {"http": (triton_http, 0), "grpc": (triton_grpc, 1)}


@pytest.fixture(params=CLIENTS)
def protocol(request: pytest.FixtureRequest, where: Where) -> Iterator[tuple[Any, Any]]:
    """A client library, and its client."""
    module, i = CLIENTS[request.param]
    with module.InferenceServerClient(where[i]) as client:
        yield module, client


# --- the stock clients


def test_each_image_of_a_batch_has_its_own_settings(protocol: tuple[Any, Any], guided: Bundle) -> None:
    module, client = protocol
    asked = inputs(
        module,
        PROMPT=["digit 4", "5"],
        SEED=[7, 2**64 - 1],
        STEPS=[3, 8],
        SOLVER=["ddim", "ancestral"],
        GUIDANCE=[3, 1],
    )
    answer = client.infer("digits-guided", asked, model_version="1", request_id="mine")
    requests = Request(7, guided.tableau("ddim", 3), 4, 3.0), Request(2**64 - 1, guided.tableau("ancestral", 8), 5, 1.0)
    assert np.array_equal(answer.as_numpy("IMAGE"), expected(guided, *requests))
    assert answer.as_numpy("SEED").tolist() == [[7], [2**64 - 1]]
    response = answer.get_response()
    assert (response["id"] if isinstance(response, dict) else response.id) == "mine"


def test_one_value_is_for_all_and_seeds_count_up(protocol: tuple[Any, Any], baked: Bundle) -> None:
    module, client = protocol
    answer = client.infer("digits", inputs(module, LABEL=[1, 2, 3], SEED=[40], STEPS=[2]))
    requests = [Request(40 + i, baked.tableau(None, 2), 1 + i) for i in range(3)]
    assert np.array_equal(answer.as_numpy("IMAGE"), expected(baked, *requests))
    assert answer.as_numpy("SEED").ravel().tolist() == [40, 41, 42]


def test_everything_may_be_left_out_or_be_a_parameter(protocol: tuple[Any, Any], baked: Bundle) -> None:
    _, client = protocol
    assert client.infer("digits", []).as_numpy("IMAGE").shape == (1, 8, 8, 1)
    answer = client.infer("digits", [], parameters={"prompt": "digit 3", "seed": 6, "n": 2}, priority=1, timeout=10**8)
    requests = [Request(6 + i, baked.tableau(), 3) for i in range(2)]
    assert np.array_equal(answer.as_numpy("IMAGE"), expected(baked, *requests))


def test_outputs_are_those_asked_for(protocol: tuple[Any, Any]) -> None:
    module, client = protocol
    asked = inputs(module, SEED=[1], LABEL=[3, 4])
    both = client.infer("digits", asked, outputs=[module.InferRequestedOutput(name) for name in ("PNG", "IMAGE")])
    assert both.as_numpy("SEED") is None
    for png, pixels in zip(both.as_numpy("PNG").ravel(), both.as_numpy("IMAGE"), strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels[:, :, 0])


def test_the_server_and_its_models_say_what_they_are(protocol: tuple[Any, Any]) -> None:
    _, client = protocol
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    assert not client.is_model_ready("nothing")
    as_json = {} if isinstance(client, triton_http.InferenceServerClient) else {"as_json": True}
    assert client.get_server_metadata(**as_json)["name"] == "fewstep"
    metadata = client.get_model_metadata("digits", **as_json)
    outputs = {
        output["name"]: (output["datatype"], [int(s) for s in output["shape"]]) for output in metadata["outputs"]
    }
    assert outputs["IMAGE"] == ("UINT8", [-1, 8, 8, 1])
    assert {one["name"] for one in metadata["inputs"]} == {"PROMPT", "LABEL", "SEED", "STEPS", "SOLVER", "GUIDANCE"}
    config = client.get_model_config("digits", **as_json)
    config = config.get("config", config)
    assert config["max_batch_size"] == 64
    assert all(one["optional"] for one in config["input"])
    client.infer("digits", [])
    stats = client.get_inference_statistics("digits", **as_json)["model_stats"][0]
    assert int(stats["inference_count"]) > 0
    assert int(stats["inference_stats"]["success"]["ns"]) >= int(stats["inference_stats"]["compute_infer"]["ns"]) > 0
    assert len(client.get_inference_statistics(**as_json)["model_stats"]) >= 2


@pytest.mark.parametrize(
    ("model", "tensors", "message"),
    [
        ("nothing", {}, "model: 'nothing' is not served; there is: digits"),
        ("digits", {"PROMPT": ["shoe"]}, "PROMPT: 'shoe' is no class of this student"),
        ("digits", {"LABEL": [99]}, "LABEL: 99, digits has 0 to 9"),
        ("digits", {"STEPS": [77]}, "STEPS: digits has no table for ancestral with 77 steps"),
        ("digits", {"STEPS": [0]}, "STEPS: at least 1, got 0"),
        ("digits", {"SOLVER": ["magic"]}, "SOLVER: digits has no table for magic"),
        ("digits", {"GUIDANCE": [3]}, "GUIDANCE: 3, digits takes 1 only"),
        ("digits", {"GUIDANCE": [float("nan")]}, "GUIDANCE: nan, digits takes 1 only"),
        ("digits", {"SEED": [1, 2], "LABEL": [1, 2, 3]}, "SEED: holds 2 elements, the batch is 3"),
        ("digits", {"SEED": list(range(65))}, "SEED: shape is .* n from 1 to 64"),
        ("digits", {"SIDE": [1]}, "SIDE is not an input; there are: PROMPT"),
    ],
)
def test_what_is_wrong_is_named(protocol: tuple[Any, Any], model: str, tensors: dict[str, Any], message: str) -> None:
    module, client = protocol
    with pytest.raises(InferenceServerException, match=message):
        client.infer(model, inputs(module, **tensors))


def test_misspelt_parameters_are_refused(protocol: tuple[Any, Any]) -> None:
    _, client = protocol
    with pytest.raises(InferenceServerException, match=r"sede is not a parameter; did you mean seed\?"):
        client.infer("digits", [], parameters={"sede": 1})


def test_both_asynchronous_clients_work(where: Where, baked: Bundle) -> None:
    right = expected(baked, Request(7, baked.tableau(), 4))

    async def ask(module: Any, library: Any, address: str) -> None:
        async with module.InferenceServerClient(address) as client:
            answer = await client.infer("digits", inputs(library, LABEL=[4], SEED=[7]))
            assert np.array_equal(answer.as_numpy("IMAGE"), right)
            assert await client.is_model_ready("digits")

    asyncio.run(ask(triton_http_aio, triton_http, where[0]))
    asyncio.run(ask(triton_grpc_aio, triton_grpc, where[1]))


# --- HTTP


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_bodies_are_packed_both_ways(where: Where, algorithm: str) -> None:
    with triton_http.InferenceServerClient(where[0]) as client:
        asked = inputs(triton_http, LABEL=[3] * 32, SEED=[1])
        plain = client.infer("digits", asked)
        both = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
        assert np.array_equal(client.infer("digits", asked, **both).as_numpy("IMAGE"), plain.as_numpy("IMAGE"))


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [("gzip", "gzip"), ("gzip;q=0", None), ("GZIP;q=0.5", "gzip"), ("gzip; q=0.000, deflate", "deflate"), ("br", None)],
)
def test_an_answer_is_packed_only_as_the_client_takes_it(where: Where, accepted: str, encoding: str | None) -> None:
    connection = http.client.HTTPConnection(where[0], timeout=60)
    connection.request("POST", "/v2/models/digits/infer", b'{"parameters": {"n": 16}}', {"Accept-Encoding": accepted})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert (answer.status, answer.headers["Content-Encoding"]) == (200, encoding)


def test_binary_and_json_mix_in_one_answer_and_one_question(where: Where) -> None:
    asked = inputs(triton_http, LABEL=[3, 4], PROMPT=["", ""], SEED=[5, 6])[::2]
    asked[1].set_data_from_numpy(np.array([[5], [6]], np.uint64), binary_data=False)
    wanted = [triton_http.InferRequestedOutput(name, binary_data=name == "IMAGE") for name in ("IMAGE", "SEED")]
    with triton_http.InferenceServerClient(where[0]) as client:
        answer = client.infer("digits", asked, outputs=wanted)
        assert answer.as_numpy("SEED").tolist() == [[5], [6]]
        assert "data" in answer.get_output("SEED")
        assert answer.get_output("IMAGE")["parameters"]["binary_data_size"] == 2 * 64
        assert np.array_equal(answer.as_numpy("IMAGE"), client.infer("digits", asked).as_numpy("IMAGE"))


def test_plain_json_works_from_curl(where: Where, baked: Bundle) -> None:
    body = {"id": "a", "inputs": [{"name": "PROMPT", "shape": [1], "datatype": "BYTES", "data": ["digit 4"]}]}
    body["inputs"].append({"name": "SEED", "shape": [1, 1], "datatype": "UINT64", "data": [[7]]})  # type: ignore[attr-defined]
    status, answer = post(where, "/v2/models/digits/infer", json.dumps(body).encode())
    assert status == 200, answer
    image = next(output for output in answer["outputs"] if output["name"] == "IMAGE")
    right = expected(baked, Request(7, baked.tableau(), 4))
    assert np.array_equal(np.array(image["data"], np.uint8).reshape(image["shape"]), right)
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a", "digits", "1")


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"inputs": 3}', {}, 400),
        (b'{"inputs": [3]}', {}, 400),
        (b'{"inputs": [{"name": "SEED", "shape": [1e9], "datatype": "UINT64", "data": [1]}]}', {}, 400),
        (b'{"inputs": [{"name": "SEED", "shape": [-1], "datatype": "UINT64", "data": []}]}', {}, 400),
        (b'{"inputs": [{"name": "SEED", "shape": [1], "datatype": "UINT64", "data": [-1]}]}', {}, 400),
        (b'{"inputs": [{"name": "SEED", "shape": [1], "datatype": "UINT64", "data": [true]}]}', {}, 400),
        (b'{"inputs": [{"name": "SEED", "shape": [1], "datatype": "FP32", "data": [1.5]}]}', {}, 400),
        (b'{"inputs": [{"name": "PROMPT", "shape": [1], "datatype": "BYTES", "data": ["\\ud800"]}]}', {}, 400),
        (b'{"parameters": {"seed": -1}}', {}, 400),
        (b'{"outputs": [{"name": "LATENT"}]}', {}, 400),
        (b'{"parameters": {"binary_data_output": "false"}}', {}, 400),
        (b'{"outputs": [{"name": "SEED", "parameters": {"binary_data": 1}}]}', {}, 400),
        (b'{"inputs": [{"name": "SEED", "shape": [1], "datatype": "UINT64", "parameters": {"binary_data_size": 8}}]}',
         {}, 400),
        (b"{}", {"Inference_Header_Content_Length": "9"}, 400),
        (b"{}", {"Inference_Header_Content_Length": "-1"}, 400),
        (b"{}", {"Inference_Header_Content_Length": "0"}, 400),
        (b"{}xx", {"Inference_Header_Content_Length": "2"}, 400),
        (b"{}", {"Content_Encoding": "gzip"}, 400),
        (b"{}", {"Content_Encoding": "br"}, 415),
        (gzip.compress(b" " * 5_000_000), {"Content_Encoding": "gzip"}, 413),
    ],
)  # fmt: skip
def test_a_bad_body_is_one_line_of_json(where: Where, body: bytes, headers: dict[str, str], status: int) -> None:
    got, answer = post(where, "/v2/models/digits/infer", body, **headers)
    assert got == status, answer
    assert list(answer) == ["error"]
    assert "\n" not in answer["error"]


@pytest.mark.parametrize(
    "path",
    ["/v2/systemsharedmemory/status", "/v2/cudasharedmemory/region/a/register", "/v2/logging", "/v2/trace/setting",
     "/v2/models/digits/trace/setting"],
)  # fmt: skip
def test_what_the_protocol_has_and_we_have_not_is_said_so(where: Where, path: str) -> None:
    status, answer = post(where, path, b"{}")
    assert (status, answer["error"].partition(":")[0]) == (501, f"{path} is not served")


def test_generate_gives_a_picture_and_its_seed(where: Where, baked: Bundle) -> None:
    body = json.dumps({"id": "x", "text_input": "digit 4", "parameters": {"seed": 7}, "STEPS": 3, "solver": "ddim"})
    status, answer = post(where, "/v2/models/digits/versions/1/generate", body.encode())
    assert status == 200, answer
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["PNG"]))))
    assert np.array_equal(pixels, expected(baked, Request(7, baked.tableau("ddim", 3), 4))[0, :, :, 0])
    assert (answer["SEED"], answer["id"], answer["model_name"]) == (7, "x", "digits")
    assert len(post(where, "/v2/models/digits/generate", b'{"n": 3}')[1]["PNG"]) == 3
    assert post(where, "/v2/models/digits/versions/2/generate", b"{}")[0] == 404


def test_generate_stream_shows_the_way_to_the_picture(where: Where) -> None:
    connection = http.client.HTTPConnection(where[0], timeout=60)
    body = {"text_input": "digit 4", "seed": 7, "steps": 8, "preview_every": 3}
    connection.request("POST", "/v2/models/digits/generate_stream", json.dumps(body))
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    events = [json.loads(part.removeprefix("data: ")) for part in answer.read().decode().split("\n\n") if part]
    connection.close()
    assert [(event["step"], event["is_preview"]) for event in events] == [(3, True), (6, True), (8, False)]
    del body["preview_every"]
    assert events[-1]["PNG"] == post(where, "/v2/models/digits/generate", json.dumps(body).encode())[1]["PNG"]


# --- gRPC


def test_a_stream_gives_previews_and_a_final_response(where: Where, baked: Bundle) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with triton_grpc.InferenceServerClient(where[1]) as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        asked = inputs(triton_grpc, LABEL=[4], SEED=[7], STEPS=[4], SOLVER=["ddim"])
        client.async_stream_infer("digits", asked, request_id="a", parameters={"preview_every": 1})
        got = [answers.get(timeout=30) for _ in range(4)]
        client.async_stream_infer("nothing", asked)
        refused = answers.get(timeout=30)
        client.async_stream_infer("digits", asked)
        again = answers.get(timeout=30)
        client.stop_stream()
    responses = [result.get_response() for result in got]
    assert [response.parameters["step"].int64_param for response in responses[:3]] == [1, 2, 3]
    finals = [response.parameters["triton_final_response"].bool_param for response in responses]
    assert finals == [False, False, False, True]
    assert {response.id for response in responses} == {"a"}
    right = expected(baked, Request(7, baked.tableau("ddim", 4), 4))
    assert np.array_equal(got[3].as_numpy("IMAGE"), right)
    assert np.array_equal(again.as_numpy("IMAGE"), right)
    assert "'nothing' is not served" in str(refused)


def test_a_deadline_chooses_the_steps(protocol: tuple[Any, Any], baked: Bundle) -> None:
    module, client = protocol
    outputs = [module.InferRequestedOutput(name) for name in ("IMAGE", "STEPS")]
    asked, bounds = inputs(module, LABEL=[4], SEED=[7]), {"deadline_ms": 60_000.0, "min_steps": 2, "max_steps": 7}
    answer = client.infer("digits", asked, outputs=outputs, parameters=bounds)
    assert answer.as_numpy("STEPS").tolist() == [[4]]
    assert np.array_equal(answer.as_numpy("IMAGE"), expected(baked, Request(7, baked.tableau("ancestral", 4), 4)))
    response = answer.get_response()
    if module is triton_http:
        assert response["parameters"] == {"steps": 4, "solver": "ancestral"}
    else:
        assert response.parameters["steps"].int64_param == 4
    with pytest.raises(InferenceServerException, match=r"ms are not enough: 2 steps would take") as caught:
        client.infer("digits", asked, parameters=bounds | {"deadline_ms": 0.001})
    assert caught.value.status() == ("429" if module is triton_http else "StatusCode.RESOURCE_EXHAUSTED")


def test_a_call_that_cannot_be_in_time_is_not_tried_again_by_grpc(where: Where) -> None:
    with grpc.insecure_channel(where[1]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name="digits")
        request.parameters["timeout"].int64_param = 1
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request)
    told = dict(caught.value.trailing_metadata())
    assert told["grpc-retry-pushback-ms"] == "-1"
    assert "retry-after-ms" not in told  # it would not be in time in an empty line either


def test_grpc_statuses_are_those_of_the_error(where: Where) -> None:
    with triton_grpc.InferenceServerClient(where[1]) as client:
        for model, asked, status in (
            ("nothing", {}, "StatusCode.NOT_FOUND"),
            ("digits", {"LABEL": [99]}, "StatusCode.INVALID_ARGUMENT"),
        ):
            with pytest.raises(InferenceServerException) as caught:
                client.infer(model, inputs(triton_grpc, **asked))
            assert caught.value.status() == status


@pytest.mark.parametrize(
    ("name", "datatype", "field", "values", "message"),
    [
        ("SEED", "UINT64", "fp64_contents", [7.9], "SEED: 1 whole numbers expected"),
        ("SEED", "UINT64", "fp64_contents", [7.0], "SEED: 1 whole numbers expected"),
        ("SEED", "UINT64", "bool_contents", [True], "SEED: 1 whole numbers expected"),
        ("SEED", "UINT64", "int64_contents", [-1], "SEED: a value is out of the range of its datatype"),
        ("SEED", "UINT64", "uint64_contents", [1, 2], "SEED: 1 whole numbers expected"),
        ("PROMPT", "BYTES", "int_contents", [3], "PROMPT: 1 texts expected"),
        ("GUIDANCE", "FP32", "bytes_contents", [b"1"], "GUIDANCE: 1 numbers expected"),
        ("SEED", "UINT64", "uint64_contents", [2**64 - 1], None),
        ("GUIDANCE", "FP32", "int_contents", [1], None),
        ("PROMPT", "BYTES", "bytes_contents", [b"digit 3"], None),
    ],
)
def test_elements_that_came_one_by_one_are_of_their_kind(
    where: Where, name: str, datatype: str, field: str, values: list[Any], message: str | None
) -> None:
    request = service_pb2.ModelInferRequest(model_name="digits")
    given = request.inputs.add(name=name, datatype=datatype, shape=[1])
    getattr(given.contents, field).extend(values)
    with grpc.insecure_channel(where[1]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        if message is None:
            assert stub.ModelInfer(request).model_name == "digits"
            return
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, message)


def test_a_cancelled_call_leaves_no_work(where: Where) -> None:
    with triton_grpc.InferenceServerClient(where[1]) as client:
        asked = inputs(triton_grpc, LABEL=[1] * 64, STEPS=[8])
        calls = [client.async_infer("digits", asked, callback=lambda result, error: None) for _ in range(8)]
        time.sleep(0.02)
        for call in calls:
            call.cancel()
        start_s = time.monotonic()
        while not is_idle(where):
            assert time.monotonic() - start_s < 20
            time.sleep(0.02)


def is_idle(where: Where) -> bool:
    connection = http.client.HTTPConnection(where[0], timeout=30)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    counts = [
        line for line in lines if line.startswith(("fewstep_running_rows{", "nv_inference_pending_request_count{"))
    ]
    assert counts
    return all(float(line.split()[-1]) == 0 for line in counts)


def test_health_and_reflection_answer_stock_stubs(where: Where) -> None:
    with grpc.insecure_channel(where[1]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "inference.GRPCInferenceService"):
            asked = health_pb2.HealthCheckRequest(service=name)
            assert health.Check(asked).status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([question]))
        names = {service.name for service in answer.list_services_response.service}
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names
        question = reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService")
        (answer,) = stub.ServerReflectionInfo(iter([question]))
        assert answer.file_descriptor_response.file_descriptor_proto


# --- the repository


def test_students_are_loaded_unloaded_and_listed(protocol: tuple[Any, Any], repository: Path) -> None:
    module, client = protocol

    def states() -> dict[str, str]:
        index = client.get_model_repository_index()
        if module is triton_http:
            return {model["name"]: model["state"] for model in index}
        return {model.name: model.state for model in index.models}

    assert states()["second"] == "UNAVAILABLE"
    client.load_model("second")
    assert states() == {"digits": "READY", "digits-guided": "READY", "second": "READY"}
    first = client.infer("second", inputs(module, LABEL=[3], SEED=[1])).as_numpy("IMAGE")
    assert not np.array_equal(first, client.infer("digits", inputs(module, LABEL=[3], SEED=[1])).as_numpy("IMAGE"))
    client.unload_model("second")
    assert states()["second"] == "UNAVAILABLE"
    with pytest.raises(InferenceServerException, match="'second' is not served"):
        client.infer("second", [])
    client.load_model("second", config=json.dumps({"bundle": "second"}))
    again = client.infer("second", inputs(module, LABEL=[3], SEED=[1])).as_numpy("IMAGE")
    assert np.array_equal(again, first)
    client.unload_model("second")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("nothing", None, "there is no bundle for 'nothing'"),
        ("../second", None, "there is no bundle|there is nothing"),
        ("digits", {"bundle": "/etc"}, "within the repository"),
        ("digits", {"bundle": "../.."}, "within the repository"),
        ("digits", {"bundle": "second"}, "the bundle calls itself second"),
        ("digits", {"bundle": "missing"}, "no such folder"),
        ("digits", {"folder": "second"}, "must be the text"),
    ],
)
def test_a_load_that_cannot_be_leaves_what_is_served(
    where: Where, name: str, config: dict[str, str] | None, message: str
) -> None:
    with triton_grpc.InferenceServerClient(where[1]) as client:
        with pytest.raises(InferenceServerException, match=message):
            client.load_model(name, config=json.dumps(config) if config else None)
        client.infer("digits", [])


def test_requests_under_way_end_on_the_student_they_began_with(
    serving: Serving, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """The student changes under load, again and again; every answer is one of the two students' own."""
    folder = tmp_path / "digits"
    shutil.copytree(make_bundle(), folder)
    spare = tmp_path / "spare"
    shutil.copytree(make_bundle(seed=1), spare)
    both = [Bundle.load(folder), Bundle.load(spare)]
    right = [expected(bundle, *(Request(i, bundle.tableau("ancestral", 8), 3) for i in range(6))) for bundle in both]
    wrong: list[str] = []
    seen: set[int] = set()
    is_over = threading.Event()
    with serving(folder, "--max-rows", "2", "--no-grpc") as (_, address):

        def client() -> None:
            with triton_http.InferenceServerClient(f"{address[0]}:{address[1]}") as triton:
                while not is_over.is_set():
                    asked = inputs(triton_http, LABEL=[3] * 6, SEED=[0], STEPS=[8], SOLVER=["ancestral"])
                    image = triton.infer("digits", asked).as_numpy("IMAGE")
                    found = [i for i, images in enumerate(right) if np.array_equal(image, images)]
                    seen.update(found)
                    if not found:
                        wrong.append("mixed")

        threads = [threading.Thread(target=client) for _ in range(3)]
        for thread in threads:
            thread.start()
        with triton_http.InferenceServerClient(f"{address[0]}:{address[1]}") as triton:
            for _ in range(6):
                hold = tmp_path / "hold"
                folder.rename(hold)
                spare.rename(folder)
                hold.rename(spare)
                triton.load_model("digits")
        is_over.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert seen == {0, 1}


def test_a_binary_body_of_the_wrong_length_is_refused(where: Where) -> None:
    head = {"inputs": [{"name": "PROMPT", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 5}}]}
    for blob in (struct.pack("<I", 9) + b"1", struct.pack("<I", 0) + b"1", b"12345"):
        body = json.dumps(head).encode()
        length = {"Inference_Header_Content_Length": str(len(body))}
        status, answer = post(where, "/v2/models/digits/infer", body + blob, **length)
        assert (status, answer["error"]) == (400, "PROMPT: the data are not 1 elements, each after its length")


def test_sigterm_answers_calls_over_grpc_and_exits_0(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    port = free_port()
    answers: queue.Queue[Any] = queue.Queue()
    with serving(make_bundle(), "--grpc-port", str(port), "--max-rows", "1") as (process, address):
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
            asked = inputs(triton_grpc, LABEL=[1] * 64, STEPS=[8])
            for _ in range(4):
                client.async_infer("digits", asked, callback=lambda result, error: answers.put(error or result))
            while is_idle((f"{address[0]}:{address[1]}", "")):
                time.sleep(0.005)
            time.sleep(0.1)  # so that all four are in line
            process.terminate()
            got = [answers.get(timeout=60) for _ in range(4)]
        assert [answer.as_numpy("IMAGE").shape for answer in got] == [(64, 8, 8, 1)] * 4
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == ""
