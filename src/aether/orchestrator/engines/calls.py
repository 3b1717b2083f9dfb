"""Calls on the authority that must get through: repeated while the link stands, given up when it breaks.

A call that is given up needs no cleaning up: after the reconnect the job's row says what to do next.
"""

from __future__ import annotations

import asyncio
from typing import Final, TypeVar

import msgspec

from aether.contract.errors import AetherError
from aether.contract.ports import Link

B = TypeVar("B", bound=msgspec.Struct)
TRANSIENT: Final = frozenset({"UNAVAILABLE", "BUSY", "DRAINING", "CELL_LIMIT"})
_DELAY_S_MIN: Final = 0.05
_DELAY_S_MAX: Final = 5.0


class LinkLostError(Exception):
    """The link broke; reconciliation after the next connect takes up the work."""


async def insist(link: Link, verb: str, body: msgspec.Struct, reply: type[B]) -> B:
    """`link.call`, repeated while the refusal is TRANSIENT; raises LinkLostError or the lasting AetherError."""
    delay_s = _DELAY_S_MIN
    while True:
        if link.closed:
            raise LinkLostError
        try:
            return await link.call(verb, body, reply)
        except AetherError as error:
            if link.closed:
                raise LinkLostError from error
            if error.code not in TRANSIENT:
                raise
        await asyncio.sleep(delay_s)
        delay_s = min(delay_s * 2, _DELAY_S_MAX)


async def send_fd(link: Link, fd: int) -> int:
    """`link.send_fd`, with a broken link as LinkLostError."""
    try:
        return await link.send_fd(fd)
    except (AetherError, OSError) as error:
        if link.closed:
            raise LinkLostError from error
        raise


async def take_fd(link: Link, token: int) -> int:
    """`link.take_fd`, with a broken link as LinkLostError."""
    try:
        return await link.take_fd(token)
    except AetherError as error:
        if link.closed:
            raise LinkLostError from error
        raise
