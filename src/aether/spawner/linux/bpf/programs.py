"""The programs: exec, exit and signal of watched cells, deaths for want of memory, and a trace of system calls.

Raw tracepoints (BPF_PROG_TYPE_RAW_TRACEPOINT) get the tracepoint's arguments as an array of u64 and read kernel
memory by a helper that answers zeros where nothing is mapped, so no chain of pointers needs a check. Which fields
lie where comes from BTF. Facts that forced the code:
- At signal_generate `current` is the sender; the cell is that of the receiver, found through its css_set.
- A signal that is ignored, or already pending, is generated too: only `result` 0 will be delivered.
- SIGCHLD is left out: every exit would show twice.
- Threads exit too: only when signal->live has fallen to 0 the process is over (kernel/exit.c, do_exit).
- The bucket is one word, the time at which it would be empty again (GCRA). Two CPUs may both read it before one
  writes: then a few events more pass, none is counted wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aether.contract.limits import CELL_EVENTS_BURST, CELL_EVENTS_PER_S
from aether.spawner.linux import kernel
from aether.spawner.linux.bpf import layout
from aether.spawner.linux.bpf.asm import Assembler, Reg
from aether.spawner.linux.bpf.btf import Btf, BtfError

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, FRAME = Reg

_LOOKUP, _KTIME, _PID_TGID, _COMM, _CURRENT, _CURRENT_CGROUP, _READ, _READ_TEXT = 1, 5, 14, 16, 35, 80, 113, 115
_NS_PID, _RESERVE, _SUBMIT = 120, 131, 132
_SIGCHLD: Final = 17
_SI_KERNEL: Final = 0x80
_UPID_BYTES: Final = 16  # struct upid {int nr; struct pid_namespace *ns;}
_SI_CODE_AT: Final = 8  # struct kernel_siginfo {int si_signo, si_errno, si_code; ...}
_INTERVAL_NS: Final = 1_000_000_000 // CELL_EVENTS_PER_S
_BURST_NS: Final = CELL_EVENTS_BURST * _INTERVAL_NS
_ARGUMENTS_AT: Final = {"x86_64": (96, (2, 1, 0)), "aarch64": (0, (0, 1, 2))}
"""The first three arguments within pt_regs: where, and in which order (x86-64: dx, si, di)."""

# The frame: scratch for reads, the cgroup id, and what was found of a process.
_CGROUP, _POINTER, _WORD, _LEVEL, _PID, _SAVED, _INFO = -8, -16, -24, -32, -40, -48, -56


@dataclass(frozen=True, slots=True)
class Fields:
    """Byte offsets of the kernel's fields."""

    task_group_leader: int
    task_thread_pid: int
    task_real_parent: int
    task_tgid: int
    task_signal: int
    task_exit_code: int
    task_comm: int
    task_cgroups: int
    signal_live: int
    pid_level: int
    pid_numbers: int
    css_set_dfl_cgrp: int
    cgroup_kn: int
    kernfs_node_id: int
    linux_binprm_filename: int
    victim_is_task: bool


def read_fields(btf: Btf) -> Fields:
    """Raises BtfError when this kernel lacks a field or passes other arguments."""
    expected = {
        "sched_process_exec": ("task_struct", "", "linux_binprm"),
        "sched_process_exit": ("task_struct",),
        "signal_generate": ("", "kernel_siginfo", "task_struct", "", ""),
    }
    for tracepoint, wanted in expected.items():
        if btf.trace_arguments(tracepoint)[: len(wanted)] != wanted:
            raise BtfError(f"tracepoint {tracepoint} of this kernel passes other arguments")
    try:
        victim_is_task = btf.trace_arguments("mark_victim")[:1] == ("task_struct",)
    except BtfError:
        victim_is_task = False
    offsets: dict[str, int] = {}
    for structure, short, members in (
        ("task_struct", "task", ("group_leader", "thread_pid", "real_parent", "tgid", "signal", "exit_code", "comm")),
        ("task_struct", "task", ("cgroups",)),
        ("signal_struct", "signal", ("live",)),
        ("pid", "pid", ("level", "numbers")),
        ("css_set", "css_set", ("dfl_cgrp",)),
        ("cgroup", "cgroup", ("kn",)),
        ("kernfs_node", "kernfs_node", ("id",)),
        ("linux_binprm", "linux_binprm", ("filename",)),
    ):
        offsets |= {f"{short}_{member}": btf.offset(structure, member) for member in members}
    return Fields(victim_is_task=victim_is_task, **offsets)


