"""What is paid without doing anything: `aether --help`, and the memory of all roles with one model loaded."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aether.contract.paths import Layout
from bench import harness, jobs


def help_ms(count: int = 15) -> list[float]:
    aether = Path(sys.executable).with_name("aether")
    times = []
    for _ in range(count):
        start = time.perf_counter()
        subprocess.run([aether, "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def pss_kib(pid: int) -> int:
    """Proportional set size of a process (proc(5), smaps_rollup)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def family(pid: int) -> list[int]:
    """`pid` and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in family(int(child)))]


def memory(layout: Layout) -> list[dict[str, Any]]:
    supervisor = json.loads(layout.instance_file.read_text())["pid"]
    rows = []
    for pid in family(supervisor):
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        name = next((word.decode() for word in argv if word.startswith(b"aether.")), Path(argv[0].decode()).name)
        rows.append({"process": name, "pid": pid, "pss_mib": pss_kib(pid) / 1024})
    rows.append({"process": "all", "pid": 0, "pss_mib": sum(row["pss_mib"] for row in rows)})
    return rows


def main() -> None:
    times = help_ms()
    harness.report("help", [{"n": len(times), "p50_ms": statistics.median(times), "max_ms": max(times)}])
    with harness.instance() as layout:
        asyncio.run(jobs.ready(layout))
        time.sleep(3)
        harness.report("idle_memory", memory(layout))


if __name__ == "__main__":
    main()
