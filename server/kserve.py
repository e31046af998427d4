"""The Open Inference Protocol (KServe v2) over HTTP, with Triton's extensions; see `inference` for the tensors.

    GET   /v2, /v2/models/{model}, .../ready, .../config, .../stats
    POST  /v2/models/{model}/infer, .../generate, .../generate_stream
    POST  /v2/repository/index, /v2/repository/models/{model}/load, .../unload

Bodies are read raw: stock clients send binary tensors without a Content-Type. Every error is ``{"error": "one line"}``.
"""

import asyncio
import base64
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import Scope

from ..runtime import Engine, Preview, Request, Sample
from .bodies import EventStream, event_of, packed, read_body
from .errors import ApiError
from .generation import Door, encoded, engine_of, follow, make, unless_gone
from .inference import (
    DEFAULT_OUTPUTS,
    INPUTS,
    NAMES,
    OUTPUTS,
    UNSERVED,
    Array,
    from_bytes,
    from_values,
    model_config,
    model_metadata,
    model_statistics,
    outputs_of,
    refuse_unknown_output,
    requests_of,
    server_metadata,
    tensor_of,
    to_bytes,
)
from .service import Service

HEADER_LENGTH = "Inference-Header-Content-Length"
_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/(infer|generate)\Z")
_UNSERVED_PATHS = (
    "/v2/systemsharedmemory/{rest:path}", "/v2/cudasharedmemory/{rest:path}", "/v2/logging", "/v2/trace/setting",
    "/v2/models/{model}/trace/setting",
)  # fmt: skip
_Json = dict[str, Any]
_Answer = Callable[[list[Sample]], Response]


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the protocol's routes to an application."""

    def add(path: str, method: str, answer: Callable[[HttpRequest], Awaitable[Response]]) -> None:
        async def door(http: HttpRequest) -> Response:
            try:
                return await answer(http)
            except ApiError as error:
                return _refusal(error)

        app.add_route(path, door, methods=[method], include_in_schema=False)

    def named(http: HttpRequest) -> Engine:
        return engine_of(service, http.path_params["model"], http.path_params.get("version"))

    async def server(_: HttpRequest) -> Response:
        return JSONResponse(server_metadata())

    async def all_stats(_: HttpRequest) -> Response:
        return JSONResponse({"model_stats": [model_statistics(engine) for engine in service.engines.values()]})

    async def metadata(http: HttpRequest) -> Response:
        return JSONResponse(model_metadata(service, named(http)))

    async def ready(http: HttpRequest) -> Response:
        is_ready = service.is_ready
        return JSONResponse({"name": named(http).bundle.name, "ready": is_ready}, 200 if is_ready else 400)

    async def config(http: HttpRequest) -> Response:
        return JSONResponse(model_config(service, named(http)))

    async def stats(http: HttpRequest) -> Response:
        return JSONResponse({"model_stats": [model_statistics(named(http))]})

    async def through(http: HttpRequest) -> Response:
        body = await read_body(http, service.settings)
        return await unless_gone(http.receive, _begin(service, http.scope, body))

    async def generate_stream(http: HttpRequest) -> Response:
        body = await read_body(http, service.settings)
        engine = named(http)
        call_id, requests, every = _asked(body, service, engine)
        images = follow(service, engine, requests, lambda preview: every > 0 and preview.step % every == 0)
        return EventStream(_events(service, engine, call_id, requests, images), _failure)

    async def index(http: HttpRequest) -> Response:
        asked = _object(await read_body(http, service.settings))
        models = service.repository_index()
        if _flag(asked, "ready"):
            models = [model for model in models if model["state"] == "READY"]
        return JSONResponse(models)

    async def load(http: HttpRequest) -> Response:
        asked = _object(await read_body(http, service.settings))
        await service.load(http.path_params["model"], _parameters_of(asked))
        return Response()

    async def unload(http: HttpRequest) -> Response:
        _object(await read_body(http, service.settings))
        service.unload(http.path_params["model"])
        return Response()

    async def unserved(http: HttpRequest) -> Response:
        raise ApiError(501, f"{http.url.path} is not served: {UNSERVED}", code="not_served")

    add("/v2", "GET", server)
    add("/v2/models/stats", "GET", all_stats)
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        add(path, "GET", metadata)
        add(f"{path}/ready", "GET", ready)
        add(f"{path}/config", "GET", config)
        add(f"{path}/stats", "GET", stats)
        add(f"{path}/infer", "POST", through)
        add(f"{path}/generate", "POST", through)
        add(f"{path}/generate_stream", "POST", generate_stream)
    add("/v2/repository/index", "POST", index)
    add("/v2/repository/models/{model}/load", "POST", load)
    add("/v2/repository/models/{model}/unload", "POST", unload)
    for path in _UNSERVED_PATHS:
        for method in ("GET", "POST"):
            add(path, method, unserved)


