"""Which ids this process has to give: told by its uid and by the map of its user namespace."""

from __future__ import annotations

import os
from functools import cache

from aether.contract import limits
from aether.contract.cellids import PAIR, IdSpace, root_space


@cache
def here() -> IdSpace:
    """Of this process, which does not change its namespace once it has asked."""
    try:
        with open("/proc/self/uid_map") as file:
            uid_map = file.read()
    except OSError:
        uid_map = ""
    return space(os.geteuid(), uid_map)


def space(uid: int, uid_map: str) -> IdSpace:
    """Pure. `uid_map` as in user_namespaces(7): lines of inside, outside, length."""
    rows = [tuple(map(int, line.split())) for line in uid_map.splitlines()]
    if uid != 0 or not rows:
        return IdSpace("own", uid)
    covered = [row for row in rows if row[0] <= limits.CELL_UID_BASE < row[0] + row[2]]
    if covered:
        return root_space()
    user = next((row[1] for row in rows if row[0] == 0), 0)
    found = next((row for row in rows if row[0] == 1 and row[2] >= PAIR), None)
    if found is None:
        return IdSpace("own", user)
    return IdSpace("subordinate", user, 1, PAIR, found[2] // PAIR, found[1])
