"""A thin typed client for what the stock clients leave out: previews, jobs, tables and aliases.

    with fewstep.Client("http://localhost:8000") as client:
        client.generate("Sneaker", solver="ddim", num_inference_steps=4, seed=7).images[0].data
        for image in client.stream("Sneaker", partial_images=3): ...       Preview, ..., FinishedImage
        client.wait(client.submit("Sneaker", n=64, id="mine"))             Job -> Answer
        client.load_table("student", Path("learned.safetensors"))          weights untouched
        client.set_alias("stable", {"student": 0.95, "candidate": 0.05})

It adds no words of its own: arguments are the fields of docs/http.md, and whatever is wrong is a `ClientError` with
the server's line. A method is one row that makes a `_Call`; `Client` and `AsyncClient` differ in how they send it.
"""

import asyncio
import json
import ssl
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, TypeAdapter

try:
    import httpx
except ImportError as error:
    raise ImportError(f"fewstep's clients need pip install 'fewstep[client]' ({error})") from None

T = TypeVar("T")
Status = Literal["queued", "running", "completed", "failed", "cancelled"]


class ClientError(Exception):
    """What was asked for did not come.

    Attributes:
        status: the HTTP status; None where there was none: nobody answered, a stream broke off, a job failed.
        message: one line.
        field: the field that it is about, if it is about one.
        code: the server's word for the reason, such as ``queue_full``; None of students, tables and aliases.
        retry_after_s: when it is worth asking again, if the server said so.
    """

    def __init__(
        self,
        status: int | None,
        message: str,
        field: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message if status is None else f"{status}: {message}")
        self.status, self.message, self.field, self.code = status, message, field, code
        self.retry_after_s = retry_after_s


class Choices(TypedDict, total=False):
    """What a request for images may choose; see docs/http.md. None is as if it were left out."""

    model: str | None
    n: int | None
    seed: int | None
    solver: str | None
    num_inference_steps: int | None
    min_steps: int | None
    max_steps: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
    dynamic_thresholding: float | None
    priority: int | None
    deadline_ms: float | None
    output_format: Literal["png", "jpeg", "webp"] | None


class _Said(BaseModel):
    """Something the server says; what a newer one says besides is left out."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Image(_Said):
    """An image: a file in the format that was asked for."""

    data: Base64Bytes = Field(validation_alias="b64_json")
    seed: int


class Answer(_Said):
    """The images of a request, and what it was given where it left the choice."""

    images: tuple[Image, ...] = Field(validation_alias="data")
    model: str
    solver: str
    num_inference_steps: int
    tableau_sha256: str
    guidance_scale: float
    size: str
    output_format: str
    timings: dict[str, float]


class Preview(_Said):
    """What the network predicts an image to be after some of its steps."""

    data: Base64Bytes = Field(validation_alias="b64_json")
    image_index: int
    step: int
    num_inference_steps: int


class FinishedImage(Image):
    """An image of a stream."""

    image_index: int
    model: str
    solver: str
    num_inference_steps: int


class Job(_Said):
    """A job as it stands."""

    id: str
    status: Status
    model: str
    created: int
    ended: int | None
    queue_position: int | None
    result: Answer | None = None
    error: dict[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing will change."""
        return self.status not in ("queued", "running")

    def answer(self) -> Answer:
        """Its images.

        Raises:
            ClientError: it has none.
        """
        if self.result is not None:
            return self.result
        said = self.error or {}
        raise ClientError(
            None, f"job {self.id} {self.status}: {said.get('message', 'it has no images')}",
            said.get("param"), said.get("code"),
        )  # fmt: skip


class Table(_Said):
    """A solver that a student is served with."""

    solver: str
    num_steps: int
    stochastic: bool
    loaded: bool  # not the bundle's own
    sha256: str


class Model(_Said):
    """A student, or an alias of some."""

    id: str
    alias_of: dict[str, float] | None = None  # their parts of the requests
    version: str = ""
    description: str = ""
    size: str = ""
    labels: tuple[str, ...] = ()
    tables: tuple[Table, ...] = Field((), validation_alias="tableaus")


@dataclass(frozen=True, slots=True)
class _Call(Generic[T]):
    """A request and how its answer is read."""

    method: str
    path: str
    read: Callable[[bytes], T]
    body: bytes | None = None


