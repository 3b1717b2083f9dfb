"""Structured logs of the daemons: one JSON object per line on stderr, which the supervisor sends to a file.

Every line carries `time`, `level`, `role`, `event`. Values are never tickets, keys or bodies: callers log
ids, codes and digests. What uses the standard library's `logging` comes out in the same form.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def configure(role: str) -> structlog.typing.FilteringBoundLogger:
    """Sets the process's logger; call once per process."""
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.format_exc_info,
    ]
    render = structlog.processors.JSONRenderer(sort_keys=True)
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
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
