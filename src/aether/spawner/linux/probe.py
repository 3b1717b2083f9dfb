"""What this host can enforce, found by trying it in short-lived children, each lack with its reason and remedy.

`checks` is the table for people (`aether doctor`); `probe` is what planners need: the mechanisms that are missing
by the words of `require`, the Landlock ABI, and the default root with its Landlock rules.
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from aether.contract.cellplan import NAMESPACES, to_plain
from aether.spawner.linux import kernel, landlock, native, oci, rootfs, surroundings
from aether.spawner.linux.bpf import permission

WORDS: Final = {
    "user": "userns", "pid": "pidns", "mnt": "mountns", "net": "netns", "ipc": "ipcns", "uts": "utsns",
    "cgroup": "cgroupns",
}  # fmt: skip
KERNEL_MIN: Final = (5, 12)  # mount_setattr(2)
_MAX_USERNS: Final = Path("/proc/sys/user/max_user_namespaces")
_DEBIAN: Final = Path("/proc/sys/kernel/unprivileged_userns_clone")


ATTEMPTS: Final = 3


def _check(name: str, ok: bool, value: str, reason: str = "", remedy: str = "") -> dict[str, Any]:
    return {
        "name": name,
        "ok": ok,
        "value": value,
        "reason": None if ok else reason or None,
        "remedy": None if ok else remedy or None,
    }


def attempt(action: Callable[[], None]) -> int:
    """Errno of `action` in a child of its own, 0 when it works.

    A child that somebody killed has said nothing about the host, and must not make all cells weaker: it is asked
    again.
    """
    for _ in range(ATTEMPTS):
        code = _attempt_once(action)
        if code >= 0:
            return code
    return errno.EINTR


def _attempt_once(action: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            action()
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _new_user() -> None:
    uid, gid = os.geteuid(), os.getegid()
    kernel.unshare(kernel.CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"1000 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"1000 {gid} 1")


def _enter(kind: str) -> None:
    if os.geteuid() != 0 or kind == "user":
        _new_user()
    if kind != "user":
        kernel.unshare(kernel.NAMESPACE_FLAGS[kind])


def _mount_proc() -> None:
    """A new proc in a new pid namespace: refused where the host's own /proc is partly covered (Docker)."""
    if os.geteuid() != 0:
        _new_user()
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWPID)

    def inside() -> None:
        context = kernel.syscall("fsopen", b"proc", 1)
        kernel.syscall("fsconfig", context, 6, None, None, 0)
        kernel.syscall("fsmount", context, 1, 0)

    code = attempt(inside)
    if code:
        raise OSError(code, "proc")


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _refusal(code: int) -> tuple[str, str]:
    """(reason, remedy) of namespaces or mounts that the kernel refused with `code`."""
    found = surroundings.cause(surroundings.look())
    if found is not None:
        return found
    if _read(_DEBIAN) == "0":
        return "kernel.unprivileged_userns_clone is 0", "as root: sysctl kernel.unprivileged_userns_clone=1"
    if _read(_MAX_USERNS) == "0":
        return "user.max_user_namespaces is 0", "as root: sysctl user.max_user_namespaces=15000"
    return f"the kernel refuses them: {os.strerror(code)}", "allow user namespaces, or run the spawner as root"


def _namespace_check(kind: str) -> dict[str, Any]:
    code = attempt(lambda: _enter(kind))
    if code == 0:
        return _check(WORDS[kind], True, "yes")
    if code == errno.EINVAL:
        return _check(WORDS[kind], False, "no", "this kernel lacks it", f"a kernel with CONFIG_{kind.upper()}_NS")
    return _check(WORDS[kind], False, "no", *_refusal(code))


def _proc_check() -> dict[str, Any]:
    code = attempt(_mount_proc)
    if code == 0:
        return _check("proc", True, "yes")
    return _check("proc", False, "no", *_refusal(code))


