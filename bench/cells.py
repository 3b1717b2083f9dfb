"""`/bin/true` in a cell through the API, beside bwrap and posix_spawn, interleaved in one run.

bwrap runs with `--unshare-all` (its user namespace included) and a read-only root, without cgroup, seccomp or
Landlock; it is skipped, and said so, where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

import uvloop

from aether.contract.paths import Layout
from bench import harness, wire

BWRAP = ("--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--die-with-parent", "/bin/true")


def spawn_and_wait(argv: list[str]) -> None:
    pid = os.posix_spawnp(argv[0], argv, os.environ)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise SystemExit(f"cannot measure: {argv[0]} ended with status {status}")


def measure(layout: Layout, count: int) -> list[dict[str, Any]]:
    body = json.dumps({"kind": "command", "op": "run", "params": {"argv": ["/bin/true"]}}).encode()
    request = wire.post("/v0/jobs?wait=10s", body)
    bwrap = shutil.which("bwrap")
    peers: dict[str, Callable[[], None]] = {"posix_spawn": lambda: spawn_and_wait(["/bin/true"])}
    if bwrap:
        peers["bwrap --unshare-all"] = lambda: spawn_and_wait([bwrap, *BWRAP])

    async def run() -> dict[str, list[float]]:
        connection = await wire.connect(str(layout.api_socket))
        times: dict[str, list[float]] = {"aether API": [], **{name: [] for name in peers}}
        for number in range(count + 20):
            start = time.perf_counter()
            status, answer = await connection.ask(request)
            elapsed = (time.perf_counter() - start) * 1e3
            if status != 200 or b'"succeeded"' not in answer:
                raise SystemExit(f"cannot measure: status {status}: {answer[:500]!r}")
            taken = {"aether API": elapsed}
            for name, peer in peers.items():
                start = time.perf_counter()
                peer()
                taken[name] = (time.perf_counter() - start) * 1e3
            if number >= 20:
                for name, value in taken.items():
                    times[name].append(value)
        return times

    times = uvloop.run(run())
    base = statistics.median(times.get("bwrap --unshare-all") or times["posix_spawn"])
    return [
        {
            "launcher": name,
            "n": len(values),
            "p50_ms": statistics.median(values),
            "p99_ms": harness.percentile(values, 0.99),
            "ratio_to_peer": statistics.median(values) / base,
        }
        for name, values in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=200)
    asked = parser.parse_args()
    with harness.instance() as layout:
        rows = measure(layout, asked.count)
    harness.report("cell_true", rows, {"bwrap": shutil.which("bwrap") or "not installed: skipped"})


if __name__ == "__main__":
    main()
