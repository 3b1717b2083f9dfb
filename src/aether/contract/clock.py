"""Times as the formats want them: RFC 3339 UTC with microseconds, from nanoseconds since the epoch."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def rfc3339(epoch_ns: int) -> str:
    """`1_790_000_000_123_456_000` -> `2026-09-21T13:33:20.123456Z`."""
    seconds, nanos = divmod(epoch_ns, 1_000_000_000)
    t = time.gmtime(seconds)
    return (
        f"{t.tm_year:04d}-{t.tm_mon:02d}-{t.tm_mday:02d}T"
        f"{t.tm_hour:02d}:{t.tm_min:02d}:{t.tm_sec:02d}.{nanos // 1000:06d}Z"
    )


def epoch_ns(text: str) -> int:
    """The inverse of `rfc3339`; raises ValueError."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"no time zone in {text!r}")
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000


def calendar(epoch_ns: int) -> dict[str, int]:
    """The time in UTC as parts: `epoch_s`, `month` 1-12, `day` 1-31, `weekday` 1 (Monday) to 7, `hour`, `minute`."""
    seconds = epoch_ns // 1_000_000_000
    t = time.gmtime(seconds)
    return {
        "epoch_s": seconds,
        "month": t.tm_mon,
        "day": t.tm_mday,
        "weekday": t.tm_wday + 1,
        "hour": t.tm_hour,
        "minute": t.tm_min,
    }
