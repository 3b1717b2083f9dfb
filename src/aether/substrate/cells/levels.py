"""Which driver builds a cell, at which level, and what that driver cannot do: pure.

`require` names levels, mechanisms, or the driver itself. A level that one driver alone offers chooses it; without
such a word the driver is `native`. What is required and is not there fails closed, before anything is started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

from aether.contract.cellplan import DRIVERS
from aether.contract.cells import RUNGS, CellSpec
from aether.contract.errors import AetherError
from aether.substrate.cells.facts import Facts, Lack

NATIVE: Final = "native"
GVISOR: Final = "gvisor"
LEVELS_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "native": ("process", "cell"),
    "runc": ("cell",),
    "crun": ("cell",),
    "runsc": (GVISOR,),
}
"""The levels of each driver; the last one is what its cells have."""
UNDRIVEN: Final[Mapping[str, Lack]] = {
    "wasm": Lack("no driver runs WASM in a cell of its own", "require gvisor or cell"),
    "microvm": Lack("no driver starts a guest kernel per cell", "require gvisor: a kernel of its own, in user space"),
    "pod": Lack("no driver places cells with a container orchestrator", "require gvisor or cell"),
}
SENTRY_PIDS: Final = 64
"""Threads that gVisor's kernel needs for itself in the cell's cgroup (38 were seen with two CPUs)."""
_OWN_KERNEL: Final = "gVisor's kernel, not Linux, serves the cell"
LACKS: Final[Mapping[str, Mapping[str, Lack]]] = {
    "runsc": {
        "landlock": Lack(f"{_OWN_KERNEL}, and has no Landlock", "use the native driver, runc or crun"),
        "cgroup-pids": Lack(
            f"{_OWN_KERNEL}: the cgroup bounds its threads, which are not the cell's processes",
            "bound the memory, or use the native driver, runc or crun",
        ),
        "tmpfs-inodes": Lack("gVisor bounds the bytes of a tmpfs and not its inodes", "bound the memory"),
    }
}


def choose(words: Sequence[str], facts: Facts) -> str:
    """The driver for these words of `require`. Raises AetherError LEVEL_UNMET with the reason and the remedy."""
    named = {word for word in words if word in DRIVERS}
    if GVISOR in words:
        named.add("runsc")
    if len(named) > 1:
        _unmet(" and ".join(sorted(named)), Lack("a cell has one driver", "require one of them"))
    driver = named.pop() if named else NATIVE
    lack = facts.missing.get("cell") if driver != NATIVE else None
    lack = facts.drivers.get(driver) or lack
    if lack is not None:
        _unmet(GVISOR if GVISOR in words else driver, lack)
    return driver


def require(words: Sequence[str], facts: Facts) -> None:
    """Whether cells here can have all of this; raises AetherError LEVEL_UNMET with the reason and the remedy."""
    lacks = {**UNDRIVEN, **facts.missing, **LACKS.get(choose(words, facts), {})}
    for word in words:
        lack = lacks.get(word)
        if lack is not None and word != "process":
            _unmet(word, lack)


def check_network(driver: str, spec: CellSpec) -> None:
    """gVisor's network stack is its own: no proxy outside can listen in it, and it shares none. LEVEL_UNMET."""
    if driver == "runsc" and (spec.network is not None or not spec.isolate_network):
        _unmet(GVISOR, Lack("with it a cell has no network at all", "use the native driver, runc or crun"))


def level_of(driver: str, facts: Facts) -> str:
    """The level of a driver's cells on this host."""
    return facts.level if driver == NATIVE else LEVELS_OF[driver][-1]


def levels_here(facts: Facts) -> tuple[str, ...]:
    """Every level that a cell can have on this host."""
    here = {"process", facts.level}
    here |= {level_of(driver, facts) for driver, lack in facts.drivers.items() if lack is None}
    return tuple(level for level in RUNGS if level in here)


def _unmet(word: str, lack: Lack) -> NoReturn:
    message = f"cannot meet the required level {word}: {lack.reason}"
    raise AetherError("LEVEL_UNMET", message, lack.remedy, {"required": word})
