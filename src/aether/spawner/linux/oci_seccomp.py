"""The reviewed system call profile in the words of the OCI runtime specification (config-linux.md, "Seccomp").

A runtime hands it to libseccomp before our init runs; the init then installs the exact program of `seccomp` as in
every other cell, so a name that an old libseccomp does not know costs nothing. What is listed here by name is what
`seccomp` allows by number: the calls of both architectures up to REVIEWED_MAX that it does not refuse.

libseccomp compares an argument once per rule and lets no two rules of one call contradict each other. Hence the
complement of a set of values is written as blocks with a common prefix (`complement`), each under MASKED_EQ, and
always over the low 32 bits, which is all that the kernel reads of the arguments checked here.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import Any, Final

from aether.spawner.linux import kernel, seccomp

ARCHITECTURES: Final = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
_LOW: Final = 0xFFFFFFFF
_ALLOW: Final = {"action": "SCMP_ACT_ALLOW"}

# In the order of the x86-64 numbers (arch/x86/entry/syscalls/syscall_64.tbl, Linux 6.17), without what is refused.
_REVIEWED: Final = """
    read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
    rt_sigreturn pread64 pwrite64 readv writev access pipe select sched_yield mremap msync mincore madvise shmget
    shmat shmctl dup dup2 pause nanosleep getitimer alarm setitimer getpid sendfile connect accept sendto recvfrom
    sendmsg recvmsg shutdown bind listen getsockname getpeername socketpair setsockopt getsockopt fork vfork execve
    exit wait4 kill uname semget semop semctl shmdt msgget msgsnd msgrcv msgctl fcntl flock fsync fdatasync truncate
    ftruncate getdents getcwd chdir fchdir rename mkdir rmdir creat link unlink symlink readlink chmod fchmod chown
    fchown lchown umask gettimeofday getrlimit getrusage sysinfo times getuid getgid setuid setgid geteuid getegid
    setpgid getppid getpgrp setsid setreuid setregid getgroups setgroups setresuid getresuid setresgid getresgid
    getpgid setfsuid setfsgid getsid capget capset rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigsuspend
    sigaltstack utime mknod statfs fstatfs getpriority setpriority sched_setparam sched_getparam sched_setscheduler
    sched_getscheduler sched_get_priority_max sched_get_priority_min sched_rr_get_interval mlock munlock mlockall
    munlockall prctl arch_prctl setrlimit sync getpmsg putpmsg afs_syscall tuxcall security gettid readahead
    setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr
    lremovexattr fremovexattr tkill time futex sched_setaffinity sched_getaffinity set_thread_area io_setup
    io_destroy io_getevents io_submit io_cancel get_thread_area epoll_create epoll_ctl_old epoll_wait_old
    remap_file_pages getdents64 set_tid_address restart_syscall semtimedop fadvise64 timer_create timer_settime
    timer_gettime timer_getoverrun timer_delete clock_gettime clock_getres clock_nanosleep exit_group epoll_wait
    epoll_ctl tgkill utimes mbind set_mempolicy get_mempolicy mq_open mq_unlink mq_timedsend mq_timedreceive
    mq_notify mq_getsetattr waitid ioprio_set ioprio_get inotify_init inotify_add_watch inotify_rm_watch openat
    mkdirat mknodat fchownat futimesat newfstatat unlinkat renameat linkat symlinkat readlinkat fchmodat faccessat
    pselect6 ppoll set_robust_list get_robust_list splice tee sync_file_range vmsplice utimensat epoll_pwait
    signalfd timerfd_create eventfd fallocate timerfd_settime timerfd_gettime accept4 signalfd4 eventfd2
    epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev rt_tgsigqueueinfo recvmmsg syncfs sendmmsg getcpu
    sched_setattr sched_getattr renameat2 seccomp getrandom memfd_create execveat membarrier mlock2 copy_file_range
    preadv2 pwritev2 pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq uretprobe uprobe pidfd_send_signal
    pidfd_open close_range openat2 faccessat2 process_madvise epoll_pwait2 landlock_create_ruleset landlock_add_rule
    landlock_restrict_self process_mrelease futex_waitv set_mempolicy_home_node cachestat fchmodat2
    map_shadow_stack futex_wake futex_wait futex_requeue lsm_get_self_attr lsm_list_modules mseal setxattrat
    getxattrat listxattrat removexattrat file_getattr file_setattr
