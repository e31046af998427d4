"""The Open Inference Protocol over gRPC: Triton's ``inference.GRPCInferenceService``, health and reflection.

The messages are those of Triton's own client package. What they mean stands in `inference`; here they are only read and
written. A call that is cancelled cancels its images within one step.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, nullcontext
from typing import Any, NoReturn

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from ..runtime import Preview, Sample
from .errors import ApiError, crashed
from .gate import caller_of_call, log_access, request_id
from .generation import encoded, engine_of, follow, make
from .inference import (
    DEFAULT_OUTPUTS,
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
from .keys import ANYBODY, CALLER
from .logs import REQUEST_ID
from .service import Service

log = logging.getLogger("fewstep")

LEAVE_S = 0.5  # when all is answered: for the clients of streams that never end, as watching the health is one
IN_STREAM = 256  # requests of one stream under way, and answers that its client has not read; then no more is read
IDLE_S = 300  # a connection without a call; clients connect again by themselves, and log a line
_SERVICE = "inference.GRPCInferenceService"
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT, 401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED, 404: grpc.StatusCode.NOT_FOUND, 429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL, 501: grpc.StatusCode.UNIMPLEMENTED, 503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip
_FAULTS = {code for status, code in _CODES.items() if status >= 500}


class GrpcServer:
    """The gRPC door, on the event loop it is started on.

    Args:
        service: the students.
        port: port to listen on.
    """

    def __init__(self, service: Service, port: int) -> None:
        self._service = service
        self._port = port
        self._server: Any = None
        self._gate, self._servicer = _Gate(service), _Servicer(service)
        self._health = health.HealthServicer()

    async def start(self) -> str:
        """Listen; gives the address."""
        settings = self._service.settings
        silence_ms = math.ceil(1000 * settings.request_timeout_s)
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", settings.max_body_bytes),
            ("grpc.max_allowed_incoming_connections", settings.max_connections),
            ("grpc.server_handshake_timeout_ms", silence_ms),  # for a connection to speak HTTP/2 at all
            ("grpc.keepalive_time_ms", silence_ms),  # then a silent client is asked whether it is still there
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_connection_idle_ms", IDLE_S * 1000),
        ]
        self._server = grpc.aio.server(
            interceptors=[self._gate], options=options, maximum_concurrent_rpcs=settings.max_connections
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((_SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME), self._server)
        for name in ("", _SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        host = self._service.settings.host
        address = f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}"
        if settings.tls_certfile and settings.tls_keyfile:
            pair = settings.tls_keyfile.read_bytes(), settings.tls_certfile.read_bytes()
            self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            self._server.add_insecure_port(address)
        await self._server.start()
        return address

    async def stop(self, timeout_s: float) -> None:
        """Answer what was accepted, for so long at most, then leave."""
        await self._health.enter_graceful_shutdown()
        all_left = asyncio.ensure_future(self._server.stop(timeout_s))
        while self._gate.num_calls and not all_left.done():
            self._servicer.read_no_more()
            await asyncio.sleep(0.02)
        await self._server.stop(min(timeout_s, LEAVE_S))
        await all_left


class _Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # the stubs are untyped
    """What `gated` is to HTTP; both keep to the rules in `gate`."""

    def __init__(self, service: Service) -> None:
        self._keys = service.keys
        self._is_logging = service.settings.access_log
        self._traces = service.traces
        self._gated: dict[str, Any] = {}  # handlers by method
        self.num_calls = 0  # under way, without those who watch health or look at the reflection

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The handler of a method, behind the gate."""
        method = details.method
        if method not in self._gated:
            handler = await continuation(details)
            if handler is None:  # there is no such method
                return None
            self._gated[method] = self._behind(method, handler)
        return self._gated[method]

    def _behind(self, method: str, handler: Any) -> Any:
        num = int(not method.startswith("/grpc.reflection"))

        @asynccontextmanager
        async def answering(context: Any) -> AsyncGenerator[None]:
            """Around the work: what it raises becomes a status, and the log has a line when it is over."""
            start_s = time.perf_counter()
            metadata = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
            name = request_id(metadata.get("x-request-id", ""))
            REQUEST_ID.set(name)
            refusal: ApiError | None = None
            caller = ANYBODY
            try:
                caller = caller_of_call(self._keys, method, metadata)
                CALLER.set(caller)
            except ApiError as error:
                refusal = error
            status: Any = None
            traces = None if refusal else self._traces
            with traces.request(method, metadata, name) if traces else nullcontext() as tell:
                self.num_calls += num
                try:
                    context.set_trailing_metadata((("x-request-id", name),))
                    if refusal:
                        raise refusal
                    yield
                except ApiError as error:
                    status = _status_of(error)
                    await _abort(context, error)
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    status = grpc.StatusCode.INTERNAL
                    await _abort(context, _crash(method, error))
                except BaseException:  # the client left, or the server stops
                    status = grpc.StatusCode.CANCELLED
                    raise
                finally:
                    self.num_calls -= num
                    if tell or self._is_logging:
                        status = status or context.code() or grpc.StatusCode.OK
                    if tell:
                        tell(status.name, status in _FAULTS)
                    if self._is_logging:
                        log_access(method, str(status), start_s, name, caller)

        async def unary(request: Any, context: Any) -> Any:
            async with answering(context):
                if request is _GARBLED:
                    raise _garbled()
                return await handler.unary_unary(request, context)

        async def stream(requests: Any, context: Any) -> AsyncGenerator[Any]:
            async with answering(context), aclosing(handler.stream_stream(requests, context)) as responses:
                async for response in responses:
                    yield response

        coding = {
            "request_deserializer": _tolerant(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }  # fmt: skip
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(unary, **coding)
        return grpc.stream_stream_rpc_method_handler(stream, **coding) if handler.stream_stream else handler


_GARBLED = object()  # in the place of a message that is none


def _garbled() -> ApiError:
    """What is told about bytes that are no message."""
    return ApiError(400, "the message cannot be decoded: it is not what this method takes")


def _crash(method: str, error: Exception) -> ApiError:
    """What is told of an error that was not foreseen; the log has it whole."""
    log.error("%s: an error that was not foreseen", method, exc_info=error)
    return crashed(REQUEST_ID.get())


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserializer that leaves the complaint to us; gRPC's own is a traceback in the log."""

    def read(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except DecodeError:
            return _GARBLED

    return read


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # the stubs are untyped
    def __init__(self, service: Service) -> None:
        self._service = service
        self._readers: set[asyncio.Task[None]] = set()

    def read_no_more(self) -> None:
        """Take no further requests from streams, which end when those that they brought are answered."""
        for reader in list(self._readers):
            reader.cancel()

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802  # gRPC's names
        return service_pb2.ServerLiveResponse(live=self._service.is_live)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=self._service.is_ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            engine_of(self._service, request.name, request.version)
        except ApiError:
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=self._service.is_ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return ParseDict(server_metadata(), service_pb2.ServerMetadataResponse())

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        engine = engine_of(self._service, request.name, request.version)
        return ParseDict(model_metadata(self._service, engine), service_pb2.ModelMetadataResponse())

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        engine = engine_of(self._service, request.name, request.version)
        config = ParseDict(model_config(self._service, engine), model_config_pb2.ModelConfig())
        return service_pb2.ModelConfigResponse(config=config)

    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        engines = list(self._service.engines.values())
        if request.name:
            engines = [engine_of(self._service, request.name, request.version)]
        stats = {"model_stats": [model_statistics(engine) for engine in engines]}
        return ParseDict(stats, service_pb2.ModelStatisticsResponse())

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        models = [model for model in self._service.repository_index() if model["state"] == "READY" or not request.ready]
        return ParseDict({"models": models}, service_pb2.RepositoryIndexResponse())

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._service.load(request.model_name, _values(request.parameters))
        return service_pb2.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._service.unload(request.model_name)
        return service_pb2.RepositoryModelUnloadResponse()

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        call = _Call(self._service, request, context.time_remaining())
        return await make(self._service, call.engine, call.requests, call.response)

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncGenerator[Any]:
        answers: asyncio.Queue[Any] = asyncio.Queue()
        calls: set[asyncio.Task[None]] = set()
        is_less = asyncio.Event()  # fewer calls, or answers that the client has not read

        async def answer(request: Any) -> None:
            try:
                if request is _GARBLED:
                    raise _garbled()
                async for response in self._responses(request):
                    answers.put_nowait(service_pb2.ModelStreamInferResponse(infer_response=response))
            except Exception as error:
                told = error if isinstance(error, ApiError) else _crash(f"/{_SERVICE}/ModelStreamInfer", error)
                failed = service_pb2.ModelStreamInferResponse(error_message=told.renamed(NAMES).message)
                if request is not _GARBLED:
                    failed.infer_response.id = request.id
                answers.put_nowait(failed)

        def over(task: asyncio.Task[None]) -> None:
            calls.discard(task)
            is_less.set()

        async def read() -> None:
            async for request in requests:
                calls.add(task := asyncio.ensure_future(answer(request)))
                task.add_done_callback(over)
                while len(calls) + answers.qsize() >= IN_STREAM:
                    is_less.clear()
                    await is_less.wait()

        async def end() -> None:
            try:
                await asyncio.wait({reader})
                if not reader.cancelled():  # which the server does that leaves
                    reader.result()
                await asyncio.gather(*calls)
            finally:
                answers.put_nowait(None)

        reader = asyncio.ensure_future(read())
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)
        ending = asyncio.ensure_future(end())
        try:
            while (response := await answers.get()) is not None:
                yield response
                is_less.set()
            await ending
        finally:
            for task in (reader, ending, *calls):
                task.cancel()

    async def _responses(self, request: Any) -> AsyncGenerator[Any]:
        """Previews as they come, where they are wanted, and the finished images as the last response."""
        call = _Call(self._service, request, None)
        every = call.preview_every
        samples: dict[int, Sample] = {}
        images = follow(self._service, call.engine, call.requests, lambda p: every > 0 and p.step % every == 0)
        try:
            async for i, image in images:
                if isinstance(image, Sample):
                    samples[i] = image
                else:
                    yield await self._in_encoder(call, [image], i)
        finally:
            await images.aclose()
        last = await self._in_encoder(call, [samples[i] for i in range(len(samples))])
        last.parameters["triton_final_response"].bool_param = True
        yield last

    async def _in_encoder(self, call: "_Call", images: list[Sample] | list[Preview], i: int = 0) -> Any:
        return await encoded(self._service, call.engine, len(images), call.response, images, i)


def _unserved(name: str) -> Callable[[_Servicer, Any, Any], Awaitable[NoReturn]]:
    async def refuse(_: _Servicer, __: Any, ___: Any) -> NoReturn:
        raise ApiError(501, f"{name} is not served: {UNSERVED}", code="not_served")

    return refuse


for _name in set(vars(service_pb2_grpc.GRPCInferenceServiceServicer)) - set(vars(_Servicer)):
    if not _name.startswith("_"):
        setattr(_Servicer, _name, _unserved(_name))


class _Call:
    """One ModelInferRequest, understood."""

    def __init__(self, service: Service, request: Any, remaining_s: float | None) -> None:
        self.id = request.id
        self.engine = engine_of(service, request.model_name, request.model_version)
        parameters = _values(request.parameters)
        if remaining_s is not None and not parameters.get("timeout") and "deadline_ms" not in parameters:
            parameters["deadline_ms"] = max(remaining_s * 1000, 1e-3)
        tensors = _tensors(request, service.settings.max_images)
        for output in request.outputs:
            refuse_unknown_output(output.name)
            if "classification" in output.parameters or "shared_memory_region" in output.parameters:
                message = f"{output.name}: neither classification nor shared memory is supported"
                raise ApiError(501, message, param=output.name)
        self.outputs = tuple(dict.fromkeys(output.name for output in request.outputs)) or DEFAULT_OUTPUTS
        self.requests, self.preview_every = requests_of(service, self.engine, tensors, parameters)

    def response(self, images: list[Sample] | list[Preview], i: int = 0) -> Any:
        """The images as a ModelInferResponse; ``i`` is the number of the first."""
        seeds = [request.seed for request in self.requests[i : i + len(images)]]
        manifest = self.engine.bundle.manifest
        response = service_pb2.ModelInferResponse(id=self.id, model_name=manifest.name, model_version=manifest.version)
        for name, array in outputs_of(images, seeds, self.outputs).items():
            response.outputs.add(name=name, datatype=OUTPUTS[name], shape=array.shape)
            response.raw_output_contents.append(to_bytes(array))
        first = images[0]
        if isinstance(first, Preview):
            response.parameters["is_preview"].bool_param = True
            response.parameters["step"].int64_param = first.step
            response.parameters["index"].int64_param = i
        else:
            response.parameters["steps"].int64_param = first.request.tableau.num_steps
            response.parameters["solver"].string_param = first.request.tableau.name
        return response


def _tensors(request: Any, limit: int) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise ApiError(400, f"raw_input_contents: {len(raw)} for {len(request.inputs)} inputs")
    for i, given in enumerate(request.inputs):
        num, dtype = tensor_of(given.name, given.datatype, given.shape, limit)
        if given.name in tensors:
            raise ApiError(400, f"{given.name}: is there twice", param=given.name)
        if "shared_memory_region" in given.parameters:
            raise ApiError(501, f"{given.name}: shared memory is not supported", param=given.name)
        if raw:
            tensors[given.name] = from_bytes(given.name, num, dtype, raw[i])
            continue
        values = [value for _, contents in given.contents.ListFields() for value in contents]
        tensors[given.name] = from_values(given.name, num, dtype, values)
    return tensors


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in each parameter, whichever of its types the client chose."""
    chosen = {name: value.WhichOneof("parameter_choice") for name, value in parameters.items()}
    return {name: getattr(parameters[name], choice) for name, choice in chosen.items() if choice}


async def _abort(context: Any, error: ApiError) -> NoReturn:
    error = error.renamed(NAMES)
    trailing = list(context.trailing_metadata() or ())
    if error.retry_after_s is not None:
        wait_ms = str(math.ceil(error.retry_after_s * 1000))
        # The first is for whoever asks, the second for gRPC's own retries: a negative number ends them.
        trailing += [("retry-after-ms", wait_ms), ("grpc-retry-pushback-ms", "-1" if error.is_final else wait_ms)]
    elif error.is_final:
        trailing.append(("grpc-retry-pushback-ms", "-1"))
    await context.abort(_status_of(error), error.message, tuple(trailing))
    raise AssertionError("abort raises")


def _status_of(error: ApiError) -> Any:
    return _CODES.get(error.status, grpc.StatusCode.INVALID_ARGUMENT)
