"""Runs inside a cell and tries to get out: one JSON object, attempt -> what the kernel answered.

Standard library only, no file of this repository is visible in there. An errno (0: it worked) answers an attempt
unless its function says otherwise. Everything is harmless if it should succeed: arguments are null pointers, bad
descriptors, or things of the cell's own. Each group runs in a child, so that a killed one shows as its signal.

Usage: probe.py FACTS, JSON of what the test knows of the host: pid of an outsider, paths, names, ports.
"""

# ruff: noqa: PTH102, PTH108, PTH110, PTH112, PTH115, PTH208 - system calls as they are
from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

FACTS: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
LIBC = ctypes.CDLL(None, use_errno=True)
COLUMN = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
# A table of its own, typed from asm/unistd.h: a wrong number in the profile would show.
CALLS = {
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "userfaultfd": (323, 282), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "clock_settime": (227, 112), "settimeofday": (164, 170), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "statmount": (457, 457), "listmount": (458, 458), "open_tree_attr": (467, 467),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "syslog": (103, 116), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "lsm_set_self_attr": (460, 460), "memfd_secret": (447, 447),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "sethostname": (170, 161), "setns": (308, 268), "unshare": (272, 97), "clone": (56, 220), "clone3": (435, 435),
    "personality": (135, 92), "prlimit64": (302, 261), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "mempolicy_home": (450, 450), "capset": (126, 91), "seccomp": (317, 277), "unreviewed": (511, 511),
    "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
    "tgkill": (234, 131), "pidfd_send_signal": (424, 424), "process_madvise": (440, 440), "vhangup": (153, 58),
    "getppid": (110, 173), "ioprio_set": (251, 30), "sched_setattr": (314, 274),
}  # fmt: skip
NEW = {"mnt": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
       "pid": 0x20000000, "net": 0x40000000}  # fmt: skip
INHERITED = [fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{fd}")]
GROUPS: dict[str, Callable[[], Any]] = {}


def group(action: Callable[[], Any]) -> Callable[[], Any]:
    GROUPS[action.__name__] = action
    return action


def call(name: str, *args: Any) -> int:
    """Errno of a system call, 0 when it worked; -1 where this architecture has none."""
    number = CALLS[name][COLUMN]
    if number is None:
        return -1
    ctypes.set_errno(0)
    padded = [*args, *[0] * (6 - len(args))]
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in padded]
    return ctypes.get_errno() if LIBC.syscall(ctypes.c_long(number), *values) < 0 else 0


def told(action: Callable[..., Any], *args: Any) -> int:
    try:
        action(*args)
    except OSError as error:
        return error.errno or -1
    return 0


