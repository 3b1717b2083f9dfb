"""Ending tasks for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

_AGAIN_S: Final = 0.1


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels `tasks` until all have ended; their exceptions are seen and let go.

    Once is not enough: before Python 3.12 `asyncio.wait_for` loses a cancellation that arrives together with
    its result (https://github.com/python/cpython/issues/86296).
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=_AGAIN_S)
        for task in done:
            if not task.cancelled():
                task.exception()