def _seccomp_check() -> dict[str, Any]:
    def install() -> None:
        action = (0x7FFF0000).to_bytes(4, "little")
        kernel.syscall("seccomp", 2, 0, action)  # SECCOMP_GET_ACTION_AVAIL

    if kernel.ARCH not in ("x86_64", "aarch64"):
        reason = f"there is no reviewed profile for {kernel.ARCH}"
        return _check("seccomp", False, "no", reason, "x86-64 or aarch64 is needed")
    code = attempt(install)
    reason = f"filters are refused: {os.strerror(code)}"
    return _check("seccomp", code == 0, "yes" if code == 0 else "no", reason, "a kernel with CONFIG_SECCOMP_FILTER")


def _landlock_check(abi: int) -> dict[str, Any]:
    return _check(
        "landlock",
        abi > 0,
        f"ABI {abi}" if abi else "no",
        "this kernel has no Landlock, or it is not enabled",
        "Linux 5.13 with landlock in the kernel's lsm= list",
    )


def _bpf_check() -> dict[str, Any]:
    """Whether cells can be observed; without it PID 1 alone tells what their executables do."""
    lack = permission.lacking()
    return _check("bpf", lack is None, "yes" if lack is None else "no", *(lack or ("", "")))


def _kernel_check() -> dict[str, Any]:
    release = platform.release()
    parts = release.split("-")[0].split(".")
    found = tuple(int(p) for p in parts[:2] if p.isdigit())
    return _check("kernel", found >= KERNEL_MIN, release, "older than 5.12", "upgrade the kernel")


def checks() -> list[dict[str, Any]]:
    """Every check as {name, ok, value, reason, remedy}; reason and remedy are null when it is fine."""
    table = [_kernel_check(), *(_namespace_check(kind) for kind in NAMESPACES), _proc_check(), _seccomp_check()]
    table.append(_landlock_check(landlock.probe_abi()))
    table.append(_bpf_check())
    built = os.access(native.BINARY, os.X_OK)
    why = ("aether-init is not built; the portable executor is slower", "make -C src/aether/spawner/native")
    table.append(_check("native-init", built, "built" if built else "absent", *why))
    made = all(check["ok"] for check in table if check["name"] in (*WORDS.values(), "proc"))
    table += surroundings.rows(surroundings.look(), made)
    return [*table, *(_driver_check(each) for each in oci.find_runtimes(os.environ).values())]


def _driver_check(found: oci.Found) -> dict[str, Any]:
    """A runtime that is not there is no fault of the host."""
    what = {"reason": found.reason or None, "remedy": found.remedy or None}
    return {"name": f"driver {found.kind}", "ok": True, "value": found.path or "absent", **what}


def _cell_lack(by_name: dict[str, dict[str, Any]]) -> dict[str, str] | None:
    """The first mechanism without which there is only the process level."""
    needed = ["kernel", "pidns", "mountns", "proc", "seccomp"]
    if os.geteuid() != 0:
        needed.insert(1, "userns")
    for name in needed:
        if not by_name[name]["ok"]:
            return {"reason": by_name[name]["reason"], "remedy": by_name[name]["remedy"]}
    return None


def probe() -> dict[str, Any]:
    """JSON-able.

    `checks`; `missing` {word: {reason, remedy}} with `cell` when only the process level is left; `landlock_abi`;
    `python` where a cell finds this interpreter; `root_steps` and `landlock_rules` of the default root (rules of
    the host's tree at process level); `source_roots` that these steps need.
    """
    table = checks()
    by_name = {check["name"]: check for check in table}
    words = (*WORDS.values(), "seccomp", "landlock", "bpf")
    missing = {
        word: {"reason": by_name[word]["reason"], "remedy": by_name[word]["remedy"]}
        for word in words
        if not by_name[word]["ok"]
    }
    lack = _cell_lack(by_name)
    if lack is not None:
        missing["cell"] = lack
    python = rootfs.python_facts()
    facts = rootfs.gather_root_facts(python.prefixes)
    rules = rootfs.default_landlock_rules() if lack is None else rootfs.process_landlock_rules(facts)
    return {
        "checks": table,
        "missing": missing,
        "landlock_abi": landlock.probe_abi(),
        "root_steps": [to_plain(step) for step in rootfs.default_root_steps(facts)] if lack is None else [],
        "landlock_rules": [to_plain(rule) for rule in rules],
        "python": {"executable": python.executable, "path": python.path},
        "source_roots": list(rootfs.source_roots(facts)),
    }
