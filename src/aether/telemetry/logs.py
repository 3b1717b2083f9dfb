"""Structured logs of the daemons: one JSON object per line on stderr, which the supervisor sends to a file.

Every line carries `time`, `level`, `role`, `event`. Values are never tickets, keys or bodies: callers log
ids, codes and digests.
"""

from __future__ import annotations

import sys
from typing import Any

import structlog


def configure(role: str) -> structlog.typing.FilteringBoundLogger:
    """Sets the process's logger; call once per process."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(sort_keys=True),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logger: Any = structlog.get_logger(role=role)
    return logger  # type: ignore[no-any-return]
