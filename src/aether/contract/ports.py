"""Ports: protocols with two implementations or a process boundary behind them.

Each has one conformance suite under `tests/conformance/` and a memory double.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec

B = TypeVar("B", bound=msgspec.Struct)
Handler = Callable[[Any], Awaitable[msgspec.Struct]]
"""Takes the decoded body of its verb and returns the reply's body; raises AetherError to refuse."""
EventHandler = Callable[[Any], None]
"""Synchronous: state changes in one step, never half-done across an await."""


class Link(Protocol):
    """A connection between two roles: calls both ways, events, descriptors.

    A call fails with AetherError: the peer's own, or UNAVAILABLE when the link is closed or saturated.
    Calls in flight are bounded (LINK_CALLS_IN_FLIGHT_MAX). Nothing is retried here.
    """

    async def call(self, verb: str, body: msgspec.Struct, reply: type[B]) -> B: ...

    def notify(self, verb: str, body: msgspec.Struct) -> None: ...

    async def send_fd(self, fd: int) -> int:
        """Hands `fd` over (duplicated; the caller still owns his) and returns its token."""
        ...

    async def take_fd(self, token: int) -> int:
        """The descriptor that the peer sent under `token`; the caller owns it. Raises PROTOCOL after 5 s."""
        ...

    def close(self) -> None: ...

    @property
    def closed(self) -> bool: ...
