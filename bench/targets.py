"""Who is asked: one class a protocol, with two calls, `open` and `send`.

A kind's fields are in the words of the runtime: ``n steps solver guidance prompt label seed priority deadline_ms``.
Each target turns them into its protocol's; any other field is passed on as it stands, so that other servers' words can
be used too. ``target_ms`` and ``outputs`` stay here. Prompts go through the student's classes and seeds count up where
a kind names none.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from ..runtime import Bundle, Engine, EngineThread, Request, RequestError
from ..runtime.simulated import Cost, simulated
from .errors import BenchError
from .http_client import Answer, HttpClient
from .observer import Counts
from .workload import Kind

Array = NDArray[Any]
PROTOCOLS = ("openai", "http", "grpc", "in-process")
_OPENAI = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
_NO_BOUND = 1 << 20  # samples that may wait in process: the load is bounded elsewhere
_KEPT = ("target_ms", "outputs")
_DTYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BYTES": "O",
}  # fmt: skip


@dataclass(frozen=True)
class Address:
    """Where the target is, and what an engine in the same process is made with."""

    target: str  # URL; or a bundle, for in-process
    protocol: str
    model: str | None = None
    key: str | None = None  # sent as a bearer token
    cafile: Path | None = None  # certificates to trust, PEM
    max_rows: int = 16
    threads: int | None = None
    simulate: str | None = None


@dataclass(frozen=True)
class About:
    """What a target says of itself."""

    model: str
    server: str = ""
    labels: tuple[str, ...] = ()
    default_steps: int | None = None  # of a request that names none
    simulated: str | None = None  # the cost of its simulated accelerator, if it has one
    extra: Mapping[str, Any] = field(default_factory=dict)


class Target(Protocol):
    """Something that makes images."""

    about: About
    detail: str  # what the server said of the last error

    async def open(self) -> None:
        """Connect, and learn what it is.

        Raises:
            BenchError: it cannot be reached, or is not what it should be.
        """
        ...

    async def send(self, kind: Kind, number: int) -> str | None:
        """Ask once; None when it was answered, else what kind of error it was."""
        ...

    async def close(self) -> None:
        """Leave."""
        ...


def target_of(address: Address) -> Target:
    """The target for an address."""
    makes: dict[str, Any] = {
        "openai": OpenAiTarget, "http": KserveTarget, "grpc": KserveGrpcTarget, "in-process": InProcessTarget
    }  # fmt: skip
    made: Target = makes[address.protocol](address)
    return made


class OpenAiTarget:
    """``POST /v1/images/generations``."""

    def __init__(self, address: Address) -> None:
        self.about = About(address.model or "")
        self.detail = ""
        self._address = address
        base = urlsplit(address.target).path.rstrip("/").removesuffix("/v1")
        self._path = f"{base}/v1/images/generations"
        self._models = f"{base}/v1/models"
        self._client = _client(address)

    async def open(self) -> None:
        """See `Target`."""
        answer = await _reach(self._client, self._address, self._models)
        listed = _json(answer).get("data") if answer.status == 200 else None
        models = [one for one in _dicts(listed) if "id" in one]
        wanted = self._address.model
        found = next((one for one in models if wanted in (None, one["id"])), None)
        if models and found is None:
            names = ", ".join(str(one["id"]) for one in models)
            raise BenchError(f"--model: {wanted} is not served; there is: {names}")
        self.about = _about(found) if found else About(wanted or "")

    async def send(self, kind: Kind, number: int) -> str | None:
        """See `Target`."""
        body: dict[str, Any] = {"prompt": _prompt(self.about, kind, number, "a photograph"), "seed": number}
        if self.about.model:
            body["model"] = self.about.model
        for name, value in kind.fields.items():
            if name not in _KEPT:
                body[_OPENAI.get(name, name)] = value
        if body["seed"] == "none":
            del body["seed"]
        answer = await self._client.request("POST", self._path, json.dumps(body).encode(), _JSON)
        if answer.status != 200:
            self.detail = _line(answer.body)
            return str(answer.status)
        images = answer.body.count(b'"b64_json"') + answer.body.count(b'"url"')
        return None if images >= kind.num_images else "answer without images"

    async def close(self) -> None:
        """See `Target`."""
        self._client.close()


class _Tensors:
    """The inputs of a KServe v2 model, and what a request says in them."""

    def __init__(self, inputs: Sequence[Mapping[str, Any]], optional: set[str], has_batch: bool) -> None:
        self.types: dict[str, str] = {}
        self._made: dict[str, Array] = {}  # for inputs that nobody names
        self._has_batch = has_batch
        rng = np.random.default_rng(0)
        for one in inputs:
            name, kind = str(one["name"]), str(one["datatype"])
            if kind not in _DTYPES:
                raise BenchError(f"input {name}: datatype {kind} cannot be made here")
            self.types[name] = kind
            shape = [1 if int(size) < 0 else int(size) for size in one["shape"]]
            if name in optional or name.lower() in _WORDS:
                continue
            if kind == "BYTES":
                self._made[name] = np.full(shape, b"", object)
            elif kind.startswith("FP"):
                self._made[name] = rng.standard_normal(shape).astype(_DTYPES[kind])
            else:
                self._made[name] = np.zeros(shape, _DTYPES[kind])

    def say(self, about: About, kind: Kind, number: int) -> tuple[dict[str, Array], dict[str, Any]]:
        """Tensors and parameters of a request."""
        num = kind.num_images
        said = {name: value for name, value in kind.fields.items() if name not in (*_KEPT, "n")}
        if "PROMPT" in self.types and "label" not in said:
            said.setdefault("prompt", _prompt(about, kind, number, "0"))
        if "SEED" in self.types and said.setdefault("seed", number) == "none":
            del said["seed"]
        tensors = dict(self._made)
        parameters: dict[str, Any] = {}
        for name, value in said.items():
            input_name = name if name in self.types else name.upper()
            if input_name not in self.types:
                parameters[name] = value
                continue
            kind_of = self.types[input_name]
            value = str(value).encode() if kind_of == "BYTES" else value
            shape = [num, 1] if self._has_batch else [1]
            try:
                tensors[input_name] = np.full(shape, value, _DTYPES[kind_of])
            except (ValueError, OverflowError):
                raise BenchError(f"--mix: {name}: {value!r} is no {kind_of}, which the model's input is") from None
        if num > 1 and not any(array.shape[0] == num for array in tensors.values()):
            parameters["n"] = num
        return tensors, parameters


class KserveTarget:
    """``POST /v2/models/{model}/infer``, of any server that speaks the Open Inference Protocol."""

    def __init__(self, address: Address) -> None:
        self.about = About(address.model or "")
        self.detail = ""
        self._address = address
        self._client = _client(address)
        self._base = urlsplit(address.target).path.rstrip("/").removesuffix("/v2")
        self._tensors: _Tensors
        self._has_binary = False

    async def open(self) -> None:
        """See `Target`."""
        answer = await _reach(self._client, self._address, f"{self._base}/v2")
        if answer.status != 200:
            raise BenchError(f"{self._address.target}: /v2 answers {answer.status}: it does not speak KServe v2")
        server = _json(answer)
        self._has_binary = "binary_tensor_data" in server.get("extensions", [])
        model = self._address.model or await self._only_model()
        path = f"{self._base}/v2/models/{quote(model)}"
        metadata = await self._client.request("GET", path)
        if metadata.status != 200:
            raise BenchError(f"--model: {model}: {path} answers {metadata.status}")
        config = await self._client.request("GET", f"{path}/config")
        asked = _json(config) if config.status == 200 else {}
        optional = {str(one.get("name")) for one in _dicts(asked.get("input")) if one.get("optional")}
        inputs = [one for one in _dicts(_json(metadata).get("inputs")) if one.keys() >= {"name", "datatype", "shape"}]
        self._tensors = _Tensors(inputs, optional, asked.get("max_batch_size", 1) > 0)
        self._path = f"{path}/infer"
        self.about = About(model, f"{server.get('name', '')} {server.get('version', '')}".strip())
        ours = await self._client.request("GET", f"{self._base}/v1/models/{quote(model)}")
        if ours.status == 200 and _json(ours).get("owned_by") == "fewstep":
            self.about = replace(_about(_json(ours)), server=self.about.server)

    async def send(self, kind: Kind, number: int) -> str | None:
        """See `Target`."""
        tensors, parameters = self._tensors.say(self.about, kind, number)
        inputs, blobs = [], []
        for name, array in tensors.items():
            one: dict[str, Any] = {"name": name, "datatype": self._tensors.types[name], "shape": array.shape}
            if self._has_binary and (array.size > 64 or self._tensors.types[name] == "FP16"):
                blobs.append(_raw(array))
                one["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                one["data"] = [v.decode() if isinstance(v, bytes) else v for v in array.ravel().tolist()]
            inputs.append(one)
        if self._has_binary:
            parameters["binary_data_output"] = True
        asked: dict[str, Any] = {"inputs": inputs, "parameters": parameters}
        if wanted := kind.fields.get("outputs"):
            asked["outputs"] = [{"name": name} for name in str(wanted).split("+")]
        body = json.dumps(asked).encode()
        headers = f"Inference-Header-Content-Length: {len(body)}\r\n" if blobs else _JSON
        answer = await self._client.request("POST", self._path, b"".join([body, *blobs]), headers)
        if answer.status != 200:
            self.detail = _line(answer.body)
            return str(answer.status)
        return None if b'"outputs"' in answer.body[:4096] or b'"outputs"' in answer.body else "answer without outputs"

    async def close(self) -> None:
        """See `Target`."""
        self._client.close()

    async def _only_model(self) -> str:
        answer = await self._client.request("POST", f"{self._base}/v2/repository/index", b"{}", _JSON)
        try:
            listed = json.loads(answer.body) if answer.status == 200 else []
        except ValueError:  # not every server has this route
            listed = []
        names = [one["name"] for one in _dicts(listed) if "name" in one and one.get("state", "READY") == "READY"]
        if not names:
            raise BenchError(f"--model: {self._address.target} does not list its models; name one")
        return str(names[0])


class KserveGrpcTarget:
    """``inference.GRPCInferenceService/ModelInfer``."""

    def __init__(self, address: Address) -> None:
        self.about = About(address.model or "")
        self.detail = ""
        self._address = address
        self._channel: Any = None
        self._tensors: _Tensors

    async def open(self) -> None:
        """See `Target`."""
        import grpc
        from google.protobuf.json_format import MessageToDict
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        self._messages = service_pb2
        self._error = grpc.aio.AioRpcError
        target = self._address.target
        scheme, _, place = target.rstrip("/").rpartition("://")
        limits = [("grpc.max_receive_message_length", -1)]
        if scheme == "grpcs":
            cafile = self._address.cafile
            trust = grpc.ssl_channel_credentials(cafile.read_bytes() if cafile else None)
            self._channel = grpc.aio.secure_channel(place, trust, limits)
        else:
            self._channel = grpc.aio.insecure_channel(place, limits)
        self._metadata = [("authorization", f"Bearer {self._address.key}")] if self._address.key else None
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        try:
            told: dict[str, Any] = {"metadata": self._metadata, "timeout": 10}
            server = await self._stub.ServerMetadata(service_pb2.ServerMetadataRequest(), **told)
            model = self._address.model
            if model is None:
                asked = service_pb2.RepositoryIndexRequest(ready=True)
                index = await self._if_there(self._stub.RepositoryIndex(asked, **told))
                if index is None or not index.models:
                    raise BenchError(f"--model: {target} does not list its models; name one")
                model = str(index.models[0].name)
            metadata = await self._stub.ModelMetadata(service_pb2.ModelMetadataRequest(name=model), **told)
            config = await self._if_there(self._stub.ModelConfig(service_pb2.ModelConfigRequest(name=model), **told))
        except self._error as error:
            raise BenchError(f"{target}: {error.code().name}: {str(error.details())[:200]}") from None
        optional = {one.name for one in config.config.input if one.optional} if config else set()
        inputs = [one for one in MessageToDict(metadata).get("inputs", []) if "shape" in one]
        self._tensors = _Tensors(inputs, optional, config is None or config.config.max_batch_size > 0)
        is_simulated = "simulated" in metadata.platform
        cost = "a cost that gRPC does not tell" if is_simulated else None
        self.about = About(model, f"{server.name} {server.version}", simulated=cost)

    async def send(self, kind: Kind, number: int) -> str | None:
        """See `Target`."""
        tensors, parameters = self._tensors.say(self.about, kind, number)
        request = self._messages.ModelInferRequest(model_name=self.about.model)
        for name, array in tensors.items():
            request.inputs.add(name=name, datatype=self._tensors.types[name], shape=array.shape)
            request.raw_input_contents.append(_raw(array))
        for name, value in parameters.items():
            field_of = {bool: "bool_param", int: "int64_param", float: "double_param"}.get(type(value), "string_param")
            setattr(request.parameters[name], field_of, value)
        for name in str(kind.fields["outputs"]).split("+") if "outputs" in kind.fields else ():
            request.outputs.add(name=name)
        try:
            answer = await self._stub.ModelInfer(request, metadata=self._metadata)
        except self._error as error:
            self.detail = str(error.details())[:200]
            return str(error.code().name)
        return None if answer.outputs else "answer without outputs"

    async def _if_there(self, call: Any) -> Any:
        """The answer of a call that is Triton's extension of the protocol; None where a server does not have it."""
        try:
            return await call
        except self._error as error:
            if error.code().name == "UNIMPLEMENTED":
                return None
            raise

    async def close(self) -> None:
        """See `Target`."""
        if self._channel is not None:
            await self._channel.close()


