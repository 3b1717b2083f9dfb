"""Metrics of one role: a private prometheus registry, with children cached by the caller.

Names follow `aether_<role>_<what>_<unit>`; the exposition is produced on request, off the hot path.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

LATENCY_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)


class Metrics:
    """A registry that belongs to one role, so that several roles can share a process in tests."""

    def __init__(self, role: str) -> None:
        self._prefix = f"aether_{role}"
        self._registry = CollectorRegistry()

    def counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"{self._prefix}_{name}", text, labels, registry=self._registry)

    def gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"{self._prefix}_{name}", text, labels, registry=self._registry)

    def histogram(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(f"{self._prefix}_{name}", text, labels, registry=self._registry, buckets=LATENCY_BUCKETS_S)

    def exposition(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self._registry)
