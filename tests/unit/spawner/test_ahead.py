"""Namespaces of blocks are made ahead one at a time, in the order in which cells get the blocks, and only once."""

from __future__ import annotations

from typing import cast

from aether.contract import limits
from aether.contract.cellplan import IdMap
from aether.spawner.ahead import BLOCKS_AHEAD, Ahead
from aether.spawner.linux.executor import LaunchError
from aether.spawner.linux.userns import Blocks
from aether.spawner.loop import Loop
from aether.spawner.roster import Roster

BLOCK = IdMap(limits.CELL_UID_BASE, limits.CELL_UID_BASE, limits.CELL_UID_BLOCK)


class Made:
    """A double of Blocks: what was asked for; refuses after `enough`."""

    def __init__(self, enough: int = 1 << 30) -> None:
        self.firsts: list[int] = []
        self.enough = enough

    def make(self, ids: IdMap) -> int:
        if len(self.firsts) == self.enough:
            raise LaunchError("user namespace", 28, "")
        self.firsts.append(ids.host_uid)
        return 0


class Now(Loop):
    """Timers fire when the test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0
        super().__init__(lambda: self.now_s)

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds
        self.turn(0.0)


def run(made: Made, ids: IdMap, ticks: int) -> Ahead:
    loop = Now()
    ahead = Ahead(loop, cast("Blocks", made))
    ahead.start(ids)
    for _ in range(ticks):
        loop.pass_s(1.0)
    ahead.start(ids)
    loop.pass_s(1.0)
    return ahead


def test_the_first_blocks_that_cells_get_once_each() -> None:
    made = Made()
    run(made, BLOCK, BLOCKS_AHEAD + 3)
    assert made.firsts[0] == Roster().free_block()
    assert len(set(made.firsts)) == len(made.firsts) == BLOCKS_AHEAD
    assert made.firsts == sorted(made.firsts, reverse=True)


def test_one_at_a_time() -> None:
    made = Made()
    run(made, BLOCK, 2)
    assert len(made.firsts) == 3


def test_a_single_id_has_no_block() -> None:
    made = Made()
    run(made, IdMap(1000, 1000, 1), 3)
    assert made.firsts == []


def test_a_host_that_refuses_is_not_asked_again() -> None:
    made = Made(enough=2)
    run(made, BLOCK, 10)
    assert len(made.firsts) == 2
