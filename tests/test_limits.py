"""The limit on steps, on every protocol and wherever a table could come from."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from conftest import free_port
from tritonclient.utils import InferenceServerException

import fewstep
from fewstep.runtime.schedules import karras
from fewstep.runtime.solvers import dpmpp_2m

Serving = Callable[..., AbstractContextManager[tuple[Any, tuple[str, int]]]]
Where = tuple[str, str]  # of HTTP and of gRPC
REFUSED = "at most 4 steps are served here, got 8"


@pytest.fixture(scope="module")
def where(serving: Serving, make_bundle: Callable[..., Path]) -> Iterator[Where]:
    port = free_port()
    flags = ("--set", "max_steps=4", "--grpc-port", str(port), "--repository", make_bundle().parent)
    with serving(make_bundle(), *flags) as (_, address):
        yield f"{address[0]}:{address[1]}", f"127.0.0.1:{port}"


def test_more_steps_are_refused_on_every_protocol_by_the_fields_name(where: Where) -> None:
    with openai.OpenAI(base_url=f"http://{where[0]}/v1", api_key="none") as client:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=f"num_inference_steps: {REFUSED}") as error:
                client.images.generate(prompt="1", stream=stream, extra_body={"num_inference_steps": 8})
            assert error.value.param == "num_inference_steps"
    with fewstep.Client(f"http://{where[0]}") as ours, pytest.raises(fewstep.ClientError, match=REFUSED) as refused:
        ours.submit("1", num_inference_steps=8)
    assert (refused.value.status, refused.value.field) == (400, "num_inference_steps")
    for module, at in ((triton_http, where[0]), (triton_grpc, where[1])):
        steps = module.InferInput("STEPS", [1], "INT32")
        steps.set_data_from_numpy(np.array([8], np.int32))
        with module.InferenceServerClient(at) as triton:
            with pytest.raises(InferenceServerException, match=f"STEPS: {REFUSED}"):
                triton.infer("digits", [steps])
            assert triton.infer("digits", []).as_numpy("IMAGE").shape == (1, 8, 8, 1)
    answers: list[Any] = []
    with triton_grpc.InferenceServerClient(where[1]) as streaming:
        streaming.start_stream(lambda result, error: answers.append(error))
        streaming.async_stream_infer("digits", [], parameters={"steps": 8})
        streaming.stop_stream()
    assert [REFUSED in str(error) for error in answers] == [True]


def test_tables_of_more_steps_are_neither_listed_nor_chosen_nor_loaded(where: Where, tmp_path: Path) -> None:
    with fewstep.Client(f"http://{where[0]}") as client:
        assert {table.num_steps for table in client.tables("digits")} == {1, 2, 3, 4}
        assert client.generate("1", min_steps=2, deadline_ms=60_000).num_inference_steps == 4
        dpmpp_2m(karras(6)).save(tmp_path / "t.safetensors")
        with pytest.raises(fewstep.ClientError, match="400: dpmpp_2m: has 6 steps, at most 4 are served here"):
            client.load_table("digits", tmp_path / "t.safetensors")
    with triton_http.InferenceServerClient(where[0]) as triton:
        triton.load_model("digits", config=json.dumps({"bundle": "student"}))  # again, and with the limit again
    with fewstep.Client(f"http://{where[0]}") as client, pytest.raises(fewstep.ClientError, match=REFUSED):
        client.generate("1", num_inference_steps=8)


def test_a_student_whose_default_is_beyond_the_limit_is_not_served(make_bundle: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "fewstep", "serve", str(make_bundle()), "--set", "max_steps=3", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "fewstep: max_steps = 3: digits has 4 steps where nothing else is said\n"
