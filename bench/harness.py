"""What the benchmarks share: an instance of their own, percentiles, the machine's load, tables and JSON."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aether.contract.paths import Layout
from aether.daemons import control

OUT = Path(__file__).parent / "out"


@contextlib.contextmanager
def instance() -> Iterator[Layout]:
    """A fresh instance in a directory of its own, stopped and removed at the end."""
    state = Path(tempfile.mkdtemp(prefix="aether-bench-"))
    layout = Layout(state)
    try:
        control.ensure_running(state, lambda text: None)
        yield layout
    finally:
        with contextlib.suppress(Exception):
            control.down(state)
        shutil.rmtree(state, ignore_errors=True)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of `values` lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def fdatasync_ms(directory: Path, count: int = 200, size_bytes: int = 2048) -> list[float]:
    """Times of one append and fdatasync each, in the file system that the instance uses."""
    path = directory / "fdatasync.probe"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    times = []
    try:
        for _ in range(count):
            start = time.perf_counter()
            os.write(fd, b"\0" * size_bytes)
            os.fdatasync(fd)
            times.append((time.perf_counter() - start) * 1e3)
    finally:
        os.close(fd)
        path.unlink()
    return times


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "load_1m": os.getloadavg()[0],
    }


def report(name: str, rows: list[dict[str, Any]], facts: dict[str, Any] | None = None) -> None:
    """Prints `rows` as a table and writes them with the machine's facts."""
    OUT.mkdir(exist_ok=True)
    document = {
        "name": name,
        "time_epoch_s": int(time.time()),
        "machine": machine(),
        "facts": facts or {},
        "rows": rows,
    }
    (OUT / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    columns = list(rows[0])
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    print(f"\n{name}   ({', '.join(f'{key} {value}' for key, value in machine().items())})")
    print("  ".join(column.ljust(width) for column, width in zip(columns, widths, strict=True)))
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
