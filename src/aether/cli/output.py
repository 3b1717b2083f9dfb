"""Answers for people and programs: tables and lines on stdout, JSON with `--json`, errors and progress on stderr."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import msgspec

from aether.cli.terminal import printable
from aether.contract.errors import AetherError

PROGRESS_AFTER_S: Final = 1.0


def show_json(value: Any) -> None:
    """Indented JSON of a typed value or JSON text."""
    text = value if isinstance(value, bytes) else msgspec.json.encode(value)
    sys.stdout.write(msgspec.json.format(text, indent=2).decode() + "\n")


def show_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on a terminal; tab-separated lines with a header elsewhere."""
    cells = [["-" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for line in [list(columns), *cells]:
            sys.stdout.write("\t".join(line) + "\n")
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True, overflow="ignore")  # an id that is cut cannot be copied
    table.add_column(columns[-1], no_wrap=True, overflow="ellipsis", ratio=1)
    for line in cells:
        table.add_row(*(Text(cell) for cell in line))
    Console(highlight=False).print(table)


def show_fields(fields: Sequence[tuple[str, Any]]) -> None:
    """`name  value` lines, without the null ones."""
    shown = [(name, value) for name, value in fields if value not in (None, (), {}, "")]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        sys.stdout.write(f"{name:<{width}}  {printable(str(value))}\n")


def show_error(error: AetherError, *, as_json: bool = False) -> None:
    """`error: cannot X: why [CODE]` and the remedy, on stderr."""
    if as_json:
        sys.stderr.write(msgspec.json.encode({"error": error.body()}).decode() + "\n")
        return
    sys.stderr.write(f"error: {printable(error.message)} [{error.code}]\n")
    sys.stderr.write(f"remedy: {printable(error.remedy)}\n")


def note(text: str) -> None:
    """A remark for a person on stderr."""
    sys.stderr.write(printable(text) + "\n")


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """Shows on a terminal's stderr what is being waited for, once it takes longer than a second."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    state: dict[str, Any] = {"text": text, "status": None}
    lock = threading.Lock()

    def begin() -> None:
        from rich.console import Console
        from rich.markup import escape

        with lock:
            if state["text"] is not None:
                state["status"] = Console(stderr=True).status(escape(printable(state["text"])))
                state["status"].start()

    def update(changed: str) -> None:
        from rich.markup import escape

        with lock:
            state["text"] = changed
            if state["status"] is not None:
                state["status"].update(escape(printable(changed)))

    timer = threading.Timer(PROGRESS_AFTER_S, begin)
    timer.daemon = True
    timer.start()
    try:
        yield update
    finally:
        timer.cancel()
        with lock:
            state["text"] = None
            if state["status"] is not None:
                state["status"].stop()


def human_bytes(count: int | None) -> str | None:
    """`1536` -> `1.5 KiB`."""
    if count is None:
        return None
    amount, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.0f} {units[0]}" if units[0] == "B" else f"{amount:.1f} {units[0]}"
