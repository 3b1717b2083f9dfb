"""Model jobs through the authenticated, audited, durable API: throughput at 32 clients, overhead at one.

The overhead is against a bare onnxruntime call of the same graphs in this process plus one fdatasync, taken in
turns with the requests, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import uvloop

from aether.contract.paths import Layout
from bench import harness, sample, wire

CLIENTS = 32


def throughput(layout: Layout, seconds: float) -> dict[str, Any]:
    """`CLIENTS` clients, one job per request, from a process of their own."""
    path, body = sample.predict_request()
    request = wire.post(path, body)
    socket = str(layout.api_socket)
    uvloop.run(wire.closed_loop(socket, request, 4, 2.0))  # warm: the runtime is up, caches are filled
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        start = time.perf_counter()
        latencies, failures = pool.apply(_drive, (socket, request, seconds))
        elapsed = time.perf_counter() - start
    sync = harness.fdatasync_ms(layout.root)
    return {
        "clients": CLIENTS,
        "jobs": len(latencies),
        "failures": failures,
        "jobs_per_s": len(latencies) / elapsed,
        "p50_ms": harness.percentile(latencies, 0.50),
        "p99_ms": harness.percentile(latencies, 0.99),
        "fdatasync_p50_ms": statistics.median(sync),
    }


def _drive(socket: str, request: bytes, seconds: float) -> tuple[list[float], int]:
    return uvloop.run(wire.closed_loop(socket, request, CLIENTS, seconds))


def overhead(layout: Layout, count: int) -> dict[str, Any]:
    """Concurrency 1, interleaved with a bare call and one fdatasync."""
    bare = bare_call(layout.models / sample.MODEL)
    path, body = sample.predict_request()
    request = wire.post(path, body)

    async def run() -> tuple[list[float], list[float], list[float]]:
        connection = await wire.connect(str(layout.api_socket))
        api, model, sync = [], [], []
        for _ in range(count):
            start = time.perf_counter()
            status, answer = await connection.ask(request)
            api.append((time.perf_counter() - start) * 1e3)
            if status != 200:
                raise SystemExit(f"cannot measure: status {status}: {answer[:300]!r}")
            start = time.perf_counter()
            bare()
            model.append((time.perf_counter() - start) * 1e3)
            sync += harness.fdatasync_ms(layout.root, 1)
        return api, model, sync

    api, model, sync = uvloop.run(run())
    floor = statistics.median(model) + statistics.median(sync)
    return {
        "n": count,
        "api_p50_ms": statistics.median(api),
        "api_p99_ms": harness.percentile(api, 0.99),
        "bare_p50_ms": statistics.median(model),
        "fdatasync_p50_ms": statistics.median(sync),
        "overhead_p50_ms": statistics.median(api) - floor,
    }


def bare_call(model_dir: Path) -> Any:
    """The same graphs on the same input by onnxruntime alone."""
    from aether.runtime.reference import bare_predict

    version = sorted(path for path in model_dir.iterdir() if path.is_dir())[-1]
    _, body = sample.predict_request()
    return bare_predict(version, body)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--count", type=int, default=500)
    asked = parser.parse_args()
    with harness.instance() as layout:
        asyncio.run(ready(layout))
        harness.report("model_overhead", [overhead(layout, asked.count)])
        harness.report("model_throughput", [throughput(layout, asked.seconds)])


async def ready(layout: Layout) -> None:
    """The first request starts the model runtime; later ones are what is measured."""
    path, body = sample.predict_request()
    connection = await wire.connect(str(layout.api_socket))
    status, answer = await connection.ask(wire.post(path, body))
    if status != 200:
        raise SystemExit(f"cannot measure: status {status}: {answer[:500]!r}")


if __name__ == "__main__":
    main()
