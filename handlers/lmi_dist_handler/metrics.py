"""What /metrics shows: the host's own counts, and the worker's counters as they are when somebody looks."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from lmi_dist_handler.host import Host

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
STATES = ("loading", "ready", "failed", "stopped")

GAUGES = {
    "num_running": ("sequences_running", "Sequences in the batch"),
    "num_waiting": ("sequences_waiting", "Sequences in the queue"),
    "num_blocks": ("kv_blocks", "Blocks of the KV pool"),
    "num_free_blocks": ("kv_blocks_free", "Blocks that a new sequence may take"),
    "num_streams": ("requests_running", "Requests whose answer is under way in the worker"),
}
COUNTERS = {
    "num_prompt_tokens": ("prompt_tokens", "Prompt tokens of admitted requests"),
    "num_generated_tokens": ("generated_tokens", "Tokens generated"),
    "num_steps": ("steps", "Forwards"),
    "num_failed_steps": ("failed_steps", "Forwards that failed"),
    "step_seconds": ("step_seconds", "Time in steps"),
    "num_aborted": ("aborted_requests", "Requests ended because their client had gone, or on demand"),
    "num_preemptions": ("preemptions", "Sequences that lost their blocks for a while"),
    "num_prefix_query_tokens": ("prefix_query_tokens", "Prompt tokens looked up in the prefix cache"),
    "num_prefix_hit_tokens": ("prefix_hit_tokens", "Prompt tokens found there"),
}
HISTOGRAMS = {
    "first_token_s": ("time_to_first_token_seconds", "From request to first token"),
    "token_gap_s": ("time_between_tokens_seconds", "From a token to the next one of the same answer"),
}

Stats = Mapping[str, Mapping[str, Any]]  # by model: what its worker's `stats` replied


class Metrics:
    """The host's counts, and the text that Prometheus reads."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("lmi_http_requests", "Answers sent", ["route", "code"], registry=self._registry)
        self._seconds = Histogram(
            "lmi_http_request_seconds", "Until the answer's last byte", ["route"], buckets=SECONDS, registry=self._registry
        )
        self._gone = Counter("lmi_http_clients_gone", "Clients that left before their answer's end", registry=self._registry)

    def answered(self, route: str, code: int, seconds: float) -> None:
        self._requests.labels(route, str(code)).inc()
        self._seconds.labels(route).observe(seconds)

    def client_gone(self) -> None:
        self._gone.inc()

    def text(self, hosts: Iterable[Host], stats: Stats) -> bytes:
        """All of it in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(_Snapshot(list(hosts), stats))
        return generate_latest(self._registry) + generate_latest(registry)


class _Snapshot(Collector):
    """The state of all models at one moment."""

    def __init__(self, hosts: list[Host], stats: Stats) -> None:
        self._hosts = hosts
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []  # else registering would collect once for nothing

    def collect(self) -> Iterable[Metric]:
        state = GaugeMetricFamily("lmi_model_state", "1 for the state that the model is in", labels=["model", "state"])
        in_flight = GaugeMetricFamily("lmi_requests_in_flight", "Requests that the worker is answering", labels=["model"])
        restarts = CounterMetricFamily("lmi_worker_restarts", "Workers that were replaced", labels=["model"])
        for host in self._hosts:
            in_flight.add_metric([host.name], host.num_in_flight)
            restarts.add_metric([host.name], host.num_restarts)
            for name in STATES:
                state.add_metric([host.name, name], float(host.state == name))
        yield from (state, in_flight, restarts, *self._gauges(), *self._counters(), *self._histograms(), self._waits())

    def _gauges(self) -> Iterable[Metric]:
        for key, (name, about) in GAUGES.items():
            family = GaugeMetricFamily(f"lmi_{name}", about, labels=["model"])
            for model, values in self._stats.items():
                family.add_metric([model], values[key])
            yield family
        used = GaugeMetricFamily("lmi_kv_blocks_used", "Blocks that requests hold", labels=["model"])
        usage = GaugeMetricFamily("lmi_kv_cache_usage", "Share of the KV blocks that requests hold", labels=["model"])
        for model, values in self._stats.items():
            num_used = values["num_blocks"] - values["num_free_blocks"]
            used.add_metric([model], num_used)
            usage.add_metric([model], num_used / values["num_blocks"])
        yield from (used, usage)

    def _counters(self) -> Iterable[Metric]:
        for key, (name, about) in COUNTERS.items():
            family = CounterMetricFamily(f"lmi_{name}", about, labels=["model"])
            for model, values in self._stats.items():
                family.add_metric([model], values[key])
            yield family

    def _histograms(self) -> Iterable[Metric]:
        for key, (name, about) in HISTOGRAMS.items():
            family = HistogramMetricFamily(f"lmi_{name}", about, labels=["model"])
            for model, values in self._stats.items():
                family.add_metric([model], _cumulative(values[key]), sum_value=values[key]["sum"])
            yield family

    def _waits(self) -> Metric:
        family = SummaryMetricFamily("lmi_queue_seconds", "From the engine's queue to the first step", labels=["model"])
        for model, values in self._stats.items():
            family.add_metric([model], values["num_begun"], values["waiting_seconds"])
        return family


def _cumulative(histogram: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Prometheus counts what is at most the bound, so each bucket holds those before it."""
    totals = itertools.accumulate(histogram["counts"])
    return [(str(bound), float(total)) for bound, total in zip([*histogram["bounds"], "+Inf"], totals, strict=True)]