class InProcessTarget:
    """An engine beside the load, with nothing between: what the others take longer is their protocol's."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self.about = About("")
        self.detail = ""
        self._threads: EngineThread | None = None

    async def open(self) -> None:
        """See `Target`."""
        address = self._address
        bundle = Bundle.load(address.target or None)
        backend = simulated(address.simulate) if address.simulate else None
        self._engine = Engine(
            bundle, max_rows=address.max_rows, max_waiting=_NO_BOUND, threads=address.threads, backend=backend
        )
        self._threads = EngineThread([self._engine])
        self._threads.start()
        labels = bundle.manifest.labels.names if bundle.manifest.labels else ()
        steps = bundle.manifest.default_tableau.num_steps
        cost = str(Cost.parse(address.simulate)) if address.simulate else None
        self.about = About(bundle.name, "an engine in this process", labels, steps, cost)

    async def send(self, kind: Kind, number: int) -> str | None:
        """See `Target`."""
        try:
            await self._send(kind, number)
        except ValueError as error:
            self.detail = str(error)
            return "refused"
        except RequestError as error:
            self.detail = str(error)
            return type(error).__name__
        return None

    async def _send(self, kind: Kind, number: int) -> None:
        said = kind.fields
        if unknown := next((name for name in said if name not in (*_KNOWN, *_KEPT)), None):
            raise ValueError(f"{unknown}: an engine in this process knows {', '.join(_KNOWN)}")
        tableau = self._engine.tableau(said.get("solver"), said.get("steps"))
        deadline_ms = said.get("deadline_ms")
        deadline_s = time.monotonic() + deadline_ms / 1000 if deadline_ms else None
        labels = self._engine.bundle.manifest.labels
        label = said.get("label")
        if label is None and labels:
            label = labels.parse(_prompt(self.about, kind, number, "0"))
        seed = number if said.get("seed") in (None, "none") else said["seed"]
        guidance, priority = said.get("guidance"), said.get("priority", 0)
        requests = [Request(seed + i, tableau, label, guidance, priority, deadline_s) for i in range(kind.num_images)]
        await asyncio.gather(*map(asyncio.wrap_future, self._engine.submit(requests)))

    async def close(self) -> None:
        """See `Target`."""
        if self._threads is not None:
            await asyncio.to_thread(self._threads.stop)

    @property
    def counts(self) -> Counts:
        """What the engine has done so far; see `observer`."""
        done, engine = self._engine.counters, self._engine
        return Counts(
            done.row_steps, done.ticks, done.busy_s, time.monotonic(), engine.max_rows, engine.pace.deviation_s
        )


_JSON = "Content-Type: application/json\r\n"
_KNOWN = ("n", "steps", "solver", "guidance", "prompt", "label", "seed", "priority", "deadline_ms")
_WORDS = ("prompt", "label", "seed", "steps", "solver", "guidance")


def _client(address: Address) -> HttpClient:
    parts = urlsplit(address.target)
    headers = {"Authorization": f"Bearer {address.key}"} if address.key else {}
    return HttpClient(f"{parts.scheme}://{parts.netloc}", headers, address.cafile)


async def _reach(client: HttpClient, address: Address, path: str) -> Answer:
    try:
        return await client.request("GET", path)
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message
        raise BenchError(
            f"{address.target}: {reason}; --cafile names a file with the authority's certificate"
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise BenchError(f"{address.target}: cannot be reached: {reason}; is the server running?") from None


def _json(answer: Answer) -> dict[str, Any]:
    try:
        held = json.loads(answer.body)
    except ValueError:
        return {}
    return held if isinstance(held, dict) else {}


def _dicts(held: Any) -> list[dict[str, Any]]:
    """The objects of a list that a server sent, if it is one."""
    return [one for one in held if isinstance(one, dict)] if isinstance(held, list) else []


def _line(body: bytes) -> str:
    """The message of an error, in OpenAI's form, in KServe's, or as it is."""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        text = body.decode("utf-8", "replace")
    return " ".join(str(text).split())[:200]


def _about(model: Mapping[str, Any]) -> About:
    """From an entry of ``/v1/models``; ours say more than OpenAI's."""
    return About(
        str(model["id"]),
        str(model.get("owned_by", "")),
        tuple(map(str, model.get("labels") or ())),
        (model.get("default_tableau") or {}).get("num_steps"),
        model.get("simulated"),
        {"version": model["version"]} if "version" in model else {},
    )


def _prompt(about: About, kind: Kind, number: int, otherwise: str) -> str:
    said = kind.fields.get("prompt")
    if said is not None:
        return str(said)
    return about.labels[number % len(about.labels)] if about.labels else otherwise


def _raw(array: Array) -> bytes:
    if array.dtype.kind != "O":
        return np.ascontiguousarray(array).tobytes()
    return b"".join(len(item).to_bytes(4, "little") + item for item in array.ravel())
