"""aurorad's counters. Children are looked up once and kept: `labels()` costs more than the increment."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """One registry per service, so that two services in one process do not share counts."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        submitted = Counter("aether_jobs_submitted_total", "Jobs accepted", ["kind"], registry=self._registry)
        finished = Counter(
            "aether_jobs_finished_total", "Jobs with a durable outcome", ["kind", "state"], registry=self._registry
        )
        engine = Histogram(
            "aether_model_request_seconds", "Model request in the engine, wait included", ["model"],
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        deaths = Counter(
            "aether_model_worker_deaths_total", "Model runtimes that died", ["model"], registry=self._registry
        )
        self.submitted: Callable[[str], Counter] = cache(submitted.labels)
        self.finished: Callable[[str, str], Counter] = cache(finished.labels)
        self.engine_seconds: Callable[[str], Histogram] = cache(engine.labels)
        self.worker_deaths: Callable[[str], Counter] = cache(deaths.labels)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        Gauge(name, text, registry=self._registry).set_function(read)

    def exposition(self) -> bytes:
        """Prometheus text; takes milliseconds, so call it off the loop."""
        return generate_latest(self._registry)
