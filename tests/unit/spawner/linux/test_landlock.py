from __future__ import annotations

import pytest

from aether.contract.cellplan import Landlock, LandlockRule
from aether.spawner.linux import landlock

ALL = LandlockRule("/work", ("read", "execute", "write", "device"))


@pytest.mark.parametrize("abi", range(1, 8))
def test_no_abi_is_told_of_rights_it_does_not_know(abi: int) -> None:
    lowered = landlock.lower(Landlock((ALL,), tcp=False), abi)
    handled, net, scoped = lowered.attr
    assert handled == landlock.filesystem_rights(abi)
    assert lowered.rules[0][1] & ~handled == 0
    assert (net != 0) == (abi >= 4)
    assert (scoped != 0) == (abi >= 6)
    assert lowered.size == {1: 8, 2: 8, 3: 8, 4: 16, 5: 16, 6: 24, 7: 24}[abi]


def test_making_device_nodes_is_never_granted() -> None:
    mask = landlock.lower(Landlock((ALL,)), 7).rules[0][1]
    assert mask & (1 << 6 | 1 << 11) == 0


def test_a_rule_that_allows_nothing_is_left_out() -> None:
    lowered = landlock.lower(Landlock((LandlockRule("/a", ()), LandlockRule("/dev", ("device",)))), 1)
    assert lowered.rules == ()


def test_tcp_and_scope_only_when_asked() -> None:
    assert landlock.lower(Landlock((ALL,), tcp=True, scoped=False), 7).attr[1:] == (0, 0)
