"""OpenTelemetry spans: a request, and in it the time in line, each step and the encoding. The extra ``[otel]``.

Serving pays nothing for spans that nobody collects, and the engine nothing at all: it only remembers when its last
ticks were (`Engine.recent`). A sample runs in every tick between its start and its end, so its steps are found
afterwards, by the encoders. A caller's W3C ``traceparent`` is the parent, and its sampling decision is kept.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from ..runtime import Engine, Sample
from .settings import SettingsError

T = TypeVar("T")

LEAVE_S = 2.0  # for the last spans, when the server leaves

log = logging.getLogger("fewstep")


class Traces:
    """Makes the spans of a server.

    Args:
        endpoint: an OTLP collector's URL for traces over HTTP, such as ``http://localhost:4318/v1/traces``.
        exporter: instead of it, where finished spans go at once.
        ratio: part of the requests without a traceparent that are traced.

    Raises:
        SettingsError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str | None = None, *, exporter: Any = None, ratio: float = 1.0) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise SettingsError(f"otlp_endpoint: needs pip install 'fewstep[otel]' ({error})") from None
        self._api = trace
        self._propagator = TraceContextTextMapPropagator()
        resource = Resource.create({"service.name": "fewstep"})
        self._provider = TracerProvider(ParentBasedTraceIdRatio(ratio), resource, shutdown_on_exit=False)
        self._exporter = exporter or OTLPSpanExporter(endpoint)
        self._provider.add_span_processor((SimpleSpanProcessor if exporter else BatchSpanProcessor)(self._exporter))
        self._tracer = self._provider.get_tracer("fewstep")

    @contextmanager
    def request(self, name: str, headers: Mapping[str, str], request_id: str) -> Iterator[Callable[[str, bool], None]]:
        """The span of a request; gives what to tell its status to, and whether that is the server's fault."""
        told = {"traceparent": headers.get("traceparent", ""), "tracestate": headers.get("tracestate", "")}
        parent = self._propagator.extract(told)
        attributes = {"fewstep.request_id": request_id}
        span = self._tracer.start_span(name, parent, self._api.SpanKind.SERVER, attributes)

        def tell(status: str, is_fault: bool) -> None:
            span.set_attribute("fewstep.status", status)
            if is_fault:
                span.set_status(self._api.StatusCode.ERROR)

        with self._api.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            yield tell

    def around(self, engine: Engine, answer: Callable[[list[Sample]], T]) -> Callable[[list[Sample]], T]:
        """An encoder's work, and after it the spans of its samples; called in the request's context."""
        parent = self._api.get_current_span()
        if not parent.is_recording():
            return answer

        def work(samples: list[Sample]) -> T:
            start_s = time.monotonic()
            made = answer(samples)
            self.record(engine, samples, parent, (start_s, time.monotonic()))
            return made

        return work

    def encoding(self, work: Callable[..., T], images: int) -> Callable[..., T]:
        """An encoder's work on some of the images of a stream, with its span; called in the request's context."""
        parent = self._api.get_current_span()
        if not parent.is_recording():
            return work

        def traced(*arguments: Any) -> T:
            start_s = time.monotonic()
            made = work(*arguments)
            self._below(parent)("encode", start_s, time.monotonic(), images=images)
            return made

        return traced

    def record(
        self, engine: Engine, samples: Sequence[Sample], parent: Any = None, encode: tuple[float, float] | None = None
    ) -> None:
        """The spans of finished samples; below the current span when ``parent`` is left out."""
        parent = parent or self._api.get_current_span()
        if not parent.is_recording():
            return
        ticks = list(engine.recent)
        span = self._below(parent)
        for sample in samples:
            about = {"model": engine.bundle.name, "seed": str(sample.request.seed)}
            started_s = sample.ended_s - sample.run_s
            span("queue", started_s - sample.queue_s, started_s, priority=sample.request.priority, **about)
            mine = [tick for tick in ticks if started_s <= tick[0] and tick[1] <= sample.ended_s]
            for i, (start_s, end_s, rows) in enumerate(mine):
                span("step", start_s, end_s, step=i + 1, rows=rows, solver=sample.request.tableau.name, **about)
        if encode:
            span("encode", *encode, images=len(samples))

    def _below(self, parent: Any) -> Callable[..., None]:
        """What makes spans that are over, below another; times are those of ``time.monotonic``."""
        context = self._api.set_span_in_context(parent)
        offset_s = time.time() - time.monotonic()

        def span(name: str, start_s: float, end_s: float, **attributes: Any) -> None:
            said = {f"fewstep.{key}": value for key, value in attributes.items()}
            made = self._tracer.start_span(name, context, attributes=said, start_time=int((start_s + offset_s) * 1e9))
            made.end(int((end_s + offset_s) * 1e9))

        return span

    def stop(self, timeout_s: float = LEAVE_S) -> None:
        """Send what is left, for so long at most: the SDK's own bound is half a minute."""
        sending = threading.Thread(target=self._provider.shutdown, name="fewstep-spans", daemon=True)
        sending.start()
        sending.join(timeout_s)
        if sending.is_alive():
            log.warning("the last spans are given up: their collector did not take them within %g s", timeout_s)
            self._exporter.shutdown()  # it tries no more
