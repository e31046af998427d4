"""Deployment on Triton server, held against a real one: the same pixels as the server's, by every way to ask."""

import base64
import hashlib
import importlib
import io
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import lazy_cuda
import numpy as np
import onnx
import onnxruntime
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from google.protobuf import text_format
from google.protobuf.json_format import MessageToJson
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from fewstep.cli import main
from fewstep.deploy import triton_server
from fewstep.deploy.perf_analyzer import perf_analyzer, without_sequences
from fewstep.deploy.triton_graph import graph_inputs, triton_inputs, write_graph_model
from fewstep.deploy.triton_repository import VARIANTS, RepositoryError, Variant, write_model
from fewstep.deploy.triton_server import (
    Environment,
    NoTritonHere,
    TritonError,
    check,
    free_ports,
    process_of,
    read_repository,
    refuse_without_backend,
    running,
)
from fewstep.export.engines import build_engine, tensorrt_of
from fewstep.runtime import Bundle, BundleError, Engine, Request
from fewstep.runtime.backends import BackendError
from fewstep.runtime.gpu_backends import OnnxCudaBackend

Pixels = NDArray[np.uint8]
Serving = Callable[..., AbstractContextManager[tuple[Any, tuple[str, int]]]]

# What people ask for: solvers, numbers of steps, labels, seeds and guidance all different.
ASKED: list[dict[str, Any]] = [
    {"LABEL": 3, "SEED": 0},
    {"PROMPT": "digit 7", "SEED": 2**64 - 1, "STEPS": 8},
    {"LABEL": 0, "SEED": 5, "SOLVER": "dpmpp_2m", "STEPS": 3},
    {"SEED": 6, "SOLVER": "ddim", "STEPS": 1},
    {"PROMPT": "9", "SEED": 7, "SOLVER": "heun", "STEPS": 7},
    {"LABEL": 1, "SEED": 8, "STEPS": 2, "SOLVER": "ancestral"},
]
GUIDED = [{**one, "GUIDANCE": weight} for one, weight in zip(ASKED, (1.0, 1.5, 2.0, 3.0, 4.5, 5.0), strict=True)]
KINDS = {
    "PROMPT": ("BYTES", np.object_), "LABEL": ("INT64", np.int64), "SEED": ("UINT64", np.uint64),
    "STEPS": ("INT32", np.int32), "SOLVER": ("BYTES", np.object_), "GUIDANCE": ("FP32", np.float32),
}  # fmt: skip


@dataclass(frozen=True)
class Where:
    """Addresses of two servers of the same students."""

    http: str
    grpc: str
    standalone: str
    standalone_grpc: str


@pytest.fixture(scope="module")
def environment() -> Environment:
    """A real Triton server: made now, or the one that was made before."""
    environment = Environment.default()
    try:
        environment.make()
    except NoTritonHere as reason:
        pytest.skip(str(reason))
    return environment