class Client:
    """A fewstep server, for programs that wait.

    Args:
        url: such as ``http://localhost:8000``.
        api_key: if the server has keys.
        timeout_s: for the connection, and for each silence of the server.
        verify: for https: False trusts anybody; or a context with certificates of your own.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0, verify: ssl.SSLContext | bool = True
    ) -> None:
        self._http = httpx.Client(base_url=url, headers=_headers(api_key), timeout=timeout_s, verify=verify)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def generate(self, prompt: str = "", **choices: Unpack[Choices]) -> Answer:
        """Images, when all are there."""
        return self._send(_generate(prompt, choices))

    def stream(
        self, prompt: str = "", *, partial_images: int = 0, **choices: Unpack[Choices]
    ) -> Iterator[Preview | FinishedImage]:
        """At most so many previews of each image, and the images, as they come; closing the iterator cancels."""
        body = _body(prompt, choices, stream=True, partial_images=partial_images)
        try:
            with self._http.stream("POST", _IMAGES, content=body) as response:
                if response.is_error:
                    response.read()
                    raise _refused(response)
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        yield _event(line)
        except httpx.HTTPError as error:
            raise _unreachable(error) from None

    def submit(self, prompt: str = "", *, id: str | None = None, **choices: Unpack[Choices]) -> Job:
        """A job. Sent again under the same ``id`` with the same choices it is the same job."""
        return self._send(_submit(prompt, id, choices))

    def job(self, job: Job | str) -> Job:
        """A job as it stands now."""
        return self._send(_job(job))

    def jobs(self) -> list[Job]:
        """The jobs of this key, the oldest first, without results."""
        return self._send(_JOBS)

    def wait(self, job: Job | str, timeout_s: float | None = None) -> Answer:
        """The images of a job, when it is over.

        Raises:
            ClientError: it failed, or was cancelled.
            TimeoutError: it is not over; it goes on.
        """
        for pause_s in _pauses(job, timeout_s):
            found = self.job(job)
            if found.is_over:
                break
            time.sleep(pause_s)
        return found.answer()

    def cancel(self, job: Job | str) -> Job:
        """End a job within one step."""
        return self._send(_cancel(job))

    def models(self) -> list[Model]:
        """The students with their labels and tables, and the aliases."""
        return self._send(_MODELS)

    def set_alias(self, name: str, parts: str | Mapping[str, float]) -> None:
        """Another name for a student, or for several with their parts of the requests; at once, and anew."""
        self._send(_set_alias(name, parts))

    def remove_alias(self, name: str) -> None:
        """An alias no more."""
        self._send(_remove_alias(name))

    def tables(self, model: str) -> list[Table]:
        """The tables of a student."""
        return self._send(_tables(model))

    def load_table(self, model: str, table: bytes | PathLike[str]) -> Table:
        """Serve a student with another table: the bytes of its file, or where that is."""
        return self._send(_load_table(model, table))

    def unload_table(self, model: str, solver: str, num_steps: int) -> None:
        """Take a loaded table away; the bundle's own, if it has one, is back."""
        self._send(_unload_table(model, solver, num_steps))

    def _send(self, call: _Call[T]) -> T:
        try:
            response = self._http.request(call.method, call.path, content=call.body)
        except httpx.HTTPError as error:
            raise _unreachable(error) from None
        if response.is_error:
            raise _refused(response)
        return call.read(response.content)


class AsyncClient:
    """A fewstep server, for asyncio; see `Client`, whose methods these are."""

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0, verify: ssl.SSLContext | bool = True
    ) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(api_key), timeout=timeout_s, verify=verify)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def generate(self, prompt: str = "", **choices: Unpack[Choices]) -> Answer:
        """See `Client.generate`; cancelling it cancels the images."""
        return await self._send(_generate(prompt, choices))

    async def stream(
        self, prompt: str = "", *, partial_images: int = 0, **choices: Unpack[Choices]
    ) -> AsyncGenerator[Preview | FinishedImage]:
        """See `Client.stream`; leave it early within ``contextlib.aclosing``, so that it is closed there and then."""
        body = _body(prompt, choices, stream=True, partial_images=partial_images)
        try:
            async with self._http.stream("POST", _IMAGES, content=body) as response:
                if response.is_error:
                    await response.aread()
                    raise _refused(response)
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        yield _event(line)
        except httpx.HTTPError as error:
            raise _unreachable(error) from None

    async def submit(self, prompt: str = "", *, id: str | None = None, **choices: Unpack[Choices]) -> Job:
        """See `Client.submit`."""
        return await self._send(_submit(prompt, id, choices))

    async def job(self, job: Job | str) -> Job:
        """See `Client.job`."""
        return await self._send(_job(job))

    async def jobs(self) -> list[Job]:
        """See `Client.jobs`."""
        return await self._send(_JOBS)

    async def wait(self, job: Job | str, timeout_s: float | None = None) -> Answer:
        """See `Client.wait`."""
        for pause_s in _pauses(job, timeout_s):
            found = await self.job(job)
            if found.is_over:
                break
            await asyncio.sleep(pause_s)
        return found.answer()

    async def cancel(self, job: Job | str) -> Job:
        """See `Client.cancel`."""
        return await self._send(_cancel(job))

    async def models(self) -> list[Model]:
        """See `Client.models`."""
        return await self._send(_MODELS)

    async def set_alias(self, name: str, parts: str | Mapping[str, float]) -> None:
        """See `Client.set_alias`."""
        await self._send(_set_alias(name, parts))

    async def remove_alias(self, name: str) -> None:
        """See `Client.remove_alias`."""
        await self._send(_remove_alias(name))

    async def tables(self, model: str) -> list[Table]:
        """See `Client.tables`."""
        return await self._send(_tables(model))

    async def load_table(self, model: str, table: bytes | PathLike[str]) -> Table:
        """See `Client.load_table`."""
        return await self._send(_load_table(model, table))

    async def unload_table(self, model: str, solver: str, num_steps: int) -> None:
        """See `Client.unload_table`."""
        await self._send(_unload_table(model, solver, num_steps))

    async def _send(self, call: _Call[T]) -> T:
        try:
            response = await self._http.request(call.method, call.path, content=call.body)
        except httpx.HTTPError as error:
            raise _unreachable(error) from None
        if response.is_error:
            raise _refused(response)
        return call.read(response.content)


