"""Landlock rights: from the words of a plan to the masks of one kernel's ABI (landlock(7), ABI 1 to 7).

ABI 1 (5.13) file hierarchies; 2 refer; 3 truncate; 4 TCP bind and connect; 5 ioctl on devices; 6 scoped signals
and abstract sockets; 7 audit flags, nothing to handle. UDP is not covered by any: the network namespace and
seccomp are. What an ABI lacks is left out of the masks, and the report names the ABI.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aether.contract.cellplan import Landlock
from aether.spawner.linux import kernel

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << n for n in range(6))
MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_SYM = 1 << 7, 1 << 8, 1 << 9, 1 << 10, 1 << 12
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
FILE_RIGHTS: Final = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

WORDS: Final = {
    "read": READ_FILE | READ_DIR,
    "execute": EXECUTE,
    # Making device nodes (1 << 6, 1 << 11) is never granted.
    "write": WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_SYM
    | REFER | TRUNCATE,
    "device": IOCTL_DEV,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lowered:
    """`attr` is landlock_ruleset_attr {fs, net, scoped}, of which the kernel is told the first `size` bytes."""

    abi: int
    size: int
    attr: tuple[int, int, int]
    rules: tuple[tuple[str, int], ...]


def probe_abi() -> int:
    """The kernel's ABI, 0 without Landlock (not built, not in lsm=, or refused by a filter)."""
    try:
        return kernel.syscall("landlock_create_ruleset", None, 0, 1)
    except OSError:
        return 0


def filesystem_rights(abi: int) -> int:
    bits = 13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16
    return (1 << bits) - 1


def lower(landlock: Landlock, abi: int) -> Lowered:
    """Masks for `abi` (at least 1). REFER is denied by ABI 1 in any case, so leaving it out stays strict."""
    handled = filesystem_rights(abi)
    net = 3 if abi >= 4 and not landlock.tcp else 0
    scoped = 3 if abi >= 6 and landlock.scoped else 0
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    rules = []
    for rule in landlock.rules:
        mask = 0
        for word in rule.access:
            mask |= WORDS[word]
        if mask & handled:
            rules.append((rule.path, mask & handled))
    return Lowered(abi, size, (handled, net, scoped), tuple(rules))
