"""The counts of one cell: told once when so many bytes passed, refused above its own limits."""

from __future__ import annotations

import asyncio

import pytest

from aether.contract.network import NetworkLimits
from aether.egress.meter import Meter, Watch
from aether.egress.rules import RefusedError


def test_somebody_is_told_once_when_so_much_passed() -> None:
    async def main() -> None:
        meter, told = Meter(NetworkLimits(), lambda: 0.0), []
        watch = Watch(meter, asyncio.get_running_loop(), lambda: None)
        meter.tell_at(100, 50, lambda: told.append((meter.sent_bytes, meter.received_bytes)))
        watch.sent(99)
        assert not told
        watch.received(50)
        watch.received(50)
        assert told == [(99, 50)]
        meter.tell_at(1, 1, lambda: told.append((0, 0)))
        assert told[1:] == [(0, 0)], "at once, for it has passed already"
        watch.close()

    asyncio.run(main())


def test_a_cells_own_limit_refuses() -> None:
    async def main() -> None:
        watch = Watch(Meter(NetworkLimits(sent_bytes=10), lambda: 0.0), asyncio.get_running_loop(), lambda: None)
        watch.sent(10)
        with pytest.raises(RefusedError):
            watch.sent(1)
        watch.close()

    asyncio.run(main())