# --- the calls

_IMAGES = "/v1/images/generations"


def _listed(item: type[T], field: str) -> Callable[[bytes], list[T]]:
    items = TypeAdapter(list[item])  # type: ignore[valid-type]
    return lambda content: items.validate_python(json.loads(content)[field])


def _nothing(_: bytes) -> None:
    pass


_JOBS = _Call("GET", "/v1/jobs", _listed(Job, "data"))
_MODELS = _Call("GET", "/v1/models", _listed(Model, "data"))


def _body(prompt: str, choices: Choices, **more: Any) -> bytes:
    said = {name: value for name, value in choices.items() if value is not None}
    return json.dumps({"prompt": prompt, **said, **more}).encode()


def _generate(prompt: str, choices: Choices) -> _Call[Answer]:
    return _Call("POST", _IMAGES, Answer.model_validate_json, _body(prompt, choices))


def _submit(prompt: str, name: str | None, choices: Choices) -> _Call[Job]:
    path = f"/v1/jobs/{_part(uuid.uuid4().hex if name is None else name)}"
    return _Call("PUT", path, Job.model_validate_json, _body(prompt, choices))


def _job(job: Job | str) -> _Call[Job]:
    return _Call("GET", f"/v1/jobs/{_part(_id(job))}", Job.model_validate_json)


def _cancel(job: Job | str) -> _Call[Job]:
    return _Call("POST", f"/v1/jobs/{_part(_id(job))}/cancel", Job.model_validate_json)


def _set_alias(name: str, parts: str | Mapping[str, float]) -> _Call[None]:
    config = json.dumps({"alias": parts if isinstance(parts, str) else dict(parts)})
    body = json.dumps({"parameters": {"config": config}}).encode()
    return _Call("POST", f"/v2/repository/models/{_part(name)}/load", _nothing, body)


def _remove_alias(name: str) -> _Call[None]:
    return _Call("POST", f"/v2/repository/models/{_part(name)}/unload", _nothing)


def _tables(model: str) -> _Call[list[Table]]:
    return _Call("GET", f"/v2/models/{_part(model)}/tables", _listed(Table, "tables"))


def _load_table(model: str, table: bytes | PathLike[str]) -> _Call[Table]:
    content = table if isinstance(table, bytes) else Path(table).read_bytes()
    return _Call("POST", f"/v2/models/{_part(model)}/tables", Table.model_validate_json, content)


def _unload_table(model: str, solver: str, num_steps: int) -> _Call[None]:
    return _Call("DELETE", f"/v2/models/{_part(model)}/tables/{_part(solver)}/{num_steps}", _nothing)


# --- what they share


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _part(name: str) -> str:
    return quote(name, safe="")


def _id(job: Job | str) -> str:
    return job if isinstance(job, str) else job.id


def _pauses(job: Job | str, timeout_s: float | None) -> Iterator[float]:
    """How long to wait between looks at a job: a twentieth of what it took so far."""
    start_s = time.monotonic()
    while True:
        took_s = time.monotonic() - start_s
        if timeout_s is not None and took_s > timeout_s:
            raise TimeoutError(f"job {_id(job)} is not over after {timeout_s:g} s; it goes on")
        yield min(1.0, max(0.01, took_s / 20))


def _event(line: str) -> Preview | FinishedImage:
    said = json.loads(line.removeprefix("data: "))
    if "error" in said:
        error = said["error"]
        raise ClientError(None, error["message"], error.get("param"), error.get("code"))
    is_finished = said["type"] == "image_generation.completed"
    return FinishedImage.model_validate(said) if is_finished else Preview.model_validate(said)


def _refused(response: httpx.Response) -> ClientError:
    """The server's error, in OpenAI's shape or in that of the Open Inference Protocol; or whoever answered for it."""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        error = response.text[:200] or response.reason_phrase
    said = error if isinstance(error, dict) else {"message": str(error)}
    after_ms = response.headers.get("retry-after-ms")
    after_s = None if after_ms is None else float(after_ms) / 1000
    return ClientError(response.status_code, said.get("message", ""), said.get("param"), said.get("code"), after_s)


def _unreachable(error: httpx.HTTPError) -> ClientError:
    where = error.request.url
    return ClientError(None, f"{where.scheme}://{where.netloc.decode()}: {error or type(error).__name__}")
