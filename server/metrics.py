"""Prometheus metrics, read off the engines when they are asked for: serving pays nothing for them.

Names are Triton's where Triton has one, so its panels work (hence no ``_total``, which a typed counter would get from
the client library). Here ``nv_inference_exec_count`` counts network executions and ``nv_inference_count`` rows moved by
one step: their ratio is the mean batch. The reason ``DEADLINE`` is ours, and so is the histogram of durations: Triton's
is of decoupled models only. A student's counts outlive a reload, and go on with what the engine before it finishes.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.registry import Collector

from ..runtime.engine import DURATIONS_S
from .service import Service

_LABELS = ["model", "version"]


def registry_of(service: Service) -> CollectorRegistry:
    """A registry that shows this service."""
    registry = CollectorRegistry()
    registry.register(_Engines(service))
    return registry


class _Engines(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service
        self._priorities: set[int] = set()  # that were seen in a line: its end is told too

    def collect(self) -> Iterator[Metric]:
        success = UnknownMetricFamily("nv_inference_request_success", "Samples finished", labels=_LABELS)
        failure = UnknownMetricFamily(
            "nv_inference_request_failure", "Samples that ended otherwise", labels=[*_LABELS, "reason"]
        )
        count = UnknownMetricFamily("nv_inference_count", "Rows moved by one step", labels=_LABELS)
        executions = UnknownMetricFamily("nv_inference_exec_count", "Network executions", labels=_LABELS)
        compute = UnknownMetricFamily("nv_inference_compute_infer_duration_us", "Time in steps", labels=_LABELS)
        pending = GaugeMetricFamily("nv_inference_pending_request_count", "Samples waiting", labels=_LABELS)
        request = UnknownMetricFamily("nv_inference_request_duration_us", "Of finished samples", labels=_LABELS)
        queue = UnknownMetricFamily("nv_inference_queue_duration_us", "Of it, time in line", labels=_LABELS)
        duration = HistogramMetricFamily(
            "fewstep_sample_duration_seconds", "Of finished samples: from submission to the last step", labels=_LABELS
        )
        load = GaugeMetricFamily(
            "nv_model_load_duration_secs", "Of making the network ready and warming it up", labels=_LABELS
        )
        running = GaugeMetricFamily("fewstep_running_rows", "Samples in slots", labels=_LABELS)
        places = GaugeMetricFamily("fewstep_max_rows", "Slots", labels=_LABELS)
        preempted = UnknownMetricFamily("fewstep_preemption_count", "Rows that made room for others", labels=_LABELS)
        line = GaugeMetricFamily("fewstep_waiting_samples", "Samples waiting", labels=[*_LABELS, "priority"])
        tick = GaugeMetricFamily("fewstep_tick_seconds", "Measured cost of a tick without its rows", labels=_LABELS)
        row = GaugeMetricFamily("fewstep_tick_row_seconds", "Measured cost of each row in a tick", labels=_LABELS)
        deviation = GaugeMetricFamily(
            "fewstep_tick_deviation_seconds", "Mean distance of a tick from its measured cost", labels=_LABELS
        )
        simulated = GaugeMetricFamily(
            "fewstep_simulated_accelerator", "1: times are those of a model, not of a device", labels=["cost"]
        )
        if self._service.simulated:
            simulated.add_metric([self._service.simulated], 1)
            yield simulated
        for (name, version), done in list(self._service.counters.items()):
            labels = [name, version]
            success.add_metric(labels, done.finished)
            reasons = {
                "REJECTED": done.rejected, "CANCELED": done.cancelled, "DEADLINE": done.expired, "BACKEND": done.failed
            }  # fmt: skip
            for reason, value in reasons.items():
                failure.add_metric([*labels, reason], value)
            count.add_metric(labels, done.row_steps)
            executions.add_metric(labels, done.ticks)
            compute.add_metric(labels, done.busy_s * 1e6)
            working = [engine for engine in self._service.working if engine.counters is done]
            pending.add_metric(labels, sum(engine.num_waiting for engine in working))
            request.add_metric(labels, (done.queue_s + done.run_s) * 1e6)
            queue.add_metric(labels, done.queue_s * 1e6)
            bounds = [*map(str, DURATIONS_S), "+Inf"]
            buckets = list(zip(bounds, accumulate(done.durations), strict=True))
            duration.add_metric(labels, buckets, done.queue_s + done.run_s)
            running.add_metric(labels, sum(engine.num_running for engine in working))
            preempted.add_metric(labels, done.preempted)
            waiting = Counter({0: 0})
            for engine in working:
                waiting.update(engine.waiting_by_priority)
            self._priorities |= waiting.keys()
            for priority in sorted(self._priorities):
                line.add_metric([*labels, str(priority)], waiting[priority])
            served = self._service.engines.get(name)
            if served is None or served.counters is not done:
                continue  # it is served no more: only what it did is told
            load.add_metric(labels, served.load_s)
            places.add_metric(labels, served.max_rows)
            fixed_s, row_s = served.pace.line()
            tick.add_metric(labels, fixed_s)
            row.add_metric(labels, row_s)
            deviation.add_metric(labels, served.pace.deviation_s)
        yield from (success, failure, count, executions, compute, request, queue, pending, running, places, line)
        yield from (tick, row, deviation, preempted, duration, load)
