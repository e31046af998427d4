"""``POST /v1/images/generations``: OpenAI's images protocol, with our words beside it.

Fields OpenAI has and we add nothing to (``quality``, ``user``, ...) are accepted and ignored; a field nobody
knows is refused by name, since a misspelt ``seed`` would otherwise be silently random.
"""

import asyncio
import base64
import difflib
import json
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json
from starlette.types import Scope

from ..runtime import Engine, Preview, Request, Sample
from ..runtime.call import deadline_after, refuse_too_many, request_of, some_seed
from ..runtime.pictures import ImageFormat, encode
from .bodies import EventStream, event_of, read_body
from .errors import ApiError, refusals
from .generation import Door, encoded, engine_of, evenly, follow, image_limit, outcome, submit, unless_gone
from .jobs import Started
from .service import Service

IMAGES = "/v1/images/generations"
_NAMES = {"num_steps": "num_inference_steps", "guidance": "guidance_scale"}


class ImageRequest(BaseModel):
    """The body of a generation request."""

    model_config = ConfigDict(extra="forbid", title="ImageRequest")

    prompt: str | int = Field(default="", description="A class name or a label number of the student.")
    model: str | None = Field(default=None, description="The student; left out, the first one served.")
    n: int = Field(default=1, ge=1, description="How many images; image i uses seed + i.")
    size: str | None = Field(default=None, description="'auto' or the student's own size, such as '28x28'.")
    response_format: Literal["b64_json", "url"] | None = Field(
        default=None, description="Base64 (default), or the same as a data: URL."
    )
    output_format: ImageFormat | None = Field(default=None, description="png (default), jpeg or webp.")
    seed: int | None = Field(default=None, ge=0, lt=2**64, description="Left out, a random one, which is returned.")
    num_inference_steps: int | None = Field(default=None, ge=1, description="Network calls per image.")
    min_steps: int | None = Field(
        default=None, ge=1, description="With deadline_ms: at least so many calls; the most that fit are taken."
    )
    max_steps: int | None = Field(default=None, ge=1, description="With deadline_ms: at most so many calls.")
    solver: str | None = Field(default=None, description="Name of one of the student's tables.")
    guidance_scale: float | None = Field(default=None, description="1 is no guidance.")
    guidance_rescale: float | None = Field(default=None, description="Share, 0 to 1, for two-call guidance.")
    dynamic_thresholding: float | None = Field(default=None, description="A quantile, such as 0.995.")
    priority: int = Field(default=0, ge=-100, le=100, description="A higher one is started first.")
    deadline_ms: float | None = Field(default=None, gt=0, description="Give up after so many milliseconds.")
    stream: bool | None = Field(default=None, description="Answer in events: partial images, then the images.")
    partial_images: int | None = Field(
        default=None, ge=0, le=1000, description="With stream: at most so many previews of each image; default 0."
    )
    # OpenAI's, without meaning here:
    background: str | None = None
    moderation: str | None = None
    output_compression: int | None = None
    quality: str | None = None
    style: str | None = None
    user: str | None = None


class GeneratedImage(BaseModel):
    """One image of an answer."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class Timings(BaseModel):
    """Where the time of a request went, in milliseconds; of its last image."""

    queue_ms: float
    run_ms: float
    encode_ms: float
    total_ms: float


class ImageResponse(BaseModel):
    """The answer to a generation request."""

    created: int
    data: list[GeneratedImage]
    model: str
    solver: str
    num_inference_steps: int
    tableau_sha256: str
    guidance_scale: float
    size: str
    output_format: str
    timings: Timings


async def generate_images(http: HttpRequest, service: Service) -> Response:
    """Answer one generation request.

    Raises:
        ApiError: it cannot be answered; nothing of it was kept.
        ClientGone: nobody waits for the answer.
    """
    arrived_s = time.perf_counter()
    asked = parse(await read_body(http, service.settings))
    try:
        if not asked.stream:
            return await unless_gone(http.receive, start(service, asked, arrived_s).answer)
        engine = engine_of(service, asked.model)
        images = follow(service, engine, _requests(service, engine, asked), evenly(asked.partial_images or 0))
        return EventStream(_events(service, engine, asked, images), _failure)
    except ApiError as error:
        raise in_openai_words(error) from None


def start(service: Service, asked: ImageRequest, arrived_s: float) -> Started:
    """Begin what a request asks for, whatever becomes of the answer.

    Raises:
        ApiError: it was refused; nothing of it was kept.
    """
    engine = engine_of(service, asked.model)
    futures = submit(service, engine, _requests(service, engine, asked))
    answer = partial(_answer, engine, asked, arrived_s)
    return Started(engine, futures, outcome(service, engine, futures, answer))


def in_openai_words(error: ApiError) -> ApiError:
    """An error with this protocol's names of the fields."""
    return error.renamed(_NAMES)


def _begin(service: Service, _: Scope, body: bytes, arrived_s: float) -> "asyncio.Future[Response] | None":
    asked = parse(body)
    return None if asked.stream else start(service, asked, arrived_s).answer


DOOR = Door(re.compile(IMAGES), _begin, lambda error: in_openai_words(error).response())


