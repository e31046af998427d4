"""Previews: what a running sample is going to be, from the engine and as OpenAI's clients take them."""

import asyncio
import base64
import http.client
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from fewstep.runtime import Bundle, Engine, Preview, Request

Address = tuple[str, int]
Serving = Callable[..., AbstractContextManager[tuple[Any, Address]]]


@pytest.fixture(scope="module")
def address(serving: Serving, make_bundle: Callable[..., Path]) -> Iterator[Address]:
    with serving(make_bundle(), "--max-rows", "4") as (_, address):
        yield address


def decode(image: str | None) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image or ""))))


def finish(engine: Engine) -> None:
    while engine.step():
        pass


# --- from the engine


def test_previews_come_after_each_call_but_the_last_and_only_to_those_who_ask(baked: Bundle) -> None:
    engine = Engine(baked, threads=1)
    seen: list[tuple[int, int, int]] = []
    table = baked.tableau("ddim", 4)
    asked = engine.submit(
        [Request(1, table, 3), Request(2, baked.tableau("ancestral", 2), 4)],
        lambda i, preview: seen.append((i, preview.step, preview.num_steps)),
    )
    others = engine.submit([Request(3, table, 3)])
    finish(engine)
    assert sorted(seen) == [(0, 1, 4), (0, 2, 4), (0, 3, 4), (1, 1, 2)]
    assert all(future.done() for future in (*asked, *others))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_preview_is_the_image_that_one_step_less_would_give(guided: Bundle, guidance: float) -> None:
    """The first DDIM step of one ends at x0, which is what a longer run's first call predicts from the same noise."""
    engine = Engine(guided, threads=1)
    seen: list[Preview] = []
    engine.submit([Request(5, guided.tableau("ddim", 4), 2, guidance)], lambda _, preview: seen.append(preview))
    finish(engine)
    (one,) = engine.generate([Request(5, guided.tableau("ddim", 1), 2, guidance)])
    assert np.abs(seen[0].pixels - one.pixels).max() < 1e-4 * np.abs(one.pixels).max()


def test_previews_do_not_change_the_sample(baked: Bundle) -> None:
    engine = Engine(baked, threads=1)
    request = Request(9, baked.tableau("ancestral", 8), 1)
    (plain,) = engine.generate([request])
    (watched,) = engine.submit([request], lambda *_: None)
    finish(engine)
    assert np.array_equal(watched.result().pixels, plain.pixels)


def test_a_preview_that_is_not_taken_harms_nobody(baked: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(baked, threads=1)

    def refuse(i: int, preview: Preview) -> None:
        raise RuntimeError("no")

    table = baked.tableau("ddim", 4)
    futures = engine.submit([Request(1, table, 3)], refuse) + engine.submit([Request(2, table, 3)])
    finish(engine)
    assert [future.result().request.seed for future in futures] == [1, 2]
    assert len(caplog.records) == 1


# --- over OpenAI's protocol


def test_the_stock_client_streams_partial_images_and_the_image(address: Address) -> None:
    with openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none") as client:
        body = {"seed": 5, "solver": "ddim", "num_inference_steps": 4}
        asked: dict[str, Any] = {"model": "digits", "prompt": "digit 7"}
        events = list(client.images.generate(**asked, stream=True, partial_images=2, extra_body=body))
        answer = client.images.generate(**asked, extra_body=body)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events if event.type == "image_generation.partial_image"] == [0, 1]
    assert [decode(event.b64_json).shape for event in events] == [(8, 8)] * 3
    assert answer.data is not None
    assert events[-1].b64_json == answer.data[0].b64_json
    assert len({event.b64_json for event in events}) == 3


@pytest.mark.parametrize(("wanted", "given"), [(0, 0), (1, 1), (3, 3), (7, 7), (100, 7)])
def test_as_many_partial_images_as_asked_for_or_as_there_are(address: Address, wanted: int, given: int) -> None:
    async def stream() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none") as client:
            events = await client.images.generate(
                prompt="1", stream=True, partial_images=wanted, extra_body={"num_inference_steps": 8, "seed": 1}
            )
            return [event async for event in events]

    events = asyncio.run(stream())
    assert [event.type for event in events].count("image_generation.partial_image") == given
    assert events[-1].type == "image_generation.completed"
    assert events[-1].model_dump()["seed"] == 1


def test_several_images_are_told_apart(address: Address) -> None:
    with openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none") as client:
        events = list(client.images.generate(prompt="1", n=3, stream=True, partial_images=1, extra_body={"seed": 4}))
        answer = client.images.generate(prompt="1", n=3, extra_body={"seed": 4})
    assert answer.data is not None
    said = [event.model_dump() for event in events if event.type == "image_generation.completed"]
    finals = {event["image_index"]: event["b64_json"] for event in said}
    assert [finals[i] for i in range(3)] == [image.b64_json for image in answer.data]


def test_a_refused_stream_is_an_ordinary_error(address: Address) -> None:
    with (
        openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none") as client,
        pytest.raises(openai.BadRequestError, match="num_inference_steps: digits has no table"),
    ):
        client.images.generate(prompt="1", stream=True, extra_body={"num_inference_steps": 77})


def test_an_error_within_a_stream_is_raised_by_the_client(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    with (
        serving(make_bundle(nan_label=3)) as (_, address),
        openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none") as client,
    ):
        events = client.images.generate(prompt="3", stream=True)
        with pytest.raises(openai.APIError, match="not finite"):
            list(events)


def test_closing_the_stream_cancels(address: Address) -> None:
    def metric(name: str, **labels: str) -> float:
        connection = http.client.HTTPConnection(*address, timeout=30)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        families = text_string_to_metric_families(text)
        found = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in found if labels.items() <= sample.labels.items())

    before = metric("nv_inference_request_failure", reason="CANCELED")
    with openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none") as client:
        body = {"num_inference_steps": 8}
        events = client.images.generate(prompt="1", n=64, stream=True, partial_images=1, extra_body=body)
        next(iter(events))
        events.close()
    start_s = time.monotonic()
    while metric("fewstep_running_rows") + metric("nv_inference_pending_request_count"):
        assert time.monotonic() - start_s < 20
        time.sleep(0.01)
    assert metric("nv_inference_request_failure", reason="CANCELED") > before


def test_events_are_server_sent_events(address: Address) -> None:
    connection = http.client.HTTPConnection(*address, timeout=30)
    body = json.dumps({"prompt": "1", "stream": True, "partial_images": 1}).encode()
    connection.request("POST", "/v1/images/generations", body)
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    lines = answer.read().decode().split("\n\n")
    connection.close()
    assert [json.loads(line.removeprefix("data: "))["type"].rpartition(".")[2] for line in lines if line] == [
        "partial_image",
        "completed",
    ]