@pytest.fixture(scope="module")
def repository(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two students, in every way."""
    folder = tmp_path_factory.mktemp("triton") / "repository"
    for path in (make_bundle(), make_bundle(is_guided=True)):
        bundle = Bundle.load(path)
        for variant in VARIANTS:
            instances = 2 if bundle.name == "digits-guided" else 1
            write_model(
                bundle, folder, variant=variant, name=f"{bundle.name}-{variant}", max_rows=4, threads=1,
                instances=instances,
            )  # fmt: skip
    for variant in VARIANTS:
        bundle = Bundle.load(make_bundle())
        name = f"{bundle.name}-{variant}-stream"
        write_model(bundle, folder, variant=variant, name=name, is_decoupled=True, max_rows=4, threads=1)
    return folder


@pytest.fixture(scope="module")
def where(
    environment: Environment,
    repository: Path,
    serving: Serving,
    make_bundle: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Where]:
    log = tmp_path_factory.mktemp("triton") / "log"
    (grpc_port,) = free_ports(1)
    with (
        serving(make_bundle(), make_bundle(is_guided=True), "--grpc-port", str(grpc_port)) as (_, (host, port)),
        running(environment, repository, log) as (http, grpc),
    ):
        yield Where(http, grpc, f"{host}:{port}", f"{host}:{grpc_port}")


def inputs(module: Any, asked: dict[str, Any]) -> list[Any]:
    made = []
    for name, value in asked.items():
        kind, dtype = KINDS[name]
        one = module.InferInput(name, [1, 1], kind)
        one.set_data_from_numpy(np.array([[value]], dtype))
        made.append(one)
    return made


def over_http(address: str, model: str, asked: dict[str, Any]) -> Pixels:
    with triton_http.InferenceServerClient(address) as client:
        pixels: Pixels = client.infer(model, inputs(triton_http, asked)).as_numpy("IMAGE")[0]
        return pixels


def over_grpc(address: str, model: str, asked: dict[str, Any]) -> Pixels:
    with triton_grpc.InferenceServerClient(address) as client:
        pixels: Pixels = client.infer(model, inputs(triton_grpc, asked)).as_numpy("IMAGE")[0]
        return pixels


def post(address: str, path: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(f"http://{address}/v2/models/{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: bytes = response.read()
        return answer


def events(address: str, model: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = post(address, f"{model}/generate_stream", body).decode()
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def sha256(images: Sequence[Pixels]) -> list[str]:
    return [hashlib.sha256(np.ascontiguousarray(image, np.uint8).tobytes()).hexdigest() for image in images]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("student", "asked"), [("digits", ASKED), ("digits-guided", GUIDED)])
def test_the_pixels_are_the_standalone_servers(
    where: Where, repository: Path, student: str, asked: list[dict[str, Any]], variant: str
) -> None:
    """Over HTTP and over gRPC, one after the other and all at once, in any company; one student has two instances."""
    model = f"{student}-{variant}"
    expected = sha256([over_http(where.standalone, student, one) for one in asked])
    assert len(set(expected)) == len(asked)
    assert sha256([over_http(where.http, model, one) for one in asked]) == expected
    assert sha256([over_grpc(where.grpc, model, one) for one in asked]) == expected
    before = ticks(repository, model)
    with ThreadPoolExecutor(12) as pool:
        grpc = [pool.submit(over_grpc, where.grpc, model, one) for one in asked * 3]
        http = [pool.submit(over_http, where.http, model, one) for one in asked * 3]
        assert sha256([one.result() for one in grpc]) == sha256([one.result() for one in http]) == expected * 3
    after = ticks(repository, model)
    assert len(after) == (2 if student == "digits-guided" else 1)
    if variant == "loop":  # which waits for a batch, so that the other instance gets the next
        assert all(after[process] > before[process] for process in after)


def ticks(repository: Path, model: str) -> dict[str, int]:
    """CPU time of the processes that run a model, in the system's ticks."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended
            if f"{repository}/{model}/1/model.py" in (path / "cmdline").read_text():
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                found[path.name] = int(fields[11]) + int(fields[12])
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stream_gives_every_preview_and_then_the_image(where: Where, variant: str) -> None:
    model = f"digits-{variant}-stream"
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton_grpc.InferenceServerClient(where.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for i, one in enumerate(ASKED):
            given = inputs(triton_grpc, one)
            client.async_stream_infer(model, given, request_id=str(i), parameters={"preview_every": 1})
        images: dict[int, Pixels] = {}
        previews: dict[int, list[int]] = {i: [] for i in range(len(ASKED))}
        while len(images) < len(ASKED):
            result, error = answers.get(timeout=60)
            assert error is None
            i = int(result.get_response().id)
            if result.as_numpy("IS_PREVIEW")[0, 0]:
                assert i not in images
                previews[i].append(int(result.as_numpy("STEP")[0, 0]))
            else:
                images[i] = result.as_numpy("IMAGE")[0]
        client.stop_stream()
    expected = [over_http(where.standalone, "digits", one) for one in ASKED]
    assert sha256([images[i] for i in range(len(ASKED))]) == sha256(expected)
    assert [previews[i] for i in range(len(ASKED))] == [
        list(range(1, steps)) for steps in (one.get("STEPS", 4) for one in ASKED)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_stream_gives_previews_and_the_image(where: Where, variant: str) -> None:
    """Of several solvers, steps and seeds; one after the other, then all at once."""
    expected = [over_http(where.standalone, "digits", one) for one in ASKED]

    def stream(one: dict[str, Any]) -> tuple[list[int], Pixels, Pixels]:
        *previews, image = events(where.http, f"digits-{variant}-stream", {**one, "preview_every": 1})
        assert [event["IS_PREVIEW"] for event in (*previews, image)] == [True] * len(previews) + [False]
        picture = np.array(Image.open(io.BytesIO(base64.b64decode(image["PNG_BASE64"]))))
        steps = [event["STEP"] for event in (*previews, image)]
        return steps, np.array(image["IMAGE"], np.uint8).reshape(expected[0].shape), picture[:, :, None]

    with ThreadPoolExecutor(len(ASKED)) as pool:
        for got in ([stream(one) for one in ASKED], list(pool.map(stream, ASKED * 2))):
            times = len(got) // len(ASKED)
            assert sha256([image for _, image, _ in got]) == sha256(expected) * times
            assert sha256([picture for _, _, picture in got]) == sha256(expected) * times
            assert [steps for steps, _, _ in got] == [list(range(1, one.get("STEPS", 4) + 1)) for one in ASKED] * times


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_takes_text_and_parameters(where: Where, variant: str) -> None:
    """With a parameter in an input's place, and Triton's own word for a prompt."""
    body = {"SEED": 11, "text_input": "digit 4", "steps": 2, "solver": "ddim"}
    got = json.loads(post(where.http, f"digits-{variant}/generate", body))
    asked = {"SEED": 11, "PROMPT": "digit 4", "STEPS": 2, "SOLVER": "ddim"}
    assert got["IMAGE"] == over_http(where.standalone, "digits", asked).ravel().tolist()
    assert (got["SEED"], got["STEPS"]) == (11, 2)


@pytest.mark.parametrize("variant", ["inflight", "loop"])
def test_images_of_one_request_may_differ_and_be_more_than_the_slots(where: Where, variant: str) -> None:
    """A batch of as many as Triton takes, each image with its own label and seed."""
    label, seed = triton_grpc.InferInput("LABEL", [4, 1], "INT64"), triton_grpc.InferInput("SEED", [4, 1], "UINT64")
    label.set_data_from_numpy(np.array([[1], [2], [3], [4]], np.int64))
    seed.set_data_from_numpy(np.array([[1], [1], [9], [2**63]], np.uint64))
    with triton_grpc.InferenceServerClient(where.grpc) as client:
        result = client.infer(f"digits-{variant}", [label, seed])
    expected = [
        over_http(where.standalone, "digits", {"LABEL": a, "SEED": b}) for a, b in ((1, 1), (2, 1), (3, 9), (4, 2**63))
    ]
    assert sha256(result.as_numpy("IMAGE")) == sha256(expected)
    assert result.as_numpy("SEED").ravel().tolist() == [1, 1, 9, 2**63]


def test_a_seed_that_is_not_given_is_told(where: Where) -> None:
    with triton_grpc.InferenceServerClient(where.grpc) as client:
        results = [client.infer("digits-inflight", inputs(triton_grpc, {"LABEL": 3})) for _ in range(2)]
    seeds = [int(result.as_numpy("SEED")[0, 0]) for result in results]
    assert len(set(seeds)) == 2
    again = over_grpc(where.grpc, "digits-inflight", {"LABEL": 3, "SEED": seeds[0]})
    assert np.array_equal(again, results[0].as_numpy("IMAGE")[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("asked", "parameters", "message"),
    [
        ({"SOLVER": "euler"}, {}, "SOLVER: digits has no table for euler with 4 steps; it has ancestral with"),
        ({"STEPS": 5}, {}, "STEPS: digits has no table for ancestral with 5 steps"),
        ({"PROMPT": "cat"}, {}, "PROMPT: 'cat' is no class of this student; it has 0 to 9: digit 0, "),
        ({"LABEL": 10}, {}, "LABEL: 10, digits has 0 to 9"),
        ({"GUIDANCE": 3.0}, {}, "GUIDANCE: 3, digits takes 1 only: its guidance is fixed"),
        ({"LABEL": 1}, {"step": 3}, "step is not a parameter; did you mean steps?"),
        ({"LABEL": 1}, {"preview_every": 1}, "preview_every: this model answers once; export it with --decoupled"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line_and_the_next_is_not(
    where: Where, variant: str, asked: dict[str, Any], parameters: dict[str, Any], message: str
) -> None:
    with triton_grpc.InferenceServerClient(where.grpc) as client:
        with pytest.raises(InferenceServerException) as refused:
            client.infer(f"digits-{variant}", inputs(triton_grpc, asked), parameters=parameters)
        assert message in str(refused.value.message())
        assert "\n" not in str(refused.value.message())
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
        client.infer(f"digits-{variant}", inputs(triton_grpc, {"LABEL": 1}))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_perf_analyzer_loads_the_standalone_server_and_a_variant(
    environment: Environment, where: Where, protocol: Literal["http", "grpc"]
) -> None:
    """NVIDIA's own load generator, unchanged: it reads metadata and configuration, asks, and reads statistics."""
    asked = [{"STEPS": [steps], "LABEL": [steps], "SEED": [steps]} for steps in (1, 2, 4, 8)]
    addresses = {"http": (where.standalone, where.http), "grpc": (where.standalone_grpc, where.grpc)}[protocol]
    for address, model in zip(addresses, ("digits", "digits-loop"), strict=True):
        seen = perf_analyzer(environment, address, model, asked, protocol=protocol, clients=4, requests=120)
        assert seen.images_per_s > 1
        assert 0 < seen.p50_ms <= seen.p99_ms


def test_perf_analyzer_loads_the_iterative_variant_step_by_step(environment: Environment, where: Where) -> None:
    """Behind the relay it names no sequence: Triton counts the executions that a request is brought back for, too."""

    def counted() -> int:
        with urllib.request.urlopen(f"http://{where.http}/v2/models/digits-iterative/stats", timeout=30) as response:
            count: int = json.load(response)["model_stats"][0]["inference_count"]
        return count

    before = counted()
    with without_sequences(where.http) as relay:
        asked = [{"STEPS": [8], "LABEL": [3], "SEED": [1]}]
        seen = perf_analyzer(
            environment, relay.address, "digits-iterative", asked, protocol="http", clients=4, requests=40
        )
    assert 0 < seen.p50_ms <= seen.p99_ms
    assert counted() - before > 4 * relay.inferences  # eight executions each, some of them seen as one


def test_a_client_may_call_its_request_a_sequence(where: Where) -> None:
    """As perf_analyzer does. Triton does not bring back a request that its client marked as the end."""
    expected = over_http(where.standalone, "digits", ASKED[1])
    with triton_grpc.InferenceServerClient(where.grpc) as client:
        for is_end in (True, False):
            given = inputs(triton_grpc, ASKED[1])
            result = client.infer(
                "digits-iterative", given, sequence_id=7, sequence_start=True, sequence_end=is_end, client_timeout=30
            )
            assert sha256([result.as_numpy("IMAGE")[0]]) == sha256([expected])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_deadline_that_cannot_be_met_is_refused_and_the_steps_are_fitted_to_one_that_can(
    where: Where, variant: str
) -> None:
    with triton_grpc.InferenceServerClient(where.grpc) as client:

        def ask(**parameters: Any) -> Any:
            return client.infer(f"digits-{variant}", inputs(triton_grpc, {"LABEL": 1}), parameters=parameters)

        with pytest.raises(InferenceServerException, match="ms are not enough: 4 steps would take") as refused:
            ask(deadline_ms=0.001)
        assert refused.value.status() == "StatusCode.UNAVAILABLE"
        assert ask(deadline_ms=1e5, max_steps=3).as_numpy("STEPS").tolist() == [[3]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stream_tells_what_is_wrong_and_goes_on(where: Where, variant: str) -> None:
    model = f"digits-{variant}-stream"
    with pytest.raises(urllib.error.HTTPError) as refused:
        events(where.http, model, {"LABEL": 12})
    assert refused.value.code == 400
    assert refused.value.read() == b'data: {"error":"LABEL: 12, digits has 0 to 9"}\n\n'
    assert not events(where.http, model, {"LABEL": 2})[-1]["IS_PREVIEW"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_cancelled_calls_leave_the_others_alone(where: Where, variant: str) -> None:
    model = f"digits-{variant}"
    expected = sha256([over_http(where.standalone, "digits", one) for one in ASKED])
    with triton_grpc.InferenceServerClient(where.grpc) as client, ThreadPoolExecutor(6) as pool:
        kept = [pool.submit(over_grpc, where.grpc, model, one) for one in ASKED]
        for i in range(20):
            call = client.async_infer(
                model, inputs(triton_grpc, {"LABEL": 1, "SEED": i, "STEPS": 8}), lambda result, error: None
            )
            call.cancel()
        assert sha256([one.result(60) for one in kept]) == expected
        assert sha256([over_grpc(where.grpc, model, one) for one in ASKED]) == expected


def test_an_inflight_model_stops_the_samples_of_a_client_that_went_away(
    environment: Environment, tmp_path: Path
) -> None:
    """A hundred images under way or in the engine's line, cancelled: who comes next waits for few of them."""
    write_model(Bundle.load(), tmp_path / "repository", name="student", max_rows=64, threads=1)
    asked = {"LABEL": 1, "STEPS": 8}
    ended: queue.Queue[Any] = queue.Queue()
    shares = []
    with (
        running(environment, tmp_path / "repository", tmp_path / "log") as (_, grpc),
        triton_grpc.InferenceServerClient(grpc) as client,
    ):

        def all_at_once() -> list[Any]:
            return [
                client.async_infer(
                    "student", inputs(triton_grpc, {**asked, "SEED": i}), lambda result, error: ended.put(error)
                )
                for i in range(128)
            ]

        for _ in range(3):
            start_s = time.monotonic()
            all_at_once()
            assert [ended.get(timeout=60) for _ in range(128)] == [None] * 128
            took_s = time.monotonic() - start_s
            start_s = time.monotonic()
            calls = all_at_once()
            time.sleep(0.3 * took_s)
            for call in calls:
                call.cancel()
            over_grpc(grpc, "student", {**asked, "SEED": 7, "STEPS": 1})
            shares.append((time.monotonic() - start_s) / took_s)
            for _ in range(128):
                ended.get(timeout=60)
    assert sorted(shares)[1] < 0.65, shares  # about 0.4; were they finished, it would be 0.9


# A step of a network that takes 40 ms for requests of eight steps.
SLOW = """
at_once = Iterative.execute


def slowly(self, requests):
    if any(8 in pb.get_input_tensor_by_name(request, "STEPS").as_numpy() for request in requests):
        time.sleep(0.04)
    return at_once(self, requests)


Iterative.execute = slowly
"""


@pytest.fixture(params=[False, True], ids=["one answer", "stream"])
def slow(
    request: pytest.FixtureRequest, make_bundle: Callable[..., Path], tmp_path: Path
) -> tuple[Path, Callable[[Any, int, Any], Callable[[], object]]]:
    """A repository of an iterative model of four rows, and how to ask it.

    That takes a client, which asks for one image at a time, a number of steps, of which eight take 40 ms each, and
    a queue for the error, or None; it gives what cancels it.
    """
    is_decoupled = request.param
    model = write_model(
        Bundle.load(make_bundle()), tmp_path / "repository", variant="iterative", name="slow", max_rows=4, threads=1,
        is_decoupled=is_decoupled,
    )  # fmt: skip
    with (model / "1" / "fewstep/deploy/triton_model.py").open("a") as code:
        code.write(SLOW)

    def start(client: Any, steps: int, ended: Any) -> Callable[[], object]:
        asked = inputs(triton_grpc, {"LABEL": 1, "SEED": 1, "STEPS": steps})
        if not is_decoupled:
            call = client.async_infer("slow", asked, lambda result, error: ended.put(error))
            return lambda: call.cancel()
        client.start_stream(lambda result, error: ended.put(error))
        client.async_stream_infer("slow", asked)
        return lambda: client.stop_stream(cancel_requests=True)

    return tmp_path / "repository", start


def executions(http: str) -> int:
    """Triton's own count of them, each of which is one network call."""
    with urllib.request.urlopen(f"http://{http}/v2/models/slow/stats", timeout=30) as response:
        count: int = json.load(response)["model_stats"][0]["execution_count"]
        return count


def test_iterative_requests_share_their_steps_after_others_were_cancelled(
    environment: Environment, slow: Any, tmp_path: Path
) -> None:
    """At any moment of steps that take no time, so that Triton drops many of them in its own line."""
    repository, start = slow
    random = np.random.default_rng(0)
    with running(environment, repository, tmp_path / "log") as (http, grpc), ExitStack() as stack:
        clients = [stack.enter_context(triton_grpc.InferenceServerClient(grpc)) for _ in range(16)]
        for _ in range(3):
            for client in clients * 3:
                cancel = start(client, 4, queue.Queue())
                time.sleep(random.uniform(0.0, 0.005))
                cancel()
            before, ended = executions(http), queue.Queue[Any]()
            cancels = [start(client, 8, ended) for client in clients[:8]]
            assert [ended.get(timeout=20) for _ in range(8)] == [None] * 8
            for cancel in cancels:
                cancel()  # a stream ends
            assert 16 <= executions(http) - before < 40  # alone each takes eight


def test_an_iterative_request_that_is_cancelled_in_its_step_keeps_no_place(
    environment: Environment, slow: Any, tmp_path: Path
) -> None:
    """Eight of them, one by one, of a model with no more places than its four rows."""
    repository, start = slow
    config = repository / "slow" / "config.pbtxt"
    config.write_text(re.sub(r"(max_candidate_sequences): \d+", r"\1: 4", config.read_text()))
    with running(environment, repository, tmp_path / "log") as (http, grpc), ExitStack() as stack:
        for _ in range(8):
            client = stack.enter_context(triton_grpc.InferenceServerClient(grpc))
            before, until_s = executions(http), time.monotonic() + 20
            cancel = start(client, 8, queue.Queue())
            while executions(http) < before + 2:
                assert time.monotonic() < until_s, "it has no place for the request"
                time.sleep(0.002)
            time.sleep(0.01)
            cancel()


def test_a_new_version_takes_over_while_the_server_runs(
    environment: Environment, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Beside the old one, which answers until the new one is loaded, and again when that is gone."""
    repository, bundles = tmp_path / "repository", [Bundle.load(make_bundle(is_guided)) for is_guided in (False, True)]
    request = Request(7, bundles[0].tableau("ddim", 2), 3)
    expected = [sha256([Engine(bundle, threads=1).generate([request])[0].to_uint8()]) for bundle in bundles]
    assert expected[0] != expected[1]
    asked = {"LABEL": 3, "SEED": 7, "SOLVER": "ddim", "STEPS": 2}
    write_model(bundles[0], repository, threads=1)
    explicit = ["--model-control-mode=explicit", "--load-model=digits"]
    with running(environment, repository, tmp_path / "log", arguments=explicit) as (http, _):

        def load() -> None:
            request = urllib.request.Request(f"http://{http}/v2/repository/models/digits/load", b"{}")
            with urllib.request.urlopen(request, timeout=60) as response:
                assert response.status == 200

        assert sha256([over_http(http, "digits", asked)]) == expected[0]
        with pytest.raises(
            RepositoryError, match=r"config\.pbtxt would be another; all versions of a model have one: giv"
        ):
            write_model(bundles[1], repository, name="digits", threads=1, version=2, max_rows=3)
        folder = write_model(bundles[1], repository, name="digits", threads=1, version=2)
        assert [model.version.name for model in read_repository(repository)] == ["2"]
        with pytest.raises(RepositoryError, match="exists already; --replace takes its place"):
            write_model(bundles[1], repository, name="digits", threads=1, version=2)
        with ThreadPoolExecutor(1) as pool:
            loaded = pool.submit(load)
            seen = []
            while not loaded.done():
                seen += sha256([over_http(http, "digits", asked)])
            loaded.result()
        assert set(seen) <= {expected[0][0], expected[1][0]}
        assert sha256([over_http(http, "digits", asked)]) == expected[1]
        shutil.rmtree(folder / "2")
        load()
        assert sha256([over_http(http, "digits", asked)]) == expected[0]


# --- without Python


@pytest.mark.parametrize(("solver", "steps"), [("ancestral", 4), ("dpmpp_2m", 3), ("heun", 3)])
def test_the_graph_gives_the_engines_pixels_from_the_inputs_that_its_configuration_names(
    make_bundle: Callable[..., Path], tmp_path: Path, solver: str, steps: int
) -> None:
    """In stock ONNX Runtime, with tensors as Triton passes them."""
    bundle = Bundle.load(make_bundle())
    folder = write_graph_model(bundle, tmp_path / "repository", solver=solver, steps=steps)
    config = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
    session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    tableau = bundle.tableau(solver, steps)
    requests = [Request(seed, tableau, label) for seed, label in ((0, 3), (2**63, 9), (17, 0))]
    given = graph_inputs(bundle, tableau, requests)
    kinds = {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)", "TYPE_UINT8": "tensor(uint8)"}
    assert [one.name for one in config.input] == [one.name for one in session.get_inputs()] == list(given)
    for one, node in zip((*config.input, *config.output), (*session.get_inputs(), *session.get_outputs()), strict=True):
        assert kinds[DataType.Name(one.data_type)] == node.type
        shape = list(one.reshape.shape) if one.HasField("reshape") else list(one.dims)
        assert ["batch", *shape] == list(node.shape)
    asked = {one.name: (one.data_type, list(one.dims)) for one in config.input}
    assert [warm_up.batch_size for warm_up in config.model_warmup] == [1, 16]
    for warm_up in config.model_warmup:
        assert {name: (one.data_type, list(one.dims)) for name, one in warm_up.inputs.items()} == asked
    (images,) = session.run(None, given)
    expected = np.stack([sample.to_uint8() for sample in Engine(bundle, threads=1).generate(requests)])
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1
    assert np.mean(images == expected) > 0.99


def test_a_graph_on_a_server_with_a_backend_for_it_gives_the_engines_pixels(
    environment: Environment, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Over HTTP and gRPC, alone, in batches and at once. The backend has to be built first, see docs/triton.md."""
    backend = os.environ.get("TRITON_ONNXRUNTIME_BACKEND")
    if backend is None:
        pytest.skip("TRITON_ONNXRUNTIME_BACKEND names no folder of it: PyPI's server has no onnxruntime backend")
    other = with_python_alone(environment, tmp_path / "triton")
    other.add_backend(Path(backend))
    bundle = Bundle.load(make_bundle())
    for solver, steps in (("ancestral", 4), ("dpmpp_2m", 3)):
        write_graph_model(bundle, tmp_path / "repository", solver=solver, steps=steps, name=solver, threads=1)
    write_model(bundle, tmp_path / "repository", variant="loop", name="loop", threads=1)
    verdicts = {model.name: verdict for model, verdict in check(tmp_path / "repository", other)}
    assert sorted(verdicts) == ["ancestral", "dpmpp_2m", "loop"]
    assert all(verdict is not None and verdict.is_right for verdict in verdicts.values())
    tableau = bundle.tableau("dpmpp_2m", 3)
    requests = [Request(seed, tableau, seed % 10) for seed in range(32)]
    expected = np.stack([sample.to_uint8() for sample in Engine(bundle, threads=1).generate(requests)]).astype(int)
    with running(other, tmp_path / "repository", tmp_path / "log") as (http, grpc):
        for module, address in ((triton_http, http), (triton_grpc, grpc)):
            with module.InferenceServerClient(address) as client:
                images = []
                for i, rows in ((0, 16), (16, 15), (31, 1)):
                    given = []
                    of_rows = triton_inputs(graph_inputs(bundle, tableau, requests[i : i + rows]))
                    for name, array in of_rows.items():
                        one = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
                        one.set_data_from_numpy(array)
                        given.append(one)
                    images.append(client.infer("dpmpp_2m", given).as_numpy("IMAGE"))
            got = np.concatenate(images).astype(int)
            assert np.abs(got - expected).max() <= 1
            assert np.mean(got == expected) > 0.99


def test_a_server_without_the_backend_of_a_graph_says_so(
    environment: Environment, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    write_graph_model(Bundle.load(make_bundle()), tmp_path / "repository", solver="ddim", steps=1, name="one")
    environment = with_python_alone(environment, tmp_path / "triton")
    with pytest.raises(TritonError, match=r"one: is for Triton's onnxruntime backend, which .* lacks; give it one"):
        refuse_without_backend(read_repository(tmp_path / "repository"), environment)
    with pytest.raises(TritonError, match=r"--backend: .*/onnxruntime: has no libtriton_onnxruntime\.so; a backend is"):
        environment.add_backend(tmp_path / "onnxruntime")


def test_the_graph_for_the_tensorrt_backend_is_what_tensorrt_takes(
    make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Its parser and builder make an engine of it, whose inputs and outputs are those that the configuration names.

    It is TensorRT for RTX, which builds without a GPU; Triton's is the full one.
    """
    bundle = Bundle.load(make_bundle())
    folder = write_graph_model(
        bundle, tmp_path / "repository", solver="dpmpp_2m", steps=2, max_rows=8, is_tensorrt=True
    )
    config = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    with pytest.raises(RepositoryError, match=r"model\.plan: is missing; with the server's TensorRT: cd .*/1 && trt"):
        read_repository(tmp_path / "repository")
    command = config.parameters["plan"].string_value
    assert "--minShapes=NOISE:1x3x1x8x8,LABEL:1 " in command
    assert command.endswith("--maxShapes=NOISE:8x3x1x8x8,LABEL:8")
    graph = folder / "1" / "model.onnx"
    assert len(build_engine(onnx.load(graph), batch=(1, 4, 8)).data) > 1000
    trt = tensorrt_of("rtx")
    builder = trt.Builder(logger := trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse_from_file(str(graph))
    values = [network.get_input(i) for i in range(network.num_inputs)] + [network.get_output(0)]
    kinds = {"TYPE_FP32": trt.float32, "TYPE_INT64": trt.int64, "TYPE_UINT8": trt.uint8}
    for one, value in zip((*config.input, *config.output), values, strict=True):
        assert (one.name, kinds[DataType.Name(one.data_type)]) == (value.name, value.dtype)
        shape = list(one.reshape.shape) if one.HasField("reshape") else list(one.dims)
        assert list(value.shape) == [-1, *shape]


def test_a_graphs_weights_beside_it_are_proved_too(
    make_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.export.onnx_file._OUTSIDE", 0)
    folder = write_graph_model(Bundle.load(make_bundle()), tmp_path / "repository", solver="ddim", steps=2)
    (model,) = read_repository(tmp_path / "repository")
    assert model.variant == "graph"
    data = folder / "1" / "model.onnx.data"
    weights = bytearray(data.read_bytes())
    weights[100] ^= 1
    data.write_bytes(weights)
    with pytest.raises(RepositoryError, match=r"model\.onnx: is missing or was altered; export the model again"):
        read_repository(tmp_path / "repository")
    data.unlink()
    with pytest.raises(RepositoryError, match=r"model\.onnx: is missing or was altered; export the model again"):
        read_repository(tmp_path / "repository")


def test_a_graph_of_a_student_that_calls_its_network_twice_is_refused(
    make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(RepositoryError, match="digits-guided calls its network twice a step: it has no whole-sampler"):
        write_graph_model(Bundle.load(make_bundle(is_guided=True)), tmp_path / "repository")


# --- Triton's queue

QUEUE = 4  # requests of a priority that may wait
HOLD = """
        import time
        folder = Path("{folder}")
        while (folder / "hold").exists():
            (folder / "held").touch()
            time.sleep(0.01)
"""


@dataclass(frozen=True)
class Command:
    """`fewstep triton serve`, of models that do one image at a time and can be told to take their time."""

    repository: Path
    http: str
    grpc: str
    metrics: str

    @contextmanager
    def held(self, model: str) -> Iterator[None]:
        """The model stays in its ``execute`` meanwhile, from the next request on."""
        hold = self.repository / model / "hold"
        hold.touch()
        try:
            yield
        finally:
            hold.unlink()
            hold.with_name("held").unlink()

    def is_held(self, model: str) -> bool:
        """Whether a request is in the model's ``execute``, and stays there."""
        return (self.repository / model / "held").exists()

    def num_waiting(self, model: str) -> int:
        """Requests in Triton's queue, by its metrics."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=30) as response:
            told = response.read().decode()
        found = re.search(rf'^nv_inference_pending_request_count{{model="{model}",.*}} (\d+)$', told, re.MULTILINE)
        assert found, told
        return int(found[1])


def wait_until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@pytest.fixture(scope="module")
def command(
    environment: Environment, make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Command]:
    """With one core for the rate limiter to give: `one` and `two` take it, `inflight` and `loop` take none."""
    assert environment == Environment.default()
    place = tmp_path_factory.mktemp("command")
    models: tuple[tuple[str, Variant, int | None], ...] = (
        ("one", "loop", 1), ("two", "loop", 1), ("loop", "loop", None), ("inflight", "inflight", 1),
    )  # fmt: skip
    for name, variant, threads in models:
        folder = write_model(
            Bundle.load(make_bundle()), place / "repository", variant=variant, name=name, threads=threads, max_rows=1
        )
        model = (folder / "1" / "model.py").read_text()
        model = model.replace("        self.execute = self._model.execute\n", "")
        execute = "        return self._model.execute(requests)\n"
        assert model.count(execute) == 1
        (folder / "1" / "model.py").write_text(model.replace(execute, HOLD.format(folder=folder) + execute))
        config = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
        assert config.dynamic_batching.default_queue_policy.max_queue_size == 1024
        config.dynamic_batching.default_queue_policy.max_queue_size = QUEUE
        (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
    http, grpc, metrics = free_ports(3)
    serve = [sys.executable, "-m", "fewstep", "triton", "serve", str(place / "repository"), f"--port={http}"]
    serve += [f"--grpc-port={grpc}", f"--metrics-port={metrics}", "--"]
    serve += ["--rate-limit=execution_count", "--rate-limit-resource=fewstep-cores:1"]
    serve += ["--exit-timeout-secs=3", "--disable-auto-complete-config"]
    with process_of(serve, os.environ, http, place / "log") as process:
        addresses = [f"127.0.0.1:{port}" for port in (http, grpc, metrics)]
        yield Command(place / "repository", *addresses)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 0  # the command is the server: one signal ends both


@pytest.mark.parametrize("model", ["inflight", "loop"])
def test_what_waits_in_tritons_queue_goes_by_priority_is_dropped_when_late_and_refused_when_too_much(
    command: Command, model: str
) -> None:
    """One request is in the model; four of low priority wait, then one that is late, four of high, too many."""
    ended: queue.Queue[tuple[str, Any]] = queue.Queue()
    given = inputs(triton_grpc, {"LABEL": 1, "SEED": 7})
    with triton_grpc.InferenceServerClient(command.grpc) as client:

        def ask(name: str, **options: Any) -> None:
            client.async_infer(model, given, lambda result, error: ended.put((name, error)), **options)

        with command.held(model):
            ask("first")
            wait_until(lambda: command.is_held(model))
            for _ in range(QUEUE):
                ask("low", priority=200)
            wait_until(lambda: command.num_waiting(model) == QUEUE)
            ask("late", priority=150, timeout=1000)
            for _ in range(QUEUE):
                ask("high", priority=1)
            wait_until(lambda: command.num_waiting(model) >= 2 * QUEUE)
            for _ in range(QUEUE + 2):
                ask("more", priority=200)
            refused = [ended.get(timeout=60) for _ in range(QUEUE + 1)]  # Triton may have one or two of four at hand
            label = {"name": "LABEL", "datatype": "INT64", "shape": [1, 1], "data": [1]}
            with pytest.raises(urllib.error.HTTPError) as over_http:
                post(command.http, f"{model}/infer", {"inputs": [label], "parameters": {"priority": 200}})
            assert over_http.value.code == 503
            over_http.value.close()
        answers = refused + [ended.get(timeout=60) for _ in range(3 * QUEUE + 4 - len(refused))]
    errors = {name: [error for one, error in answers if one == name and error] for name, _ in answers}
    assert [error.status() for error in errors["late"]] == ["StatusCode.UNAVAILABLE"]
    assert "Request timeout expired" in errors["late"][0].message()
    assert {error.status() for error in errors["more"]} == {"StatusCode.UNAVAILABLE"}
    assert all("Exceeds maximum queue size" in error.message() for error in errors["more"])
    assert QUEUE <= len(errors["more"]) <= QUEUE + 2
    assert not errors["first"] + errors["low"] + errors["high"]
    order = [name for name, error in answers if error is None]
    last = len(order) - order[::-1].index("high")
    assert order[:last].count("low") + order[:last].count("more") < QUEUE, (
        order
    )  # in the order of asking it would be all


def test_models_take_turns_where_the_rate_limiter_says_so(command: Command) -> None:
    """While one model is at work with the only core the other one with threads waits, and whoever comes behind that."""
    ended: queue.Queue[str] = queue.Queue()
    given = inputs(triton_grpc, {"LABEL": 1, "SEED": 7})
    for name, resources in (("one", [("fewstep-cores", 1)]), ("two", [("fewstep-cores", 1)]), ("loop", [])):
        config = text_format.Parse((command.repository / name / "config.pbtxt").read_text(), ModelConfig())
        assert [(one.name, one.count) for one in config.instance_group[0].rate_limiter.resources] == resources
    with triton_grpc.InferenceServerClient(command.grpc) as client:

        def ask(model: str) -> None:
            client.async_infer(model, given, lambda result, error: ended.put(f"{model}: {error}"))

        with command.held("one"):
            ask("one")
            wait_until(lambda: command.is_held("one"))
            ask("loop")
            assert ended.get(timeout=60) == "loop: None"
            ask("two")
            wait_until(lambda: command.num_waiting("two") == 1)
            ask("loop")
            time.sleep(1)
            assert ended.empty()
            assert command.num_waiting("two") == 1
        assert {ended.get(timeout=60) for _ in range(3)} == {"one: None", "two: None", "loop: None"}


# --- on a GPU


def initialized(module: ModuleType, folder: Path, kind: str, gpu: str) -> Any:
    """What the model's ``initialize`` makes, told as Triton tells it."""
    config = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
    instance = {"model_instance_kind": kind, "model_instance_device_id": gpu}
    told = MessageToJson(config, preserving_proto_field_name=True)
    name, where = folder.name, str(folder)
    return module.Student(
        {"model_config": told, "model_name": name, "model_repository": where, "model_version": "1", **instance}
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_model_for_a_gpu_runs_on_the_one_that_triton_gives_it(
    make_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On `lazy_cuda`'s stand-in for the GPU, to the CPU's bits; not run on a GPU yet."""
    bundle = Bundle.load(make_bundle())
    folder = write_model(bundle, tmp_path / "repository", device="cuda", max_rows=2, instances=3)
    (group,) = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig()).instance_group
    assert (group.kind, group.count, list(group.gpus)) == (group.KIND_GPU, 3, [])  # three on each GPU of the server
    assert "pip install numpy onnxruntime-gpu cupy-cuda12x pydantic" in (folder / "1" / "model.py").read_text()
    assert (folder / "1" / "fewstep" / "kernels" / "cuda.cu").is_file()
    utils: Any = ModuleType("triton_python_backend_utils")
    utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL = utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE = 0
    utils.TritonModelException = RuntimeError
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    module = importlib.import_module("fewstep.deploy.triton_model")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with pytest.raises(RuntimeError, match=r"^digits: its device is a GPU, but this instance is of KIND_CPU"):
        initialized(module, folder, "CPU", "0")
    with lazy_cuda.installed(tmp_path):
        monkeypatch.setattr(onnxruntime, "InferenceSession", lazy_cuda.CudaSession)
        engine = initialized(module, folder, "GPU", "1").engine
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
        requests = [Request(seed, bundle.tableau("dpmpp_2m", 3), seed) for seed in range(5)]
        there = engine.generate(requests)
    here = Engine(bundle, max_rows=2, threads=1).generate(requests)
    assert isinstance(engine._backend, OnnxCudaBackend)
    assert [one.pixels.tobytes() for one in there] == [one.pixels.tobytes() for one in here]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"device": "tensorrt"},
            r"precision: digits has no step engine in float32: it has none; fewstep export digits",
        ),
        ({"device": "cuda", "precision": "float16"}, r"precision: digits has float32, not 'float16'; fewstep export d"),
        ({"device": "cuda", "threads": 2}, r"--threads: is the CPU's choice; leave it out with --device cuda"),
        ({"precision": "int8"}, r"precision: digits has float32, not 'int8'; fewstep export digits -o FOLDER --prec"),
    ],
)
def test_a_device_or_precision_that_the_student_has_not_is_refused(
    make_bundle: Callable[..., Path], tmp_path: Path, how: dict[str, Any], message: str
) -> None:
    with pytest.raises((RepositoryError, BackendError, BundleError), match=f"^{message}"):
        write_model(Bundle.load(make_bundle()), tmp_path / "repository", **how)
    assert not (tmp_path / "repository").exists()


# --- what cannot be served


@pytest.fixture
def spoilt(make_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A repository of one model, to spoil."""
    write_model(Bundle.load(make_bundle()), tmp_path / "repository", threads=1)
    return tmp_path / "repository"


def refusal(environment: Environment, repository: Path, log: Path) -> str:
    """What Triton says in its log when it does not start."""
    with pytest.raises(TritonError) as refused, running(environment, repository, log):
        pass
    return str(refused.value)


def without(*parts: str) -> Callable[[Path], object]:
    """Take a file or a folder out of a model's folder."""
    return lambda model: shutil.rmtree(path) if (path := model.joinpath(*parts)).is_dir() else path.unlink()


# What may be wrong with a model: how it becomes so, what reading it says, and what Triton's log says.
SPOILT: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "altered": (
        lambda model: (model / "1" / "bundle" / "NOTICE").write_text("other\n"),
        "altered/1/bundle: NOTICE was altered: sha256",
        "altered: {folder}/altered/1/bundle: NOTICE was altered: sha256 ",
    ),
    "networkless": (
        without("1", "bundle", "model.onnx"),
        "networkless/1/bundle: model.onnx is missing",
        "networkless: {folder}/networkless/1/bundle: model.onnx is missing",
    ),
    "runtimeless": (
        without("1", "fewstep"),
        "fewstep/deploy/triton_model.py is missing; export the model again with --replace",
        "runtimeless: 1/fewstep is not whole (No module named 'fewstep'); export the model again with --replace",
    ),
    "versionless": (
        without("1"),
        "versionless: holds no version; there should be a folder 1",
        "at least one version must be available under the version policy of model 'versionless'",
    ),
    "textless": (
        lambda model: (model / "config.pbtxt").write_text("name: digits"),
        r"config.pbtxt: 1:7",
        "Poll failed for model directory 'textless': failed to read text proto from {folder}/textless/config.pbtxt",
    ),
    "renamed": (
        lambda model: model.rename(model.parent / "other"),
        "name is 'renamed', but must be the folder's, 'other'",
        "Poll failed for model directory 'other': unexpected directory name 'other' for model 'renamed',",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_bad_model_is_refused_in_one_line_when_it_is_read(
    make_bundle: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    spoil, message, _ = SPOILT[name]
    spoil(write_model(Bundle.load(make_bundle()), tmp_path, name=name))
    with pytest.raises(RepositoryError) as refused:
        read_repository(tmp_path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_repository_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="holds no model; write one: fewstep export BUNDLE --triton"):
        read_repository(tmp_path)


FRAGILE = """
reading, writing = requests_of, outputs_of


def requests_of(engine, tensors, parameters, limit):
    if 13 in tensors["SEED"]:
        raise RuntimeError("secret of reading")
    return reading(engine, tensors, parameters, limit)


def outputs_of(images, seeds, names):
    if 14 in seeds:
        raise RuntimeError("secret of writing")
    return writing(images, seeds, names)
"""


def test_triton_says_of_each_bad_model_in_one_line_what_is_wrong_and_serves_the_good_one(
    environment: Environment, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """All of them in one repository, and one for a GPU, which this server has not."""
    folder, bundle = tmp_path / "repository", Bundle.load(make_bundle())
    expected = {name: line.format(folder=folder) for name, (_, _, line) in SPOILT.items()}
    expected["gpu"] = "instance group gpu_0 of model gpu has kind KIND_GPU but no GPUs are available"
    write_model(bundle, folder, name="gpu", device="cuda")
    write_model(bundle, folder, name="good", threads=1)
    for name, (spoil, _, _) in SPOILT.items():
        spoil(write_model(bundle, folder, name=name))
    with (write_model(bundle, folder, name="fragile") / "1" / "fewstep/deploy/triton_model.py").open("a") as model:
        model.write(FRAGILE)
    on = ["--strict-readiness=false", "--exit-on-error=false"]
    with running(environment, folder, tmp_path / "log", arguments=on) as (http, _):
        assert over_http(http, "good", {"LABEL": 3}).shape == (8, 8, 1)
        for seed in (13, 14):  # what was not foreseen is told in a neutral line, and the model goes on
            with pytest.raises(
                InferenceServerException, match=r"server failed on this request; Triton's log says wh"
            ) as caught:
                over_http(http, "fragile", {"SEED": seed})
            assert "secret" not in str(caught.value)
        assert over_http(http, "fragile", {"SEED": 15}).shape == (8, 8, 1)
        log = (tmp_path / "log").read_text()
    assert all(f"RuntimeError: secret of {what}" in log for what in ("reading", "writing"))
    told = [line.partition("] ")[2].strip('"') for line in log.splitlines() if line.startswith("E")]
    told = [line.partition("\\n")[0] for line in told if "failed to load" in line or "Poll failed" in line]
    told = [line for line in told if "failed to load all models" not in line]
    assert len(told) == len(expected)
    for name, line in expected.items():
        assert len([one for one in told if line in one]) == 1, (name, told)


def altered(environment: Environment, folder: Path, **packages: Path | None) -> Environment:
    """The same server with another Python: some packages are elsewhere, or missing."""
    python = folder / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", python], check=True)
    (there,), (here,) = (
        list((path / "lib").glob("*/site-packages")) for path in (environment.folder / "python", python)
    )
    for package in there.iterdir():
        source = packages.get(package.name.replace(".", "_"), package)
        if source is not None:
            (here / package.name).symlink_to(source)
    for name in ("backends", "ready"):
        (folder / name).symlink_to(environment.folder / name)
    return Environment(folder)


def with_python_alone(environment: Environment, folder: Path) -> Environment:
    """The same server, without the backends that were added to it."""
    (folder / "backends").mkdir(parents=True)
    for name in ("python", "ready", "backends/python"):
        (folder / name).symlink_to(environment.folder / name)
    return Environment(folder)


def test_setup_installs_a_server_whole_or_not_at_all(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pip, from a wheel of the real server's Python backend alone: the others are hundreds of megabytes."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = environment.folder / "python" / "lib" / version / "site-packages"
    server = packages / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / version.removeprefix("python") / "triton_python_backend_stub"
    files = [stub, *(path for path in (server / "backends" / "python").iterdir() if path.is_file())]
    about = "nvidia_pytriton-0.7.0.dist-info"
    with zipfile.ZipFile(tmp_path / "nvidia_pytriton-0.7.0-py3-none-any.whl", "w") as wheel:
        for path in files:
            wheel.write(path, path.relative_to(packages))
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: nvidia-pytriton\nVersion: 0.7.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        names = [*(path.relative_to(packages) for path in files), f"{about}/METADATA", f"{about}/WHEEL"]
        wheel.writestr(f"{about}/RECORD", "".join(f"{name},,\n" for name in [*names, f"{about}/RECORD"]))
    requirements = tmp_path / "triton-requirements.txt"
    requirements.write_text("nvidia-pytriton==0.7.0\n")
    monkeypatch.setattr(triton_server, "_REQUIREMENTS", requirements)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    made = Environment(tmp_path / "cache" / "triton")
    made.folder.mkdir(parents=True)
    (made.folder / "ready").write_text("of another release of fewstep")
    made.make()
    assert made.is_ready
    assert made.has_backend("python")
    assert os.access(made.folder / "backends" / "python" / stub.name, os.X_OK)
    with pytest.raises(TritonError, match=r"python: ModuleNotFoundError: No module named 'numpy'; make it again: "):
        made.refuse_unready()
    there = made.folder.stat().st_ino
    made.make()  # nothing is done

    requirements.write_text("nvidia-pytriton==0.8.0\n")
    with pytest.raises(TritonError, match=r"^triton-requirements.txt cannot be installed: ERROR: .*nvidia-pytriton"):
        made.make()
    assert made.folder.stat().st_ino == there
    assert [path.name for path in made.folder.parent.iterdir()] == ["triton"]


def test_numpy_2_is_refused_by_the_check_and_by_triton(environment: Environment, spoilt: Path, tmp_path: Path) -> None:
    """The numpy of this process; with it, Triton would load the model and give outputs without data."""
    ours = Path(sysconfig.get_path("purelib"))
    other = altered(environment, tmp_path / "triton", numpy=ours / "numpy", numpy_libs=ours / "numpy.libs")
    with pytest.raises(TritonError, match=rf"has numpy {np.__version__}; this server needs numpy 1\.26"):
        other.refuse_unready()
    told = refusal(other, spoilt, tmp_path / "log")
    assert f"has numpy {np.__version__}, whose arrays this server cannot read: install 'numpy<2'" in told


def test_a_python_without_what_students_need_is_refused_by_the_check_and_by_triton(
    environment: Environment, spoilt: Path, tmp_path: Path
) -> None:
    other = altered(environment, tmp_path / "triton", onnxruntime=None)
    with pytest.raises(TritonError, match=r"No module named 'onnxruntime'; make it again: rm -r .*triton && fewstep"):
        other.refuse_unready()
    told = refusal(other, spoilt, tmp_path / "log")
    assert "lacks what the student needs (No module named 'onnxruntime'): pip install numpy onnxruntime" in told
    with pytest.raises(TritonError, match="no Triton server; make it with: fewstep triton setup"):
        Environment(tmp_path / "nothing").refuse_unready()


def test_the_commands_write_and_check_a_repository(
    environment: Environment,
    make_bundle: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = with_python_alone(environment, tmp_path / "triton").folder

    def fewstep(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["fewstep", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, told.out + told.err

    assert fewstep("triton", "setup", server) == (0, f"{server}: a Triton server, ready\n")
    export = ("export", make_bundle(), "--triton", tmp_path / "repository", "--threads", "1")
    assert fewstep(*export)[0] == 0
    assert fewstep(*export) == (
        2,
        f"fewstep: {tmp_path}/repository/digits: exists already; --replace takes its place\n",
    )
    assert fewstep(*export, "--replace", "--variant", "iterative", "--decoupled")[0] == 0
    assert fewstep(*export, "--variant", "whole")[1] == (
        "fewstep: --variant: 'whole' is not one of inflight, iterative, loop, graph\n"
    )
    assert fewstep(*export, "--version", "two")[1] == (
        "fewstep: --version: 'two': the versions of Triton's models are 1, 2 and so on\n"
    )
    assert fewstep(*export, "--device", "gpu")[1] == "fewstep: --device: 'gpu' is not one of cpu, cuda, tensorrt\n"
    told = "fewstep: --precision: a graph is float32, and Triton chooses where it runs; leave it out\n"
    assert fewstep(*export, "--variant", "graph", "--precision", "float16")[1] == told
    assert fewstep(*export, "--variant", "graph", "--steps", "8", "--max-rows", "2")[0] == 0
    whole = "digits-ancestral-8 (graph): is whole; it was held against the engine when it was written, and not asked"
    whole += ": no onnxruntime backend that check knows\n"
    right = "digits (iterative, decoupled): 51 alone and 51 at once of 51 requests have the right pixels\n"
    assert fewstep("triton", "check", tmp_path / "repository", "--environment", server) == (0, whole + right)
    (tmp_path / "repository" / "digits-ancestral-8" / "1" / "model.onnx").write_bytes(b"")
    assert (
        "model.onnx: is missing or was altered"
        in fewstep("triton", "check", tmp_path / "repository", "--environment", server)[1]
    )
    assert fewstep("triton", "check", tmp_path / "no") == (2, f"fewstep: {tmp_path}/no: there is no such folder\n")
