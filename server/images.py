"""``POST /v1/images/generations``: OpenAI's images protocol, with our words beside it.

Fields OpenAI has and we add nothing to (``quality``, ``user``, ...) are accepted and ignored; a field nobody
knows is refused by name, since a misspelt ``seed`` would otherwise be silently random.
"""

import asyncio
import base64
import difflib
import json
import secrets
import time
from typing import Any, Literal

from fastapi import Request as HttpRequest
from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..runtime import DeadlineExpired, Engine, EngineStopped, QueueFull, Request, Sample, SampleFailed
from ..runtime.pictures import ImageFormat, encode
from .errors import ApiError
from .service import Service

CLIENT_CLOSED = 499  # nobody reads it; it is for the log


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
    solver: str | None = Field(default=None, description="Name of one of the student's tables.")
    guidance_scale: float | None = Field(default=None, description="1 is no guidance.")
    priority: int = Field(default=0, ge=-100, le=100, description="A higher one is started first.")
    deadline_ms: float | None = Field(default=None, gt=0, description="Give up after so many milliseconds.")
    stream: Literal[False] | None = None
    # OpenAI's, without meaning here:
    background: str | None = None
    moderation: str | None = None
    output_compression: int | None = None
    partial_images: int | None = None
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
    """
    arrived_s = time.perf_counter()
    asked = _parse(await read_body(http, service.settings.max_body_bytes))
    engine = _engine(service, asked.model)
    requests = _requests(engine, asked, service.settings.max_images)
    if service.is_draining:
        raise _draining()
    samples = await _run(http, engine, requests)
    if samples is None:
        return Response(status_code=CLIENT_CLOSED)
    loop = asyncio.get_running_loop()
    body = await loop.run_in_executor(service.encoders, _answer, engine, asked, samples, arrived_s)
    return Response(body, media_type="application/json")


def _draining() -> ApiError:
    return ApiError(503, "the server is shutting down", code="draining", retry_after_s=1)


async def read_body(http: HttpRequest, limit: int) -> bytes:
    """The body of a request, of which no more than ``limit`` bytes are ever held."""
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    return bytes(body)


def _parse(body: bytes) -> ImageRequest:
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
        if field == "stream":
            raise ApiError(400, "stream: this server answers in one piece; leave it out", param="stream") from None
        given = json.dumps(first["input"], default=str)
        problem = first["msg"][0].lower() + first["msg"][1:]
        message = f"{field}: {problem}, got {given[:80]}" if field else f"the body: {problem}"
        raise ApiError(400, message, param=field) from None


def _engine(service: Service, model: str | None) -> Engine:
    engine = service.engines.get(model or service.default)
    if engine is None:
        served = ", ".join(service.engines)
        raise ApiError(
            404, f"model: {model!r} is not served; there is: {served}", param="model", code="model_not_found"
        )
    return engine


def _requests(engine: Engine, asked: ImageRequest, max_images: int) -> list[Request]:
    manifest = engine.bundle.manifest
    _, height, width = manifest.sample_shape
    if asked.n > (limit := min(max_images, engine.max_waiting)):
        raise ApiError(400, f"n: at most {limit} images in one request, got {asked.n}", param="n")
    if asked.size not in (None, "auto", f"{width}x{height}"):
        raise ApiError(400, f"size: {manifest.name} makes {width}x{height}, got {asked.size!r}", param="size")
    label = None
    text = str(asked.prompt)
    if manifest.labels and (text.strip() or manifest.labels.null is None):
        try:
            label = manifest.labels.parse(text)
        except ValueError as error:
            raise ApiError(400, f"prompt: {error}", param="prompt", code="unknown_label") from None
    try:
        tableau = engine.tableau(asked.solver, asked.num_inference_steps)
    except ValueError as error:
        field = "num_inference_steps" if asked.num_inference_steps else "solver"
        raise ApiError(400, f"{field}: {error}", param=field, code="no_such_table") from None
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    deadline_s = None if asked.deadline_ms is None else time.monotonic() + asked.deadline_ms / 1000
    return [
        Request((seed + i) % 2**64, tableau, label, asked.guidance_scale, asked.priority, deadline_s)
        for i in range(asked.n)
    ]


async def _run(http: HttpRequest, engine: Engine, requests: list[Request]) -> list[Sample] | None:
    """The samples, or None when the client went away first; then its requests are cancelled."""
    try:
        futures = engine.submit(requests)
    except QueueFull as error:
        raise ApiError(429, str(error), code="queue_full", retry_after_s=error.retry_after_s) from None
    except EngineStopped:
        raise _draining() from None
    except ValueError as error:
        field = {"guidance": "guidance_scale"}.get(name := str(error).partition(":")[0], name)
        raise ApiError(400, str(error), param=field) from None
    samples = asyncio.gather(*map(asyncio.wrap_future, futures))
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait((samples, gone), return_when=asyncio.FIRST_COMPLETED)
        return await samples if samples.done() else None
    except DeadlineExpired as error:
        raise ApiError(504, f"deadline_ms: {error}", param="deadline_ms", code="deadline_expired") from None
    except SampleFailed as error:
        raise ApiError(500, str(error), code="sample_failed") from None
    finally:
        gone.cancel()
        for future in futures:
            future.cancel()  # no effect on those that are done


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _answer(engine: Engine, asked: ImageRequest, samples: list[Sample], arrived_s: float) -> bytes:
    start_s = time.perf_counter()
    image_format = asked.output_format or "png"
    images = [base64.b64encode(encode(sample.to_uint8(), image_format)).decode("ascii") for sample in samples]
    now_s = time.perf_counter()
    request, last = samples[0].request, max(samples, key=lambda sample: sample.queue_s + sample.run_s)
    guidance = engine.bundle.manifest.guidance.default if request.guidance is None else request.guidance
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
        "model": engine.bundle.name,
        "solver": request.tableau.name,
        "num_inference_steps": request.tableau.num_steps,
        "tableau_sha256": request.tableau.sha256,
        "guidance_scale": guidance,
        "size": f"{width}x{height}",
        "output_format": image_format,
        "timings": {
            "queue_ms": round(last.queue_s * 1000, 3),
            "run_ms": round(last.run_s * 1000, 3),
            "encode_ms": round((now_s - start_s) * 1000, 3),
            "total_ms": round((now_s - arrived_s) * 1000, 3),
        },
    }
    return json.dumps(answer, separators=(",", ":")).encode()
