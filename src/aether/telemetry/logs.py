"""Structured logs of the daemons: one JSON object per line on stderr, which the supervisor sends to a file.

Every line carries `time`, `level`, `role`, `event`. Values are never tickets, keys or bodies: callers log
ids, codes and digests. What uses the standard library's `logging` comes out in the same form. A line that cannot be
written (a full disk) is lost: saying something must never be what ends, or fails to end, a daemon.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any, TextIO, cast

import structlog


class _Lenient:
    """`file`, but for its errors."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._file.flush()


def configure(role: str) -> structlog.typing.FilteringBoundLogger:
    """Sets the process's logger; call once per process."""
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.format_exc_info,
    ]
    render = structlog.processors.JSONRenderer(sort_keys=True)
    sink = cast(TextIO, _Lenient(sys.stderr))
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sink),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sink)
    strip = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    processors: list[structlog.typing.Processor] = [strip, _with_role(role), render]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=processors))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logger: Any = structlog.get_logger(role=role)
    return logger  # type: ignore[no-any-return]


def _with_role(role: str) -> structlog.typing.Processor:
    def add(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event["role"] = role
        return event

    return add