def in_child(action: Callable[..., Any], *args: Any) -> int:
    """Exit code of `action` in a child; a negative number is the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 250
        try:
            code = action(*args) or 0
        finally:
            os._exit(code & 0xFF)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def reading(path: str) -> int:
    def read() -> None:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.read(fd, 1)
        finally:
            os.close(fd)

    return told(read)


def writing(path: str) -> int:
    return told(lambda: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK)))


# ------------------------------------------------------------------------------------------ files and processes


@group
def host_files() -> dict[str, Any]:
    outsider = FACTS["outsider"]
    links = {f"/proc/{pid}/{name}": told(os.readlink, f"/proc/{pid}/{name}")
             for pid in (1, outsider) for name in ("root", "cwd", "exe", "ns/mnt")}  # fmt: skip
    places = [f"/proc/{pid}/{name}" for pid in (1, outsider) for name in ("fd", "fdinfo", "map_files", "task/1/fd")]
    lists = {path: told(os.listdir, path) for path in places}
    reads = {path: reading(path) for pid in (1, outsider)
             for path in (f"/proc/{pid}/mem", f"/proc/{pid}/environ", f"/proc/{pid}/maps")}  # fmt: skip
    own = os.listdir("/proc/self/map_files")
    return {
        "links": links, "lists": lists, "reads": reads,
        "own_map_file": reading(f"/proc/self/map_files/{own[0]}") if own else errno.EPERM,
        "secret": reading(FACTS["secret"]),
        "secret_by_root": reading("/proc/self/root" + FACTS["secret"]),
        "secret_by_cwd": reading("/proc/self/cwd/../../../.." + FACTS["secret"]),
        "above_root": sorted(os.listdir("/proc/self/root/../..")) == sorted(os.listdir("/")),
        "shadow": reading("/etc/shadow"), "sys": told(lambda: os.listdir("/sys")),
    }  # fmt: skip


@group
def outsiders() -> dict[str, Any]:
    outsider = FACTS["outsider"]
    word = ctypes.create_string_buffer(8)
    vector = struct.pack("<QQ", ctypes.addressof(word), 8)
    return {
        "ptrace_attach": call("ptrace", 16, outsider), "ptrace_seize": call("ptrace", 0x4206, outsider),
        "ptrace_traceme": call("ptrace", 0), "ptrace_init": call("ptrace", 16, 1),
        "vm_readv": call("process_vm_readv", outsider, vector, 1, vector, 1),
        "vm_writev": call("process_vm_writev", outsider, vector, 1, vector, 1),
        "kill": told(lambda: os.kill(outsider, 0)), "tgkill": call("tgkill", outsider, outsider, 0),
        "kill_group": told(lambda: os.killpg(outsider, 0)),
        "pidfd": told(lambda: os.close(os.pidfd_open(outsider))),
        "pidfd_getfd": call("pidfd_getfd", 0, 0), "kcmp": call("kcmp", 1, 1, 0),
        "process_madvise": call("process_madvise", -1, 0, 0, 0),
        "prlimit": call("prlimit64", outsider, 7, None, None), "prlimit_init": call("prlimit64", 1, 7, None, None),
        "migrate_pages": call("migrate_pages", 1), "move_pages": call("move_pages", 1),
        "priority": told(lambda: os.setpriority(os.PRIO_PROCESS, outsider, 19)),
        "seen": sorted(int(name) for name in os.listdir("/proc") if name.isdigit())[0],
        "count": len([name for name in os.listdir("/proc") if name.isdigit()]),
    }  # fmt: skip


@group
def host_sockets() -> dict[str, int]:
    def connect(address: str, kind: int) -> int:
        with socket.socket(socket.AF_UNIX, kind) as s:
            return told(lambda: s.connect(address))

    found = {}
    for name, kind in (("stream", socket.SOCK_STREAM), ("datagram", socket.SOCK_DGRAM)):
        found[f"abstract_{name}"] = connect("\0" + FACTS[f"abstract_{name}"], kind)
        found[f"path_{name}"] = connect(FACTS[f"path_{name}"], kind)
    found["journal"] = connect("/run/systemd/journal/socket", socket.SOCK_DGRAM)
    found["docker"] = connect("/var/run/docker.sock", socket.SOCK_STREAM)
    return found


@group
def descriptors() -> dict[str, Any]:
    return {"open": INHERITED, "stdin": os.readlink("/proc/self/fd/0")}


# ------------------------------------------------------------------------------------------------- namespaces


@group
def namespaces() -> dict[str, Any]:
    def joined(kind: str) -> int:
        fd = os.open(f"/proc/self/ns/{kind}", os.O_RDONLY)
        try:
            return call("setns", fd, 0)
        finally:
            os.close(fd)

    arguments = (ctypes.c_uint64 * 11)(NEW["user"], 0, 0, 0, signal.SIGCHLD)
    return {
        "unshare": {kind: in_child(call, "unshare", flag) for kind, flag in {**NEW, "time": 0x80}.items()},
        "clone": {kind: call("clone", flag | signal.SIGCHLD) for kind, flag in NEW.items()},
        "clone3": call("clone3", arguments, 88),
        "setns": {kind: joined(kind) for kind in NEW},
        "chroot": call("chroot", b"/work"),
        "hostname": told(lambda: socket.sethostname("x")),
    }


@group
def mounts() -> dict[str, int]:
    names = ("mount", "umount2", "pivot_root", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick",
             "mount_setattr", "statmount", "listmount", "open_tree_attr", "name_to_handle_at", "open_by_handle_at",
             "fanotify_init", "quotactl", "quotactl_fd", "swapon", "swapoff")  # fmt: skip
    return {name: call(name) for name in names}


# --------------------------------------------------------------------------------------------------- privilege


@group
def privilege() -> dict[str, Any]:
    def line(name: str) -> str:
        with open("/proc/self/status") as f:
            return next(row.split(":")[1].strip() for row in f if row.startswith(name + ":"))

    header, all_caps = struct.pack("<Ii", 0x20080522, 0), struct.pack("<6I", *[0xFFFFFFFF] * 6)
    return {
        "setuid": told(lambda: os.setuid(0)), "setgid": told(lambda: os.setgid(0)),
        "setgroups": told(lambda: os.setgroups([0])), "chown": told(lambda: os.chown("/work", 0, 0)),
        "capset": call("capset", header, all_caps),
        "ambient": LIBC.prctl(47, 2, 12, 0, 0), "no_new_privs_off": LIBC.prctl(38, 0, 0, 0, 0),
        "file_capability": told(lambda: set_capability("/work/capable")),
        "trusted": told(lambda: os.setxattr("/work", "trusted.x", b"1")),
        "no_new_privs": line("NoNewPrivs"), "caps": [line(f"Cap{s}") for s in ("Inh", "Prm", "Eff", "Bnd", "Amb")],
        "seccomp": line("Seccomp"), "groups": line("Groups"),
        "nosuid": [p for p in ("/", "/usr", "/work", "/tmp", "/dev/shm") if not os.statvfs(p).f_flag & os.ST_NOSUID],
        "realtime": told(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))),
        "nice": told(lambda: os.setpriority(os.PRIO_PROCESS, 0, -5)),
        "raise_limit": raise_limit(),
        "personality": call("personality", 0x0040000),
    }  # fmt: skip


def set_capability(path: str) -> None:
    with open(path, "w"):
        pass
    os.setxattr(path, "security.capability", struct.pack("<5I", 0x02000001, 0xFFFFFFFF, 0, 0, 0))


def raise_limit() -> int:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard + 4096))
    except (ValueError, OSError):
        return errno.EPERM
    return 0


@group
def setuid_program() -> dict[str, str]:
    found = {}
    for name in ("setuid", "setgid"):
        done = os.popen(f"{FACTS['programs']}/{name} -u; {FACTS['programs']}/{name} -g").read().split()
        found[name] = " ".join(done)
    return found


@group
def devices() -> dict[str, int]:
    found = {}
    for where in ("/work", "/tmp", "/dev/shm", "/dev"):
        found[f"character {where}"] = told(os.mknod, f"{where}/c", stat.S_IFCHR | 0o666, os.makedev(1, 1))
        found[f"block {where}"] = told(os.mknod, f"{where}/b", stat.S_IFBLK | 0o666, os.makedev(254, 0))
    for name in ("mem", "kmsg", "port", "kvm", "fuse", "net/tun", "sda", "vda", "loop-control", "userfaultfd"):
        found[f"open {name}"] = writing(f"/dev/{name}")
    found["console"] = writing("/dev/console")
    return found


@group
def kernel_interfaces() -> dict[str, int]:
    names = ("add_key", "request_key", "keyctl", "bpf", "perf_event_open", "io_uring_setup", "io_uring_enter",
             "io_uring_register", "userfaultfd", "init_module", "finit_module", "delete_module", "kexec_load",
             "kexec_file_load", "reboot", "acct", "syslog", "iopl", "ioperm", "modify_ldt", "lsm_set_self_attr",
             "memfd_secret", "vhangup", "unreviewed")  # fmt: skip
    return {name: call(name) for name in names}


@group
def clocks() -> dict[str, int]:
    return {
        "clock_settime": call("clock_settime", 0, None), "settimeofday": call("settimeofday", None, None),
        "adjtimex": call("adjtimex", ctypes.create_string_buffer(256)),
        "clock_adjtime": call("clock_adjtime", 0, ctypes.create_string_buffer(256)),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------- foreign system calls


def i386_getpid() -> int:
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid of i386); int 0x80; ret
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    return 0


@group
def foreign_calls() -> dict[str, int]:
    """Exit codes; on aarch64 there are no such calls."""
    if COLUMN:
        return {}
    x32 = ctypes.c_long(0x40000000 + 39)
    return {"x32": in_child(lambda: LIBC.syscall(x32) and 0), "i386": in_child(i386_getpid)}


@group
def terminal() -> dict[str, int]:
    pairs = {"TIOCSTI": 0x5412, "TIOCLINUX": 0x541C, "TIOCSETD": 0x5423}
    return {name: told(fcntl.ioctl, 1, request, b"\0" * 8) for name, request in pairs.items()}


@group
def kernel_settings() -> dict[str, int]:
    """Every one is opened for writing; nothing is written."""
    paths = ["kernel/core_pattern", "kernel/modprobe", "kernel/hostname", "kernel/randomize_va_space",
             "kernel/yama/ptrace_scope", "vm/overcommit_memory", "vm/drop_caches", "net/ipv4/ip_forward",
             "fs/binfmt_misc/register", "fs/protected_hardlinks", "user/max_user_namespaces"]  # fmt: skip
    found = {path: writing(f"/proc/sys/{path}") for path in paths if os.path.exists(f"/proc/sys/{path}")}
    found["sysrq"] = writing("/proc/sysrq-trigger")
    for name in ("oom_score_adj", "uid_map", "gid_map", "setgroups", "attr/current", "attr/exec", "timens_offsets",
                 "coredump_filter", "loginuid"):  # fmt: skip
        if os.path.exists(f"/proc/self/{name}"):
            found[f"self/{name}"] = writing(f"/proc/self/{name}")
    found["init/oom_score_adj"] = writing("/proc/1/oom_score_adj")
    for path in ("/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/memory/tasks", "/sys/kernel/uevent_helper"):
        found[path] = writing(path)
    return found


@group
def what_is_shown() -> dict[str, Any]:
    masked = ("keys", "kcore", "timer_list", "sched_debug", "interrupts", "sysrq-trigger", "latency_stats", "kmsg",
              "kpageflags", "slabinfo", "vmallocinfo", "kallsyms")  # fmt: skip
    sizes = {}
    for name in masked:
        try:
            with open(f"/proc/{name}", "rb", buffering=0) as f:
                sizes[name] = len(f.read(1 << 16))
        except OSError as error:
            sizes[name] = -(error.errno or 1)
    with open("/proc/self/mountinfo") as f:
        table = f.read()
    with open("/proc/self/cgroup") as f:
        groups = [row.strip().split(":", 2)[2] for row in f]
    return {
        "sizes": sizes,
        "empty": {p: len(os.listdir(f"/proc/{p}")) for p in ("acpi", "scsi", "asound") if os.path.isdir(f"/proc/{p}")},
        "mountinfo": table,
        "cgroup": groups,
        "sys": os.path.lexists("/sys"),
        "hostname": socket.gethostname(),
        "kallsyms": kernel_addresses(),
        "sysvipc": [len(open(f"/proc/sysvipc/{n}").readlines()) for n in ("shm", "sem", "msg")],
        "environment": sorted(os.environ),
    }


def kernel_addresses() -> list[str]:
    try:
        with open("/proc/kallsyms") as f:
            return sorted({f.readline().split()[0] for _ in range(50)})
    except (OSError, IndexError):
        return []


# ------------------------------------------------------------------------------------------------------ network


@group
def network() -> dict[str, Any]:
    def send(family: int, address: tuple[Any, ...]) -> int:
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            return told(lambda: s.sendto(b"x", address)) or told(lambda: s.connect(address))

    def connect(family: int, address: tuple[Any, ...]) -> int:
        with socket.socket(family) as s:
            s.settimeout(3)
            return told(lambda: s.connect(address))

    def opened(family: int, kind: int, protocol: int) -> int:
        return told(lambda: socket.socket(family, kind, protocol).close())

    def resolve() -> str:
        try:
            socket.getaddrinfo("example.com", 80)
        except socket.gaierror as error:
            return type(error).__name__
        return "resolved"

    families = {"packet": 17, "vsock": 40, "alg": 38, "bluetooth": 31, "can": 29, "tipc": 30, "xdp": 44, "key": 15,
                "smc": 43, "qipcrtr": 42, "rds": 21, "llc": 26, "nfc": 39, "kcm": 41, "ax25": 3, "x25": 9,
                "appletalk": 5, "ppp": 24, "mctp": 45}  # fmt: skip
    own = socket.create_server(("127.0.0.1", 0))
    with own:
        loop = connect(socket.AF_INET, own.getsockname())
    return {
        "resolve": resolve(),
        "udp": send(socket.AF_INET, ("192.0.2.1", 9)), "udp6": send(socket.AF_INET6, ("2001:db8::1", 9)),
        "udp_metadata": send(socket.AF_INET, ("169.254.169.254", 80)),
        "tcp": connect(socket.AF_INET, ("192.0.2.1", 80)), "tcp6": connect(socket.AF_INET6, ("2001:db8::1", 80)),
        "tcp_host": connect(socket.AF_INET, ("127.0.0.1", FACTS["tcp_port"])),
        "udp_host": send(socket.AF_INET, ("127.0.0.1", FACTS["udp_port"])),
        "icmp": opened(2, socket.SOCK_DGRAM, 1), "icmp6": opened(10, socket.SOCK_DGRAM, 58),
        "raw": opened(2, socket.SOCK_RAW, 255), "raw_tcp": opened(2, socket.SOCK_RAW, 6),
        "protocols": {str(p): opened(2, kind, p) for kind, p in
                      ((1, 132), (1, 262), (2, 136), (1, 33), (2, 115), (1, 143))},
        "netlink": {str(p): opened(16, socket.SOCK_RAW, p) for p in (2, 4, 6, 9, 12, 15, 16, 20, 21)},
        "families": {name: opened(number, 3, 0) for name, number in families.items()},
        "vsock_stream": opened(40, 1, 0), "raw_type": opened(2, socket.SOCK_RAW, 0),
        "loopback": loop, "interfaces": [name for _, name in socket.if_nameindex()],
        "interface_up": told(lambda: interface_flags(b"lo")),
    }  # fmt: skip


def interface_flags(name: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sH22x", name, 0))


# ----------------------------------------------------------------------------------------------- own sandboxes


@group
def own_filters() -> dict[str, int]:
    """A job may add filters, also ones that ask a listener: the strictest answer wins (seccomp(2))."""
    return {"allow_all": in_child(lambda: filtered(0x7FFF0000, 0)), "notify": in_child(lambda: filtered(0x7FC00000, 8)),
            "trace": in_child(lambda: filtered(0x7FF00000, 0))}  # fmt: skip


def filtered(verdict: int, flags: int) -> int:
    """Errno of mount(2) under a filter of our own that answers it with `verdict`, everything else with allow."""
    number = CALLS["mount"][COLUMN] or 0
    rows = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, verdict), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *row) for row in rows), 32)
    program = struct.pack("<H6xQ", 4, ctypes.addressof(code))
    signal.alarm(5)  # a listener that nobody serves would wait for ever
    if LIBC.syscall(ctypes.c_long(CALLS["seccomp"][COLUMN] or 0), 1, flags, program) < 0:
        return 251
    return call("mount")


@group
def own_landlock() -> dict[str, int]:
    """A wider ruleset on top of the cell's: still nothing outside the cell's own is writable."""
    return {"abi": call("landlock_create_ruleset", None, 0, 1), "usr": in_child(lambda: widened("/usr/x")),
            "node": in_child(lambda: widened(None))}  # fmt: skip


def widened(path: str | None) -> int:
    handled = (1 << 13) - 1
    attribute = struct.pack("<Q", handled)
    number = CALLS["landlock_create_ruleset"][COLUMN]
    ruleset = LIBC.syscall(ctypes.c_long(number or 0), attribute, 8, 0)
    if ruleset < 0:
        return errno.EROFS if path else errno.EPERM  # a kernel without Landlock: nothing to widen
    rule = struct.pack("<Qi", handled, os.open("/", os.O_PATH))
    if call("landlock_add_rule", ruleset, 1, rule) or call("landlock_restrict_self", ruleset):
        return 251
    if path:
        return told(lambda: os.close(os.open(path, os.O_WRONLY | os.O_CREAT)))
    return told(lambda: os.mknod("/work/node", stat.S_IFCHR | 0o666, os.makedev(1, 3)))


# ------------------------------------------------------------------------------------------------------- bombs


@group
def bombs() -> dict[str, Any]:
    """Each is bounded below what it asks for: how it ended, and how far it came."""
    return {"core": core_dump(), "disk": fill("/work/fill"), "temporary": fill("/tmp/fill"),
            "shared": fill("/dev/shm/fill"), "memory": hoard(), "inodes": many_files()}  # fmt: skip


def hoard() -> str:
    """512 MiB more than the limit on data that the test set."""
    try:
        return f"{len(bytearray(1 << 30))} bytes"
    except MemoryError:
        return "MemoryError"


def fill(path: str) -> list[int]:
    """Errno and bytes written, of at most 256 MiB."""
    block, total, code = bytes(1 << 20), 0, 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while total < 256 << 20:
            total += os.write(fd, block)
    except OSError as error:
        code = error.errno or -1
    os.close(fd)
    os.unlink(path)
    return [code, total]


def create(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT))


def many_files() -> list[int]:
    os.mkdir("/work/many")
    for number in range(200_000):
        code = told(create, f"/work/many/{number}")
        if code:
            return [code, number]
    return [0, 200_000]


def core_dump() -> dict[str, Any]:
    before = set(os.listdir("/work"))
    os.chdir("/work")
    ended = in_child(lambda: os.abort())
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    return {"signal": -ended, "files": sorted(set(os.listdir("/work")) - before), "limit": hard}


@group
def fork_bomb() -> dict[str, int]:
    """Children that sleep, until the limit on processes; the test set it to 64."""
    children: list[int] = []
    code = 0
    while len(children) < 200 and not code:
        try:
            pid = os.fork()
        except OSError as error:
            code = error.errno or -1
            break
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)
    return {"errno": code, "children": len(children)}


def run_group(action: Callable[[], Any]) -> Any:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        signal.alarm(20)
        try:
            answer: Any = action()
        except BaseException as error:
            answer = {"broken": f"{type(error).__name__}: {error}"}
        with os.fdopen(writer, "w") as f:
            json.dump(answer, f)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as f:
        text = f.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return json.loads(text) if text else {"killed": code}


if __name__ == "__main__":
    print(json.dumps({name: run_group(action) for name, action in GROUPS.items()}))