class _Program(Assembler):
    """R6 the task that the event is about, R7 its cell's element of `watched`, R9 the event; R8 is scratch."""

    def __init__(self, fields: Fields, watched: int, ring: int) -> None:
        super().__init__()
        self.fields = fields
        self._watched = watched
        self._ring = ring

    def end(self) -> None:
        self.move(R0, 0)
        self.exit()

    def read(self, to: Reg, to_offset: int, size: int, base: Reg, offset: int) -> None:
        """Copy `size` bytes of kernel memory at `base + offset`; zeros where there is none."""
        self.move(R3, base)
        self.alu("+", R3, offset)
        self.move(R1, to)
        self.alu("+", R1, to_offset)
        self.move(R2, size)
        self.call(_READ)

    def follow(self, into: Reg, base: Reg, *offsets: int) -> None:
        """`into = *(*(base + first) + second) ...`, all of them 8 bytes."""
        for offset in offsets:
            self.read(FRAME, _POINTER, 8, base, offset)
            self.load(8, into, FRAME, _POINTER)
            base = into

    def word(self, into: Reg, base: Reg, offset: int) -> None:
        """`into = *(u32 *)(base + offset)`"""
        self.read(FRAME, _WORD, 4, base, offset)
        self.load(4, into, FRAME, _WORD)

    def cgroup_of(self, task: Reg) -> None:
        """Its v2 cgroup's id onto the frame."""
        f = self.fields
        self.follow(R8, task, f.task_cgroups, f.css_set_dfl_cgrp, f.cgroup_kn, f.kernfs_node_id)
        self.store(8, FRAME, _CGROUP, R8)

    def find_cell(self, otherwise: str) -> None:
        """R7 = the element of the cgroup id on the frame."""
        self.map(R1, self._watched)
        self.move(R2, FRAME)
        self.alu("+", R2, _CGROUP)
        self.call(_LOOKUP)
        self.jump(R0, "==", 0, otherwise)
        self.move(R7, R0)

    def number_of(self, task: Reg, into: Reg) -> None:
        """The pid of `task`'s process at the level on the frame; 0 when it lives outside. `into` is not R8."""
        f, outside = self.fields, self.fresh()
        self.follow(R8, task, f.task_group_leader, f.task_thread_pid)
        self.word(into, R8, f.pid_level)
        self.load(8, R1, FRAME, _LEVEL)
        self.move(R0, 0)
        self.jump(into, "<", R1, outside)
        self.alu("*", R1, _UPID_BYTES)
        self.alu("+", R8, R1)
        self.word(R0, R8, f.pid_numbers)
        self.label(outside)
        self.move(into, R0)

    def find_pid(self, otherwise: str) -> None:
        """The innermost level and the pid there onto the frame; leaves when it is the cell's reaper."""
        f, shown = self.fields, self.fresh()
        self.follow(R8, R6, f.task_group_leader, f.task_thread_pid)
        self.word(R9, R8, f.pid_level)
        self.store(8, FRAME, _LEVEL, R9)
        self.number_of(R6, R9)
        self.store(8, FRAME, _PID, R9)
        self.jump(R9, "!=", 1, shown)
        self.load(4, R1, R7, layout.WATCHED_FLAGS)
        self.jump(R1, "&", layout.PID1_IS_OURS, otherwise)
        self.label(shown)

    def admit(self, otherwise: str) -> None:
        """R8 = the time, when the cell's bucket has a token; else one more is dropped."""
        filled, passed = self.fresh(), self.fresh()
        self.call(_KTIME)
        self.move(R8, R0)
        self.load(8, R1, R7, layout.WATCHED_BUCKET)
        self.jump(R1, ">=", R8, filled)
        self.move(R1, R8)
        self.label(filled)
        self.alu("+", R1, _INTERVAL_NS)
        self.move(R2, R1)
        self.alu("-", R2, R8)
        self.constant(R3, _BURST_NS)
        self.jump(R2, "<=", R3, passed)
        self.drop()
        self.goto(otherwise)
        self.label(passed)
        self.store(8, R7, layout.WATCHED_BUCKET, R1)

    def drop(self) -> None:
        self.move(R1, 1)
        self.atomic_add(R7, layout.WATCHED_DROPPED, R1)

    def begin(self, kind: int, size: int, otherwise: str) -> None:
        """R9 = a new event with time, name, pids and the task's comm; every number is set."""
        reserved = self.fresh()
        self.map(R1, self._ring)
        self.move(R2, size)
        self.move(R3, 0)
        self.call(_RESERVE)
        self.jump(R0, "!=", 0, reserved)
        self.drop()
        self.goto(otherwise)
        self.label(reserved)
        self.move(R9, R0)
        self.store(8, R9, layout.TIME, R8)
        for offset in range(0, layout.NAME_BYTES, 8):
            self.load(8, R1, R7, offset)
            self.store(8, R9, layout.NAME + offset, R1)
        self.load(8, R1, R7, layout.WATCHED_DROPPED)
        self.store(8, R9, layout.DROPPED, R1)
        self.store(4, R9, layout.KIND, kind)
        self.load(8, R1, FRAME, _PID)
        self.store(4, R9, layout.PID, R1)
        for offset in (layout.PARENT, layout.VALUE, layout.SI_CODE, layout.SENDER_HOST, layout.SENDER):
            self.store(4, R9, offset, 0)
        for offset in range(0, layout.COMM_BYTES, 8):
            self.store(8, R9, layout.SENDER_COMM + offset, 0)
        self.read(R9, layout.HOST_PID, 4, R6, self.fields.task_tgid)
        self.read(R9, layout.COMM, layout.COMM_BYTES, R6, self.fields.task_comm)

    def submit(self) -> None:
        self.move(R1, R9)
        self.move(R2, 0)
        self.call(_SUBMIT)

    def parent(self) -> None:
        """The parent's pid into the event. R7 is lost."""
        self.follow(R8, R6, self.fields.task_group_leader, self.fields.task_real_parent)
        self.number_of(R8, R7)
        self.store(4, R9, layout.PARENT, R7)