async def start_job(http: HttpRequest, service: Service, name: str | None) -> Response:
    """Begin the work of a generation request, and answer with the job.

    Raises:
        ApiError: it cannot be answered; nothing of it was kept.
    """
    arrived_s = time.perf_counter()
    body = await read_body(http, service.settings)
    asked = parse(body)
    if asked.stream:
        raise ApiError(400, "stream: a job is not streamed; leave it out", param="stream")
    try:
        job, is_new = service.jobs.start(body, name, lambda: start(service, asked, arrived_s))
    except ApiError as error:
        raise in_openai_words(error) from None
    return JSONResponse(job.describe(), 202 if is_new else 200, {"Location": f"/v1/jobs/{job.id}"})


def parse(body: bytes) -> ImageRequest:
    """The body of a request.

    Raises:
        ApiError: it is none.
    """
    try:
        return ImageRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json") from None
        if first["type"] == "extra_forbidden" and field:
            near = difflib.get_close_matches(field, ImageRequest.model_fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ApiError(400, f"{field} is not a field{hint}", param=field, code="unknown_field") from None
        given = json.dumps(first["input"], default=str)
        problem = first["msg"][0].lower() + first["msg"][1:]
        message = f"{field}: {problem}, got {given[:80]}" if field else f"the body: {problem}"
        raise ApiError(400, message, param=field) from None


def _requests(service: Service, engine: Engine, asked: ImageRequest) -> list[Request]:
    manifest = engine.bundle.manifest
    _, height, width = manifest.sample_shape
    if asked.size not in (None, "auto", f"{width}x{height}"):
        raise ApiError(400, f"size: {manifest.name} makes {width}x{height}, got {asked.size!r}", param="size")
    seed = some_seed() if asked.seed is None else asked.seed
    with refusals:
        refuse_too_many(asked.n, image_limit(service, engine))
        first = request_of(
            engine, seed=seed, prompt=str(asked.prompt), num_steps=asked.num_inference_steps, min_steps=asked.min_steps,
            max_steps=asked.max_steps, solver=asked.solver, guidance=asked.guidance_scale,
            guidance_rescale=asked.guidance_rescale, dynamic_thresholding=asked.dynamic_thresholding,
            priority=asked.priority, deadline_s=deadline_after(asked.deadline_ms),
        )  # fmt: skip
    return [first, *(replace(first, seed=(seed + i) % 2**64) for i in range(1, asked.n))]


def _answer(engine: Engine, asked: ImageRequest, arrived_s: float, samples: list[Sample]) -> Response:
    start_s = time.perf_counter()
    image_format = asked.output_format or "png"
    images = [base64.b64encode(encode(sample.to_uint8(), image_format)).decode("ascii") for sample in samples]
    now_s = time.perf_counter()
    request, last = samples[0].request, max(samples, key=lambda sample: sample.queue_s + sample.run_s)
    _, height, width = engine.bundle.manifest.sample_shape
    data: list[dict[str, Any]] = [
        {"url": f"data:image/{image_format};base64,{image}", "seed": sample.request.seed}
        if asked.response_format == "url"
        else {"b64_json": image, "seed": sample.request.seed}
        for image, sample in zip(images, samples, strict=True)
    ]
    answer = {
        "created": int(time.time()),
        "data": data,
        **_said(engine, request),
        "size": f"{width}x{height}",
        "output_format": image_format,
        "timings": {
            "queue_ms": _ms(last.queue_s),
            "run_ms": _ms(last.run_s),
            "encode_ms": _ms(now_s - start_s),
            "total_ms": _ms(now_s - arrived_s),
        },
    }
    return Response(to_json(answer), media_type="application/json")


def _ms(seconds: float) -> float:
    """Milliseconds, to the microsecond."""
    return round(seconds * 1000, 3)


async def _events(
    service: Service, engine: Engine, asked: ImageRequest, images: AsyncGenerator[tuple[int, Preview | Sample]]
) -> AsyncGenerator[bytes]:
    """The answer as OpenAI's events: partial images, then each image when it is finished."""
    shown = [0] * asked.n
    async with aclosing(images):
        async for i, image in images:
            body = await encoded(service, engine, 1, _event, engine, asked, i, image, shown[i])
            shown[i] += 1
            yield body


def _failure(error: ApiError) -> dict[str, Any]:
    return {"type": "error", **in_openai_words(error).body()}


def _event(engine: Engine, asked: ImageRequest, i: int, image: Preview | Sample, number: int) -> bytes:
    image_format = asked.output_format or "png"
    _, height, width = engine.bundle.manifest.sample_shape
    event: dict[str, Any] = {
        "type": "image_generation.completed",
        "b64_json": base64.b64encode(encode(image.to_uint8(), image_format)).decode("ascii"),
        "created_at": int(time.time()),
        "size": f"{width}x{height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": image_format,
        "image_index": i,
    }
    if isinstance(image, Preview):
        event |= {"type": "image_generation.partial_image", "partial_image_index": number, "step": image.step}
        event["num_inference_steps"] = image.num_steps
    else:
        none = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
        event["usage"] = {**none, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}
        event["seed"] = image.request.seed
        event |= _said(engine, image.request)
    return event_of(event)


def _said(engine: Engine, request: Request) -> dict[str, Any]:
    """What a request that left things out was given."""
    guidance = engine.bundle.manifest.guidance.default if request.guidance is None else request.guidance
    return {
        "model": engine.bundle.name,
        "solver": request.tableau.name,
        "num_inference_steps": request.tableau.num_steps,
        "tableau_sha256": request.tableau.sha256,
        "guidance_scale": guidance,
    }
