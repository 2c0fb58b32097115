"""What /metrics tells Prometheus. The counts of the engine are read when they are asked for."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from server.scheduler import Scheduler

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Its own registry, so that several applications can live in one process."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler, self.registry = scheduler, CollectorRegistry()
        where: dict[str, Any] = {"registry": self.registry, "namespace": "nanochat"}
        self.requests = Counter("requests", "HTTP requests that have ended", ["route", "status"], **where)
        self.ignored = Counter("ignored_fields", "Fields of requests that are not known and were left out", **where)
        self.in_flight = Gauge("requests_in_flight", "HTTP requests that have not ended", **where)
        timed: Any = {"buckets": SECONDS, **where}
        self.latency = Histogram("request_seconds", "From a request to the end of its response", ["route"], **timed)
        about = "From a request to its first token, or tokens"
        self.first_token = Histogram("time_to_first_token_seconds", about, **timed)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The engine's figures. The registry calls this."""
        engine, counts = self._scheduler.engine, self._scheduler.counts()
        yield GaugeMetricFamily("nanochat_queue_length", "Answers that wait for a slot", counts["queued"])
        yield GaugeMetricFamily("nanochat_slots_busy", "Answers that are being made", counts["active"])
        yield GaugeMetricFamily("nanochat_slots", "Answers that can be made at the same time", engine.slots)
        c = engine.counters
        yield CounterMetricFamily("nanochat_prompt_tokens", "Tokens of prompts", c.prompt_tokens)
        yield CounterMetricFamily("nanochat_reused_tokens", "Those found in the cache", c.reused_tokens)
        yield CounterMetricFamily("nanochat_generated_tokens", "Tokens that were made", c.generated_tokens)
        yield CounterMetricFamily("nanochat_engine_calls", "Calls to the device", c.calls)