def exec_program(fields: Fields, watched: int, ring: int) -> bytes:
    """sched_process_exec(task, old pid, binprm)"""
    p = _Program(fields, watched, ring)
    p.load(8, R6, R1, 0)
    p.load(8, R8, R1, 16)
    p.store(8, FRAME, _INFO, R8)
    p.call(_CURRENT_CGROUP)
    p.store(8, FRAME, _CGROUP, R0)
    p.find_cell("out")
    p.find_pid("out")
    p.admit("out")
    p.begin(layout.EXEC, layout.EXEC_BYTES, "out")
    p.parent()
    p.load(8, R8, FRAME, _INFO)
    p.follow(R3, R8, fields.linux_binprm_filename)
    p.store(1, R9, layout.PATH, 0)
    p.move(R1, R9)
    p.alu("+", R1, layout.PATH)
    p.move(R2, layout.PATH_BYTES)
    p.call(_READ_TEXT)
    p.submit()
    p.label("out")
    p.end()
    return p.assemble()


def exit_program(fields: Fields, watched: int, ring: int) -> bytes:
    """sched_process_exit(task, ...)"""
    p = _Program(fields, watched, ring)
    p.load(8, R6, R1, 0)
    p.call(_CURRENT_CGROUP)
    p.store(8, FRAME, _CGROUP, R0)
    p.find_cell("out")
    p.follow(R8, R6, fields.task_signal)
    p.word(R8, R8, fields.signal_live)
    p.jump(R8, "!=", 0, "out")
    p.find_pid("out")
    p.admit("out")
    p.begin(layout.EXIT, layout.EVENT_BYTES, "out")
    p.read(R9, layout.VALUE, 4, R6, fields.task_exit_code)
    p.parent()
    p.submit()
    p.label("out")
    p.end()
    return p.assemble()


def signal_program(fields: Fields, watched: int, ring: int) -> bytes:
    """signal_generate(sig, info, task, group, result)"""
    p = _Program(fields, watched, ring)
    p.load(8, R2, R1, 32)
    p.jump(R2, "!=", 0, "out")
    p.load(8, R8, R1, 0)
    p.jump(R8, "==", _SIGCHLD, "out")
    p.store(8, FRAME, _SAVED, R8)
    p.load(8, R8, R1, 8)
    p.store(8, FRAME, _INFO, R8)
    p.load(8, R6, R1, 16)
    p.cgroup_of(R6)
    p.find_cell("out")
    p.find_pid("out")
    p.admit("out")
    p.begin(layout.SIGNAL, layout.EVENT_BYTES, "out")
    p.load(8, R8, FRAME, _SAVED)
    p.store(4, R9, layout.VALUE, R8)
    _si_code(p)
    _sender(p)
    p.submit()
    p.label("out")
    p.end()
    return p.assemble()


def _si_code(p: _Program) -> None:
    """SEND_SIG_NOINFO is 0 (a process sent it) and SEND_SIG_PRIV 1 (the kernel did), no pointers (sched/signal.h)."""
    p.load(8, R8, FRAME, _INFO)
    p.jump(R8, "==", 0, "known")
    p.jump(R8, "==", 1, "kernel")
    p.read(R9, layout.SI_CODE, 4, R8, _SI_CODE_AT)
    p.goto("known")
    p.label("kernel")
    p.store(4, R9, layout.SI_CODE, _SI_KERNEL)
    p.label("known")


