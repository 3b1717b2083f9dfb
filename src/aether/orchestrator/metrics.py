"""aurorad's metrics. Children are looked up once and kept: `labels()` costs more than the increment."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from prometheus_client import Counter, Histogram

from aether.telemetry.metrics import Metrics


class JobMetrics:
    """Names `aether_aurorad_*`; one registry per service, so that two in one process do not share counts."""

    def __init__(self) -> None:
        self._metrics = Metrics("aurorad")
        submitted = self._metrics.counter("jobs_submitted", "Jobs accepted", ("kind",))
        finished = self._metrics.counter("jobs_finished", "Jobs with a durable outcome", ("kind", "state"))
        engine = self._metrics.histogram("model_request_seconds", "In the engine, wait included", ("model",))
        deaths = self._metrics.counter("model_worker_deaths", "Model runtimes that died", ("model",))
        self.submitted: Callable[[str], Counter] = cache(submitted.labels)
        self.finished: Callable[[str, str], Counter] = cache(finished.labels)
        self.engine_seconds: Callable[[str], Histogram] = cache(engine.labels)
        self.worker_deaths: Callable[[str], Counter] = cache(deaths.labels)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        self._metrics.gauge(name, text).set_function(read)

    def exposition(self) -> bytes:
        """Prometheus text; takes milliseconds, so call it off the loop."""
        return self._metrics.exposition()
