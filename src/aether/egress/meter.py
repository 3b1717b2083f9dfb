"""The limits of one cell and of each of its connections: counted here, enforced where the bytes pass.

Totals hold for the life of the cell. A connection is watched by one timer: it ends it when nothing passed for
`idle_ms`, when it is `connection_ms` old, or when the cell's bytes are used up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aether.contract.network import NetworkLimits
from aether.egress.rules import RefusedError


class Meter:
    """What a cell has used. `now_s` is the monotonic clock."""

    def __init__(self, limits: NetworkLimits, now_s: Callable[[], float]) -> None:
        self.limits = limits
        self.sent_bytes = 0
        self.received_bytes = 0
        self._now_s = now_s
        self._level = float(limits.requests_per_s)
        self._at_s = now_s()
        self._told_at: tuple[int, int, Callable[[], object]] | None = None

    def take_request(self) -> None:
        """One more request; raises RefusedError `rate`. The bucket holds one second's worth."""
        now_s, rate = self._now_s(), self.limits.requests_per_s
        self._level = min(float(rate), self._level + (now_s - self._at_s) * rate)
        self._at_s = now_s
        if self._level < 1:
            raise RefusedError("rate", f"the cell may make {rate} requests per second")
        self._level -= 1

    def tell_at(self, sent_bytes: int, received_bytes: int, tell: Callable[[], object]) -> None:
        """`tell` is called once when so much was sent, or so much received; at once if it was already."""
        self._told_at = (sent_bytes, received_bytes, tell)
        self._tell()

    def _tell(self) -> None:
        told = self._told_at
        if told is not None and (self.sent_bytes >= told[0] or self.received_bytes >= told[1]):
            self._told_at = None
            told[2]()

    def check_bytes(self) -> None:
        """Raises RefusedError `bytes` once either direction is used up; tells whoever waits for so many."""
        self._tell()
        if self.sent_bytes > self.limits.sent_bytes or self.received_bytes > self.limits.received_bytes:
            raise RefusedError("bytes", "the cell's bytes are used up")


class Watch:
    """One connection's clock and counters; `over` is the reason once it was ended. `end` is called once, then."""

    def __init__(self, meter: Meter, loop: asyncio.AbstractEventLoop, end: Callable[[], object]) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        self.over: RefusedError | None = None
        self._meter = meter
        self._loop = loop
        self._end = end
        self._started_s = self._touched_s = loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._arm()

    def sent(self, count: int) -> None:
        """Bytes left the cell; raises RefusedError when there may be no more."""
        self._touched_s = self._loop.time()
        self.sent_bytes += count
        self._meter.sent_bytes += count
        self._meter.check_bytes()

    def received(self, count: int) -> None:
        """Bytes came for the cell; raises RefusedError when there may be no more."""
        self._touched_s = self._loop.time()
        self.received_bytes += count
        self._meter.received_bytes += count
        self._meter.check_bytes()

    @property
    def age_ms(self) -> int:
        return int((self._loop.time() - self._started_s) * 1000)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> tuple[float, str]:
        limits = self._meter.limits
        idle = self._touched_s + limits.idle_ms / 1000
        old = self._started_s + limits.connection_ms / 1000
        return (idle, "idle") if idle < old else (old, "time")

    def _arm(self) -> None:
        self._timer = self._loop.call_at(self._due()[0], self._fire)

    def _fire(self) -> None:
        due, reason = self._due()
        if due > self._loop.time():
            self._arm()
            return
        limits = self._meter.limits
        message = {
            "idle": f"nothing passed for {limits.idle_ms} ms",
            "time": f"the connection is {limits.connection_ms} ms old",
        }[reason]
        self._timer = None
        self.over = RefusedError(reason, message)
        self._end()