""".split()  # noqa: SIM905 - a table


def _errno(code: int) -> dict[str, Any]:
    return {"action": "SCMP_ACT_ERRNO", "errnoRet": code}


def _masked(index: int, mask: int, value: int) -> dict[str, Any]:
    return {"index": index, "op": "SCMP_CMP_MASKED_EQ", "value": mask, "valueTwo": value}


def complement(values: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Pairs (mask, value) that match every 32-bit number but `values`, each number exactly once."""
    wanted = frozenset(values)
    pending = [(0, 32)]
    while pending:
        low, bits = pending.pop()
        inside = {value for value in wanted if low <= value < low + (1 << bits)}
        if not inside:
            yield _LOW & ~((1 << bits) - 1), low
        elif bits:
            pending += [(low, bits - 1), (low | 1 << (bits - 1), bits - 1)]


def _values(name: str, index: int, values: Iterable[int], hit: dict[str, Any], miss: dict[str, Any]) -> list[Any]:
    """Rules of one call: `hit` for these values of an argument and `miss` for all others."""
    listed = list(values)
    blocks = [(_LOW, value, hit) for value in listed] + [(mask, value, miss) for mask, value in complement(listed)]
    return [{"names": [name], **action, "args": [_masked(index, mask, value)]} for mask, value, action in blocks]


def _flags(name: str, refused: int) -> list[Any]:
    """Rules of one call whose first argument may hold none of the bits of `refused`."""
    bits = [1 << bit for bit in range(32) if refused >> bit & 1]
    rules = [{"names": [name], **_errno(errno.EPERM), "args": [_masked(0, bit, bit)]} for bit in bits]
    return [*rules, {"names": [name], **_ALLOW, "args": [_masked(0, refused, 0)]}]


def _socket_rule(answer: dict[str, Any], *args: dict[str, Any]) -> dict[str, Any]:
    return {"names": ["socket"], **answer, "args": list(args)}


def _ip_socket(family: int) -> list[Any]:
    """Stream and datagram sockets of these protocols; of any other type or protocol EPROTONOSUPPORT."""
    is_ip, other = _masked(0, _LOW, family), _errno(errno.EPROTONOSUPPORT)
    rules = [_socket_rule(other, is_ip, _masked(1, bit, bit)) for bit in (4, 8)]
    rules += [_socket_rule(_ALLOW, is_ip, _masked(1, 12, 0), _masked(2, _LOW, p)) for p in seccomp.IP_PROTOCOLS]
    return rules + [_socket_rule(other, is_ip, _masked(2, *block)) for block in complement(seccomp.IP_PROTOCOLS)]


def _socket(with_ip: bool) -> list[Any]:
    """AF_NETLINK only with NETLINK_ROUTE (0) as the third argument."""
    other = _errno(errno.EAFNOSUPPORT)
    if not with_ip:
        return _values("socket", 0, (seccomp.AF_UNIX,), _ALLOW, other)
    known = (seccomp.AF_UNIX, seccomp.AF_INET, seccomp.AF_INET6, seccomp.AF_NETLINK)
    rules = [_socket_rule(other, _masked(0, *block)) for block in complement(known)]
    rules.append(_socket_rule(_ALLOW, _masked(0, _LOW, seccomp.AF_UNIX)))
    rules += [*_ip_socket(seccomp.AF_INET), *_ip_socket(seccomp.AF_INET6)]
    is_netlink = _masked(0, _LOW, seccomp.AF_NETLINK)
    rules.append(_socket_rule(_ALLOW, is_netlink, _masked(2, _LOW, 0)))
    return rules + [_socket_rule(other, is_netlink, _masked(2, *block)) for block in complement((0,))]


def oci_seccomp(profile: str, arch: str = kernel.ARCH) -> dict[str, Any]:
    """`linux.seccomp` of a bundle for a profile of `seccomp`. A call that nobody reviewed answers ENOSYS."""
    eperm = _errno(errno.EPERM)
    refused: dict[int, list[str]] = {}
    for name, call in seccomp.REFUSED.items():
        if getattr(call, arch) is not None:
            refused.setdefault(call.errno, []).append(name)
    allowed = [name for name in _REVIEWED if name not in seccomp.REFUSED and name not in seccomp.CHECKED]
    rules: list[Any] = [{"names": allowed, **_ALLOW}]
    rules += [{"names": names, **_errno(code)} for code, names in sorted(refused.items())]
    rules += _flags("clone", seccomp.NAMESPACE_MASK)
    rules += _flags("unshare", seccomp.NAMESPACE_MASK | seccomp.CLONE_NEWTIME)
    rules += _values("ioctl", 1, (0x5412, 0x541C, 0x5423), eperm, _ALLOW)
    rules += _values("prlimit64", 0, (0,), _ALLOW, eperm)
    rules += _values("personality", 0, (0, _LOW), _ALLOW, eperm)
    rules += _socket(with_ip=profile == "cell")
    default = {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno.ENOSYS}
    return {**default, "architectures": [ARCHITECTURES[arch]], "syscalls": rules}