def _sender(p: _Program) -> None:
    """`current`: its pid on the host, and when it is in the same cell also its pid there and its comm."""
    p.call(_PID_TGID)
    p.alu(">>", R0, 32)
    p.store(4, R9, layout.SENDER_HOST, R0)
    p.call(_CURRENT_CGROUP)
    p.load(8, R1, FRAME, _CGROUP)
    p.jump(R0, "!=", R1, "sent")
    p.call(_CURRENT)
    p.move(R6, R0)
    p.number_of(R6, R7)
    p.store(4, R9, layout.SENDER, R7)
    p.move(R1, R9)
    p.alu("+", R1, layout.SENDER_COMM)
    p.move(R2, layout.COMM_BYTES)
    p.call(_COMM)
    p.label("sent")


def oom_program(fields: Fields, watched: int, ring: int) -> bytes:
    """mark_victim(task, uid): the process that the kernel chose to kill for want of memory."""
    p = _Program(fields, watched, ring)
    p.load(8, R6, R1, 0)
    p.cgroup_of(R6)
    p.find_cell("out")
    p.find_pid("out")
    p.admit("out")
    p.begin(layout.OOM, layout.EVENT_BYTES, "out")
    p.submit()
    p.label("out")
    p.end()
    return p.assemble()


def observing(fields: Fields, watched: int, ring: int) -> dict[str, bytes]:
    """Every program by the tracepoint it belongs to."""
    made = {
        "sched_process_exec": exec_program(fields, watched, ring),
        "sched_process_exit": exit_program(fields, watched, ring),
        "signal_generate": signal_program(fields, watched, ring),
    }
    if fields.victim_is_task:
        made["mark_victim"] = oom_program(fields, watched, ring)
    return made


def trace_program(cgroup_id: int, area: int, pid_namespace: tuple[int, int] | None) -> bytes:
    """sys_enter(regs, number) of one cgroup, into the shared array `area`.

    `pid_namespace` is (device, inode) of the one whose pids are shown; None shows those of the host.
    """
    p = Assembler()
    p.move(R6, R1)
    p.call(_CURRENT_CGROUP)
    p.constant(R1, cgroup_id)
    p.jump(R0, "!=", R1, "out")
    p.load(8, R7, R6, 8)
    p.move(R1, R7)
    p.jump(R1, "<", layout.CALLS_MAX, "small")
    p.move(R1, layout.CALLS_MAX - 1)
    p.label("small")
    p.alu("*", R1, 8)
    p.map_value(R8, area)
    p.move(R2, R8)
    p.alu("+", R2, R1)
    p.move(R1, 1)
    p.atomic_add(R2, 0, R1)
    p.move(R9, 1)
    p.atomic_add(R8, layout.CALLS_SO_FAR, R9, fetch=True)
    p.move(R1, R9)
    p.alu("&", R1, layout.LAST_CALLS - 1)
    p.alu("*", R1, layout.CALL_BYTES)
    p.alu("+", R8, layout.LAST_AT)
    p.alu("+", R8, R1)
    p.alu("+", R9, 1)
    p.store(8, R8, 0, R9)
    p.store(8, R8, 24, R7)
    _call_details(p, pid_namespace)
    p.label("out")
    p.move(R0, 0)
    p.exit()
    return p.assemble()


def _call_details(p: Assembler, pid_namespace: tuple[int, int] | None) -> None:
    """Time, pids, arguments and comm into the slot at R8; R6 is the tracepoint's context."""
    p.call(_KTIME)
    p.store(8, R8, 8, R0)
    if pid_namespace is None:
        p.call(_PID_TGID)
        p.store(4, R8, 20, R0)
        p.alu(">>", R0, 32)
        p.store(4, R8, 16, R0)
    else:  # struct bpf_pidns_info {u32 pid (the thread), tgid}
        p.constant(R1, pid_namespace[0])
        p.constant(R2, pid_namespace[1])
        p.move(R3, FRAME)
        p.alu("+", R3, -8)
        p.move(R4, 8)
        p.call(_NS_PID)
        p.load(4, R1, FRAME, -4)
        p.store(4, R8, 16, R1)
        p.load(4, R1, FRAME, -8)
        p.store(4, R8, 20, R1)
    at, order = _ARGUMENTS_AT[kernel.ARCH]
    p.load(8, R3, R6, 0)
    p.alu("+", R3, at)
    p.move(R1, FRAME)
    p.alu("+", R1, -32)
    p.move(R2, 24)
    p.call(_READ)
    for place, slot in enumerate(order):
        p.load(8, R1, FRAME, -32 + 8 * slot)
        p.store(8, R8, 32 + 8 * place, R1)
    p.move(R1, R8)
    p.alu("+", R1, 56)
    p.move(R2, layout.COMM_BYTES)
    p.call(_COMM)
