"""The OpenAPI document: FastAPI's own, and in it the routes that read their bodies by hand.

Those of the Open Inference Protocol are described here, at the length that a client generator or a fuzzer needs; what
the tensors mean stands in ``docs/http.md``.
"""

from typing import Any

from fastapi import FastAPI

from ..runtime.call import INPUTS, OUTPUTS, PRIORITY_LEVELS
from .images import IMAGES, ImageRequest, ImageResponse

_ANY: dict[str, Any] = {"type": "object"}
_NUMBER = {"type": "integer", "minimum": 1}
_DEADLINE = {"type": "number", "exclusiveMinimum": 0}
_PARAMETERS = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 1, "maximum": 64},
        "prompt": {"type": "string"},
        "label": {"type": "integer"},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
        "steps": _NUMBER,
        "min_steps": _NUMBER,
        "max_steps": _NUMBER,
        "solver": {"type": "string"},
        "guidance": {"type": "number"},
        "priority": {"type": "integer", "minimum": 0, "maximum": PRIORITY_LEVELS},
        "timeout": {"type": "integer", "minimum": 0, "description": "Microseconds."},
        "deadline_ms": _DEADLINE,
        "preview_every": {"type": "integer", "minimum": 0},
    },
}
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"enum": list(INPUTS)},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 64}, "minItems": 1},
        "datatype": {"type": "string"},
        "data": {"type": "array"},
        "parameters": _ANY,
    },
}
_INFER = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "parameters": _PARAMETERS,
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"enum": list(OUTPUTS)}, "parameters": _ANY},
            },
        },
    },
}
_GENERATE = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "text_input": {"type": "string"}, "parameters": _PARAMETERS},
}
_CONFIG = {"type": "object", "properties": {"config": {"type": "string"}}}
_LOAD = {"type": "object", "properties": {"parameters": _CONFIG}}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}


def document_of(app: FastAPI) -> dict[str, Any]:
    """The document of an application; made once."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        content = {}
        for model in (ImageRequest, ImageResponse):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {})
            schemas[model.__name__] = schema
            reference = {"$ref": f"#/components/schemas/{model.__name__}"}
            content[model] = {"content": {"application/json": {"schema": reference}}}
        asked = {**content[ImageRequest], "required": True}
        paths = document["paths"]
        paths[IMAGES] = {
            "post": {
                "summary": "Generate images",
                "operationId": "generate_images",
                "requestBody": asked,
                "responses": {"200": {"description": "The images", **content[ImageResponse]}},
            }
        }
        paths["/v1/jobs"]["post"]["requestBody"] = paths["/v1/jobs/{job}"]["put"]["requestBody"] = asked
        paths |= _inference_paths()
        app.openapi_schema = document
    return app.openapi_schema


def _inference_paths() -> dict[str, Any]:
    paths: dict[str, Any] = {
        "/v2": {"get": _operation("Server metadata", _ANY)},
        "/v2/models/stats": {"get": _operation("Statistics of every student", _ANY)},
        "/v2/repository/index": {"post": _operation("What is served or could be loaded", None, _ANY)},
        "/v2/repository/models/{model}/load": {"post": _operation("Load a student or an alias", None, _LOAD)},
        "/v2/repository/models/{model}/unload": {"post": _operation("Unload a student or an alias", None, _ANY)},
    }
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        paths |= {
            model: {"get": _operation("Model metadata", _ANY)},
            f"{model}/ready": {"get": _operation("Whether the student takes requests", _ANY)},
            f"{model}/config": {"get": _operation("Triton's ModelConfig", _ANY)},
            f"{model}/stats": {"get": _operation("Statistics", _ANY)},
            f"{model}/infer": {"post": _operation("Infer; binary tensors may follow the JSON", None, _INFER)},
            f"{model}/generate": {"post": _operation("Generate", _ANY, _GENERATE)},
            f"{model}/generate_stream": {"post": _operation("Generate, as events", None, _GENERATE)},
        }
    for path, item in paths.items():
        names = [name for name in ("model", "version") if f"{{{name}}}" in path]
        item["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    return paths


def _operation(summary: str, answer: dict[str, Any] | None, body: dict[str, Any] | None = None) -> dict[str, Any]:
    done: dict[str, Any] = {"description": "Done"}
    if answer is not None:
        done["content"] = {"application/json": {"schema": answer}}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": done,
            "4XX": {"description": "Refused", "content": {"application/json": {"schema": _ERROR}}},
        },
    }
    if body is not None:
        operation["requestBody"] = {"content": {"application/json": {"schema": body}}}
    return operation
