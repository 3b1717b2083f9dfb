"""Whose ids a cell's ids are on the host, and which ids a spawner has to give.

A spawner that is root gives each cell a whole block. An ordinary user's has what subuid(5) lends the user: seen from
its user namespace the user is 0 and the lent ids follow from 1 on, and each cell gets a pair of them, since PID 1 and
the executables are all that a cell needs. Without lent ids all cells have the user's own. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from aether.contract import limits
from aether.contract import planfields as pf

UID_MAX: Final = (1 << 32) - 2
PAIR: Final = 2
KINDS: Final = ("root", "subordinate", "own")


@dataclass(frozen=True, slots=True)
class IdMap:
    """Which host ids the cell's ids are.

    Block (`count` > 2, needs root): ids 0..count-1 inside are host_uid.., host_gid.. outside; PID 1 runs as
    `init_uid`, executables as `job_uid`, so that they can neither signal nor trace PID 1.
    Pair (`count` == 2, needs two lent ids): `init_uid` and `job_uid` are host_uid and the one after it.
    Single (`count` == 1, any user): `job_uid` inside is `host_uid` outside, for PID 1 too.
    """

    host_uid: int
    host_gid: int
    count: int
    init_uid: int = 0
    job_uid: int = 1000
    job_gid: int = 1000

    def offset(self, inside: int) -> int:
        """How far an id inside lies from the first one outside."""
        if self.count > PAIR:
            return inside
        return 0 if self.count == 1 or inside == self.init_uid else 1

    @property
    def job_host(self) -> tuple[int, int]:
        """uid and gid of the executables on the host."""
        return self.host_uid + self.offset(self.job_uid), self.host_gid + self.offset(self.job_gid)

    def extents(self, host: int, job: int) -> tuple[tuple[int, int, int], ...]:
        """(inside, outside, length) as in uid_map of user_namespaces(7); `host`, `job` of the uids or the gids."""
        if self.count > PAIR:
            return ((0, host, self.count),)
        return ((job, host, 1),) if self.count == 1 else ((self.init_uid, host, 1), (job, host + 1, 1))


@dataclass(frozen=True, slots=True)
class IdSpace:
    """The ids of one spawner, as it numbers them itself: `slots` blocks of `block` ids from `first` on.

    `user` is who it is to the host, and `lent` the host's number of `first` where that is another one.
    """

    kind: str
    user: int
    first: int = 0
    block: int = 1
    slots: int = 0
    lent: int = 0

    def host(self, uid: int) -> int:
        """The host's number of a uid."""
        if self.kind != "subordinate":
            return uid
        return self.user if uid < self.first else self.lent + uid - self.first

    def start(self, slot: int) -> int:
        """The first id of a block."""
        return self.first + slot * self.block

    def slot(self, uid: int) -> int | None:
        """The block that begins at `uid`, None when none does."""
        number, rest = divmod(uid - self.first, self.block)
        return number if not rest and 0 <= number < self.slots else None


def root_space() -> IdSpace:
    return IdSpace("root", 0, limits.CELL_UID_BASE, limits.CELL_UID_BLOCK, limits.CELL_UID_SLOTS, limits.CELL_UID_BASE)


def parse_id_map(value: object, field: str) -> IdMap:
    """Raises PlanError."""
    obj = pf.dataclass_object(value, field, IdMap)
    numbers = {name: pf.integer(item, f"{field}.{name}", 0, UID_MAX) for name, item in obj.items()}
    ids = IdMap(**numbers)
    if ids.count < 1 or ids.host_uid + ids.count > UID_MAX or ids.host_gid + ids.count > UID_MAX:
        pf.refuse(f"{field}.count", "the block leaves the range of ids")
    if ids.job_uid == 0:
        pf.refuse(f"{field}.job_uid", "executables never run as root of the cell")
    if ids.count == 1:
        if ids.init_uid != ids.job_uid:
            pf.refuse(f"{field}.init_uid", "a single id serves PID 1 and executables")
        return ids
    if ids.host_uid < 1 or ids.host_gid < 1:
        pf.refuse(field, "the block must not hold the host's root")
    if ids.count > PAIR and max(ids.init_uid, ids.job_uid, ids.job_gid) >= ids.count:
        pf.refuse(f"{field}.count", "the block is smaller than its ids")
    if ids.init_uid == ids.job_uid or (ids.count == PAIR and ids.init_uid == ids.job_gid):
        pf.refuse(f"{field}.init_uid", "must differ from job_uid")
    return ids


def describe_ids(ids: IdMap) -> str:
    if ids.count == 1:
        return f"ids: {ids.job_uid}:{ids.job_gid} inside is {ids.host_uid}:{ids.host_gid} on the host"
    last = ids.host_uid + ids.count - 1
    inside = f"0-{ids.count - 1}" if ids.count > PAIR else f"{ids.init_uid} and {ids.job_uid}"
    whose = "on the host" if ids.count > PAIR else "of the ids lent to the spawner's user"
    who = f"PID 1 is {ids.init_uid}, executables are {ids.job_uid}:{ids.job_gid}"
    return f"ids: {inside} inside are {ids.host_uid}-{last} {whose}; {who}"


def read_space(value: dict[str, Any]) -> IdSpace:
    """Of the spawner's `hello`."""
    return IdSpace(**value)