def _begin(service: Service, scope: Scope, body: bytes, _: float = 0.0) -> "asyncio.Future[Response]":
    named = _PATH.search(scope["path"])
    assert named is not None
    engine = engine_of(service, named[1], named[2])  # now, when the body is there: it may have been loaded anew
    understand = _infer if named[3] == "infer" else _generate
    requests, answer = understand(service, engine, Headers(scope=scope), body)
    return make(service, engine, requests, answer)


def _refusal(error: ApiError) -> Response:
    return error.renamed(NAMES).response(is_plain=True)


DOOR = Door(_PATH, _begin, _refusal)

# --- infer


def _infer(service: Service, engine: Engine, headers: Headers, body: bytes) -> tuple[list[Request], _Answer]:
    asked, blobs = _split(body, headers.get(HEADER_LENGTH))
    parameters = _parameters_of(asked)
    tensors = _tensors(asked, blobs, service.settings.max_images)
    wanted = _wanted(asked, _flag(parameters, "binary_data_output"))
    requests, _ = requests_of(service, engine, tensors, parameters)
    return requests, partial(_inferred, engine, asked.get("id"), wanted, headers.get("accept-encoding", ""))


def _split(body: bytes, header_length: str | None) -> tuple[_Json, bytes]:
    """The JSON in front of a body, and the binary tensors behind it."""
    if header_length is None:
        return _object(body), b""
    is_number = header_length.isascii() and header_length.isdigit() and len(header_length) < 12
    if not is_number or int(header_length) > len(body):
        raise ApiError(400, f"{HEADER_LENGTH}: {header_length[:20]!r} of a body of {len(body)} bytes")
    if int(header_length) == 0:
        raise ApiError(400, f"{HEADER_LENGTH}: 0, a raw body, is for models with one input")
    return _object(body[: int(header_length)]), body[int(header_length) :]


def _object(body: bytes) -> _Json:
    try:
        asked = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:100]}", code="invalid_json") from None
    if not isinstance(asked, dict):
        raise ApiError(400, "the body: an object is expected", code="invalid_json")
    return asked


def _part(asked: Mapping[str, Any], name: str, kind: type) -> Any:
    part = asked.get(name)
    if part is None:
        return kind()
    if not isinstance(part, kind):
        raise ApiError(400, f"{name}: {'an object' if kind is dict else 'a list'} is expected", param=name)
    return part


def _parameters_of(asked: Mapping[str, Any]) -> _Json:
    parameters: _Json = _part(asked, "parameters", dict)
    return parameters


def _tensors(asked: _Json, blobs: bytes, limit: int) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    place = 0
    for given in _part(asked, "inputs", list):
        if not isinstance(given, dict):
            raise ApiError(400, "inputs: each is an object", param="inputs")
        name, shape, extra = str(given.get("name")), given.get("shape"), _part(given, "parameters", dict)
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise ApiError(400, f"{name[:80]}: shape: a list of numbers is expected", param=name)
        num, dtype = tensor_of(name, str(given.get("datatype")), shape, limit)
        if name in tensors:
            raise ApiError(400, f"{name}: is there twice", param=name)
        if "shared_memory_region" in extra:
            raise ApiError(501, f"{name}: shared memory is not supported", param=name)
        size = extra.get("binary_data_size")
        if size is None:
            tensors[name] = _from_json(name, num, dtype, given.get("data"))
        elif type(size) is not int or not 0 <= size <= len(blobs) - place:
            raise ApiError(400, f"{name}: binary_data_size {str(size)[:20]} is not what the body holds", param=name)
        else:
            tensors[name] = from_bytes(name, num, dtype, blobs[place : place + size])
            place += size
    if place != len(blobs):
        raise ApiError(400, f"the body holds {len(blobs) - place} bytes that belong to no input")
    return tensors


def _from_json(name: str, num: int, dtype: str, data: Any) -> Array:
    flat = data if isinstance(data, list) else [data]
    if len(flat) == num and all(isinstance(item, list) and len(item) == 1 for item in flat):
        flat = [item[0] for item in flat]  # [n, 1] as nested lists
    return from_values(name, num, dtype, flat)


