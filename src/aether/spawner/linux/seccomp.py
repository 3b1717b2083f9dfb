"""The reviewed system call profile and its classic BPF program.

The table below is the profile: every refused call with its numbers and the reason. A number above REVIEWED_MAX
is a call that nobody has looked at and answers ENOSYS, so that libraries fall back. Everything else is allowed:
namespaces, ids, Landlock and cgroups bound it.

The program (seccomp(2), linux/filter.h): foreign architecture and x32 kill the process; then a balanced tree of
comparisons over the number, since installing costs about 0.65 us per instruction; then a few checks of
arguments. Arguments are compared in their low 32 bits, which is all the kernel reads of those checked.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from functools import cache
from typing import Final, NamedTuple

from aether.spawner.linux import kernel

REVIEWED_MAX: Final = 469  # file_setattr, Linux 6.17

AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT: Final = 0x40000000
NAMESPACE_MASK: Final = 0x7E020000  # every CLONE_NEW* of clone(2)
CLONE_NEWTIME: Final = 0x80  # of unshare(2) only: in clone(2) these bits are the exit signal


class Refused(NamedTuple):
    """Numbers per architecture (None: does not exist there), the errno, and why."""

    x86_64: int | None
    aarch64: int | None
    reason: str
    errno: int = errno.EPERM


REFUSED: Final[dict[str, Refused]] = {
    # other processes
    "ptrace": Refused(101, 117, "reads and writes other processes, PID 1 among them"),
    "process_vm_readv": Refused(310, 270, "reads other processes"),
    "process_vm_writev": Refused(311, 271, "writes other processes"),
    "kcmp": Refused(312, 272, "compares kernel pointers of processes"),
    "pidfd_getfd": Refused(438, 438, "takes descriptors of other processes"),
    "setns": Refused(308, 268, "enters namespaces"),
    "move_pages": Refused(279, 239, "moves memory of other processes; shows physical placement"),
    "migrate_pages": Refused(256, 238, "moves memory of other processes"),
    # mounts and roots
    "mount": Refused(165, 40, "changes the file tree"),
    "umount2": Refused(166, 39, "changes the file tree"),
    "pivot_root": Refused(155, 41, "changes the root"),
    "chroot": Refused(161, 51, "changes the root"),
    "open_tree": Refused(428, 428, "mount interface"),
    "move_mount": Refused(429, 429, "mount interface"),
    "fsopen": Refused(430, 430, "mount interface"),
    "fsconfig": Refused(431, 431, "mount interface, parses options in the kernel"),
    "fsmount": Refused(432, 432, "mount interface"),
    "fspick": Refused(433, 433, "mount interface"),
    "mount_setattr": Refused(442, 442, "mount interface"),
    "open_tree_attr": Refused(467, 467, "mount interface"),
    "statmount": Refused(457, 457, "shows host sources of mounts"),
    "listmount": Refused(458, 458, "shows mounts"),
    "quotactl": Refused(179, 60, "quota administration"),
    "quotactl_fd": Refused(443, 443, "quota administration"),
    "name_to_handle_at": Refused(303, 264, "file handles reach outside a bind mount"),
    "open_by_handle_at": Refused(304, 265, "file handles reach outside a bind mount"),
    "fanotify_init": Refused(300, 262, "watches whole mounts"),
    "fanotify_mark": Refused(301, 263, "watches whole mounts"),
    # large kernel interfaces with a history of flaws
    "bpf": Refused(321, 280, "loads kernel programs"),
    "perf_event_open": Refused(298, 241, "observes the kernel and other processes"),
    "io_uring_setup": Refused(425, 425, "performs calls past this filter"),
    "io_uring_enter": Refused(426, 426, "performs calls past this filter"),
    "io_uring_register": Refused(427, 427, "performs calls past this filter"),
    "userfaultfd": Refused(323, 282, "stalls the kernel in page faults; aids exploits"),
    "add_key": Refused(248, 217, "keyrings are not namespaced by cell"),
    "request_key": Refused(249, 218, "keyrings are not namespaced by cell"),
    "keyctl": Refused(250, 219, "keyrings are not namespaced by cell"),
    "modify_ldt": Refused(154, None, "16-bit segments; a history of flaws"),
    "vhangup": Refused(153, 58, "terminal administration"),
    "memfd_secret": Refused(447, 447, "memory that neither the host's tools nor a dump can see", errno.ENOSYS),
    "lsm_set_self_attr": Refused(460, 460, "changes security attributes"),
    # the machine
    "init_module": Refused(175, 105, "kernel modules"),
    "finit_module": Refused(313, 273, "kernel modules"),
    "delete_module": Refused(176, 106, "kernel modules"),
    "create_module": Refused(174, None, "kernel modules"),
    "get_kernel_syms": Refused(177, None, "kernel modules"),
    "query_module": Refused(178, None, "kernel modules"),
    "kexec_load": Refused(246, 104, "replaces the kernel"),
    "kexec_file_load": Refused(320, 294, "replaces the kernel"),
    "reboot": Refused(169, 142, "stops the machine"),
    "swapon": Refused(167, 224, "swap administration"),
    "swapoff": Refused(168, 225, "swap administration"),
    "acct": Refused(163, 89, "process accounting of the machine"),
    "syslog": Refused(103, 116, "kernel log"),
    "iopl": Refused(172, None, "hardware ports"),
    "ioperm": Refused(173, None, "hardware ports"),
    "settimeofday": Refused(164, 170, "sets the clock"),
    "clock_settime": Refused(227, 112, "sets the clock"),
    "clock_adjtime": Refused(305, 266, "sets the clock"),
    "adjtimex": Refused(159, 171, "sets the clock"),
    "sethostname": Refused(170, 161, "host name"),
    "setdomainname": Refused(171, 162, "host name"),
    # obsolete
    "uselib": Refused(134, None, "obsolete"),
    "ustat": Refused(136, None, "obsolete"),
    "sysfs": Refused(139, None, "obsolete"),
    "_sysctl": Refused(156, None, "obsolete"),
    "nfsservctl": Refused(180, 42, "obsolete"),
    "lookup_dcookie": Refused(212, 18, "obsolete"),
    "vserver": Refused(236, None, "obsolete"),
    # libc falls back to clone, whose flags can be checked; those of clone3 lie in memory
    "clone3": Refused(435, 435, "flags in memory cannot be checked", errno.ENOSYS),
}


class Check(NamedTuple):
    """A call allowed or refused by one argument. `rule` names a block of `_argument_blocks`."""

    x86_64: int
    aarch64: int
    rule: str
    reason: str


CHECKED: Final[dict[str, Check]] = {
    "clone": Check(56, 220, "clone", "new namespaces are refused"),
    "unshare": Check(272, 97, "unshare", "new namespaces are refused; unsharing files is fine"),
    "socket": Check(41, 198, "socket", "AF_UNIX; TCP and UDP over IP; AF_NETLINK for route reads only"),
    "ioctl": Check(16, 29, "ioctl", "TIOCSTI and TIOCLINUX inject input; TIOCSETD loads line disciplines"),
    "prlimit64": Check(302, 261, "prlimit64", "limits of other processes, PID 1 among them"),
    "personality": Check(135, 92, "personality", "only the plain one and the query"),
}

LD_ABS, JEQ, JGT, JGE, JSET, RET = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
ALLOW, KILL = 0x7FFF0000, 0x80000000
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
IP_PROTOCOLS: Final = (0, 6, 17)  # the type's own, TCP, UDP
_NR, _ARCH, _ARG0, _ARG1, _ARG2 = 0, 4, 16, 24, 32


def _return_errno(code: int) -> int:
    return 0x00050000 | code


_RETURNS: Final = {
    "allow": ALLOW,
    "kill": KILL,
    "eperm": _return_errno(errno.EPERM),
    "enosys": _return_errno(errno.ENOSYS),
    "eafnosupport": _return_errno(errno.EAFNOSUPPORT),
    "eprotonosupport": _return_errno(errno.EPROTONOSUPPORT),
}


class _Assembler:
    """Instructions with labels as jump targets; all jumps go forward, at most 255 instructions."""

    def __init__(self) -> None:
        self._code: list[tuple[int, str | None, str | None, int]] = []
        self._labels: dict[str, int] = {}
        self._fresh = 0

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    def fresh(self) -> str:
        self._fresh += 1
        return f".{self._fresh}"

    def load(self, offset: int) -> None:
        self._code.append((LD_ABS, None, None, offset))

    def jump(self, code: int, value: int, true: str | None, false: str | None) -> None:
        """None is the next instruction."""
        self._code.append((code, true, false, value))

    def ret(self, value: int) -> None:
        self._code.append((RET, None, None, value))

    def assemble(self) -> bytes:
        out = []
        for at, (code, true, false, value) in enumerate(self._code):
            offsets = [0 if t is None else self._labels[t] - at - 1 for t in (true, false)]
            if not all(0 <= o <= 255 for o in offsets):
                raise ValueError("cannot assemble filter: a jump is too far")
            out.append(struct.pack("<HBBI", code, offsets[0], offsets[1], value))
        return b"".join(out)


def _segments(arch: str) -> list[tuple[int, str]]:
    """(first number, label) in ascending order; each reaches to the next."""
    actions = {number: check.rule for check in CHECKED.values() if (number := getattr(check, arch)) is not None}
    for refused in REFUSED.values():
        number = getattr(refused, arch)
        if number is not None:
            actions[number] = "enosys" if refused.errno == errno.ENOSYS else "eperm"
    segments: list[tuple[int, str]] = []
    for number in range(REVIEWED_MAX + 1):
        label = actions.get(number, "allow")
        if not segments or segments[-1][1] != label:
            segments.append((number, label))
    return [*segments, (REVIEWED_MAX + 1, "enosys")]


def _tree(asm: _Assembler, segments: list[tuple[int, str]]) -> None:
    """Binary search: afterwards control is at the label of the segment that holds the number."""
    middle = len(segments) // 2
    left, right = segments[:middle], segments[middle:]
    targets = [half[0][1] if len(half) == 1 else asm.fresh() for half in (right, left)]
    asm.jump(JGE, right[0][0], targets[0], targets[1])
    for half, target in ((left, targets[1]), (right, targets[0])):
        if len(half) > 1:
            asm.label(target)
            _tree(asm, half)


def _any_of(asm: _Assembler, values: Iterable[int], hit: str, miss: str) -> None:
    items = list(values)
    for value in items[:-1]:
        asm.jump(JEQ, value, hit, None)
    asm.jump(JEQ, items[-1], hit, miss)


def _argument_blocks(asm: _Assembler, with_ip: bool) -> None:
    asm.label("clone")
    asm.load(_ARG0)
    asm.jump(JSET, NAMESPACE_MASK, "eperm", "allow")
    asm.label("unshare")
    asm.load(_ARG0)
    asm.jump(JSET, NAMESPACE_MASK | CLONE_NEWTIME, "eperm", "allow")
    asm.label("ioctl")
    asm.load(_ARG1)
    _any_of(asm, (0x5412, 0x541C, 0x5423), "eperm", "allow")
    asm.label("prlimit64")
    asm.load(_ARG0)
    asm.jump(JEQ, 0, "allow", "eperm")
    asm.label("personality")
    asm.load(_ARG0)
    _any_of(asm, (0, 0xFFFFFFFF), "allow", "eperm")
    asm.label("socket")
    asm.load(_ARG0)
    if not with_ip:
        asm.jump(JEQ, AF_UNIX, "allow", "eafnosupport")
        return
    asm.jump(JEQ, AF_UNIX, "allow", None)
    _any_of(asm, (AF_INET, AF_INET6), "ip", "netlink")
    asm.label("ip")
    # Other protocols and types (SCTP, DCCP, UDP-Lite, MPTCP, ping) are loaded as modules by the first socket that asks
    # for them, have a history of flaws, and are past Landlock, which knows TCP alone. Raw is left to capabilities.
    asm.load(_ARG1)
    asm.jump(JSET, 0xC, "eprotonosupport", None)  # base types from 4 up; the flags of a type lie above 0xf
    asm.load(_ARG2)
    _any_of(asm, IP_PROTOCOLS, "allow", "eprotonosupport")
    # getifaddrs (node, libuv, psutil) reads NETLINK_ROUTE; without capabilities it can only read, and the cell's
    # network namespace holds nothing but the loopback. Every other netlink family is kernel surface.
    asm.label("netlink")
    asm.jump(JEQ, AF_NETLINK, None, "eafnosupport")
    asm.load(_ARG2)
    asm.jump(JEQ, 0, "allow", "eafnosupport")


@cache
def filter_program(profile: str, arch: str = kernel.ARCH) -> bytes:
    """Classic BPF for `cell` (with its own network namespace) or `offline` (AF_UNIX only, for the process level,
    where no namespace stands between the executable and the host's network)."""
    asm = _Assembler()
    asm.load(_ARCH)
    asm.jump(JEQ, AUDIT_ARCH[arch], "number", None)
    asm.ret(KILL)
    asm.label("number")
    asm.load(_NR)
    if arch == "x86_64":
        asm.jump(JGE, X32_BIT, "kill", None)
    _tree(asm, _segments(arch))
    _argument_blocks(asm, with_ip=profile == "cell")
    for name, value in _RETURNS.items():
        asm.label(name)
        asm.ret(value)
    return asm.assemble()
