"""The small notations of the command line: sizes, durations, CPU shares, `K=V`, `SRC[:DEST]`. Pure.

Every parser returns a value within the bounds of `contract.limits` or raises AetherError BAD_FIELD.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Final, NoReturn

from aether.contract.errors import AetherError

_SIZE: Final = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,9}))?([kKmMgGtT])?(i?[bB])?", re.ASCII)
_SIZE_SHIFT: Final = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_DURATION_PART: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)", re.ASCII)
_DURATION_MS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_NUMBER: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?", re.ASCII)


def size_bytes(text: str) -> int:
    """`256M`, `1.5G`, `64KiB`, `4096`: powers of 1024, rounded down to whole bytes."""
    match = _SIZE.fullmatch(text)
    if match is None:
        _refuse("size", text, "write it like 4096, 64K, 256M or 1.5G")
    whole, fraction, unit, _ = match.groups()
    return int(Decimal(f"{whole}.{fraction or 0}") * (1 << _SIZE_SHIFT[(unit or "").lower()]))


def duration_ms(text: str) -> int:
    """`500ms`, `10s`, `1.5m`, `1h30m`, or plain seconds."""
    if _NUMBER.fullmatch(text):
        text += "s"
    total, at = Decimal(0), 0
    for match in _DURATION_PART.finditer(text):
        if match.start() != at:
            break
        total += Decimal(match[1]) * _DURATION_MS[match[2]]
        at = match.end()
    if at != len(text) or not text:
        _refuse("duration", text, "write it like 500ms, 10s, 5m or 1h30m")
    return int(total)


def cpu_millis(text: str) -> int:
    """`0.5` CPUs are 500 thousandths; `250m` is 250."""
    if text.endswith("m") and text[:-1].isascii() and text[:-1].isdigit():
        return int(text[:-1])
    if _NUMBER.fullmatch(text) is None:
        _refuse("CPU share", text, "write it like 0.5, 2 or 250m")
    return int(Decimal(text) * 1000)


def signal_number(text: str) -> int:
    """`HUP`, `SIGHUP` or `1`; `RTMIN+3` is written as its number."""
    import signal

    if text.isascii() and text.isdigit() and 1 <= int(text) < signal.NSIG:
        return int(text)
    name = text.upper() if text.upper().startswith("SIG") else f"SIG{text.upper()}"
    if name not in signal.Signals.__members__:
        _refuse("signal", text, "write it like TERM, SIGHUP or 9")
    return int(signal.Signals[name])


def environment(entries: Iterable[str]) -> dict[str, str]:
    """`K=V` entries; the last of one name wins."""
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            _refuse("--env", entry, "write it like NAME=value")
        found[name] = value
    return found


def file_spec(text: str, exists: bool) -> tuple[str, str]:
    """`SRC[:DEST]` as (source, path in the work directory); `exists` says whether `text` itself is a file.

    Without DEST a relative SRC keeps its path, an absolute one or one with `..` its name.
    """
    source, dest = text, ""
    if not exists and ":" in text:
        source, _, dest = text.rpartition(":")
    if not dest:
        parts = [part for part in source.split("/") if part not in ("", ".")]
        keep_path = parts and not source.startswith("/") and ".." not in parts
        dest = "/".join(parts) if keep_path else (parts[-1] if parts else "")
    if not source or not dest:
        _refuse("--file", text, "write it like data.csv or data.csv:input/data.csv")
    return source, dest


def horizons_s(texts: Iterable[str]) -> tuple[float, ...]:
    """Positive seconds; `0.1,0.5` and `100ms` are understood too."""
    found = []
    for text in texts:
        for part in text.split(","):
            if _NUMBER.fullmatch(part):
                found.append(float(part))
            else:
                found.append(duration_ms(part) / 1000)
    if not found or min(found) <= 0:
        raise AetherError(
            "BAD_FIELD", "cannot predict: --horizon needs at least one positive time", "add --horizon 0.1"
        )
    return tuple(found)


def _refuse(what: str, text: str, remedy: str) -> NoReturn:
    raise AetherError("BAD_FIELD", f"cannot read {what} {text[:80]!r}: not understood", remedy)