def _flag(asked: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = asked.get(name)
    if not isinstance(value, bool | None):
        raise ApiError(400, f"{name}: true or false is expected", param=name)
    return default if value is None else value


def _wanted(asked: _Json, is_binary: bool) -> dict[str, bool]:
    """The outputs to send, and whether as binary tensors."""
    wanted: dict[str, bool] = {}
    for output in _part(asked, "outputs", list):
        if not isinstance(output, dict):
            raise ApiError(400, "outputs: each is an object", param="outputs")
        name, extra = str(output.get("name")), _part(output, "parameters", dict)
        refuse_unknown_output(name)
        if extra.get("classification") or "shared_memory_region" in extra:
            raise ApiError(501, f"{name}: neither classification nor shared memory is supported", param=name)
        wanted[name] = _flag(extra, "binary_data", is_binary)
    return wanted or dict.fromkeys(DEFAULT_OUTPUTS, is_binary)


def _inferred(
    engine: Engine, call_id: Any, wanted: Mapping[str, bool], accepted: str, samples: list[Sample]
) -> Response:
    made = outputs_of(samples, [sample.request.seed for sample in samples], tuple(wanted))
    outputs, blobs = [], []
    for name, array in made.items():
        output: _Json = {"name": name, "datatype": OUTPUTS[name], "shape": list(array.shape)}
        if wanted[name]:
            blobs.append(to_bytes(array))
            output["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            output["data"] = _plain(array)
        outputs.append(output)
    first = samples[0].request.tableau
    taken = {"steps": first.num_steps, "solver": first.name}
    answer = {**_head(engine, call_id), "parameters": taken, "outputs": outputs}
    head = json.dumps(answer, separators=(",", ":")).encode()
    body, headers = packed(b"".join((head, *blobs)), accepted)
    if blobs:
        headers[HEADER_LENGTH] = str(len(head))
    return Response(body, 200, headers, "application/octet-stream" if blobs else "application/json")


def _plain(array: Array) -> list[Any]:
    """A tensor's elements for JSON; bytes as base64, since they are pictures and no text."""
    if array.dtype.kind == "O":
        return [base64.b64encode(item).decode("ascii") for item in array.ravel()]
    values: list[Any] = array.ravel().tolist()
    return values


def _head(engine: Engine, call_id: Any) -> _Json:
    head = {} if call_id is None else {"id": str(call_id)}
    return {**head, "model_name": engine.bundle.name, "model_version": engine.bundle.manifest.version}


# --- generate


def _generate(service: Service, engine: Engine, _: Headers, body: bytes) -> tuple[list[Request], _Answer]:
    call_id, requests, _every = _asked(body, service, engine)
    return requests, partial(_generated, engine, call_id)


def _asked(body: bytes, service: Service, engine: Engine) -> tuple[Any, list[Request], int]:
    """A flat object: ``text_input`` or ``prompt``, and every other input or parameter by its name."""
    asked = _object(body)
    parameters = dict(_parameters_of(asked))
    for name, value in asked.items():
        if name == "text_input":
            parameters["prompt"] = value
        elif name not in ("id", "parameters", "stream"):
            parameters[name.lower() if name in INPUTS else name] = value
    requests, every = requests_of(service, engine, {}, parameters)
    return asked.get("id"), requests, every


def _generated(engine: Engine, call_id: Any, samples: list[Sample]) -> Response:
    """The pictures as base64 PNG, their seeds and steps; one is not in a list, as Triton has it."""
    made = outputs_of(samples, [sample.request.seed for sample in samples], ("PNG", "SEED", "STEPS"))
    values = {name: _plain(array) for name, array in made.items()}
    single = {name: value[0] if len(value) == 1 else value for name, value in values.items()}
    body = json.dumps({**_head(engine, call_id), **single}, separators=(",", ":")).encode()
    return Response(body, media_type="application/json")


async def _events(
    service: Service,
    engine: Engine,
    call_id: Any,
    requests: list[Request],
    images: AsyncGenerator[tuple[int, Preview | Sample]],
) -> AsyncGenerator[bytes]:
    async with aclosing(images):
        async for i, image in images:
            yield await encoded(service, engine, 1, _event, engine, call_id, requests[i].seed, i, image)


def _failure(error: ApiError) -> _Json:
    return {"error": error.renamed(NAMES).message}


def _event(engine: Engine, call_id: Any, seed: int, i: int, image: Preview | Sample) -> bytes:
    made = outputs_of([image], [seed], ("PNG", "SEED"))
    event = {**_head(engine, call_id), **{name: _plain(array)[0] for name, array in made.items()}, "index": i}
    if isinstance(image, Preview):
        event |= {"is_preview": True, "step": image.step}
    else:
        event |= {"is_preview": False, "step": image.request.tableau.num_steps}
    return event_of(event)
