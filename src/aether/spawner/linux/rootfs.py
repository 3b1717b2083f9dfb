"""The default root of a cell: the host's /usr read-only, a handful of /etc, private /tmp, devices, a masked proc.

`gather_root_facts` looks at the host; `default_root_steps` and `default_landlock` are pure.
"""

from __future__ import annotations

import os
import posixpath
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aether.contract import cellplan as cp

JOB_HOME: Final = "/work"
JOB_ID: Final = 1000
SHM_BYTES: Final = 64 << 20
_MERGED: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
# Each is a mount (20 us); what has a fallback in /usr or is only administration stays out.
_ETC: Final = (
    "/etc/ld.so.cache", "/etc/alternatives", "/etc/ssl/certs", "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/certs", "/etc/pki/ca-trust/extracted", "/etc/localtime", "/etc/os-release",
)  # fmt: skip
# What runc, containerd and Docker mask (their default configurations, 2025). Their read-only list (bus, fs, irq, sys,
# sysrq-trigger) needs no entry: /proc is read-only as a whole and the cell's ids own nothing in it; there is no /sys.
# interrupts tells of key strokes and of other cells' input and output (GHSA-6fw5-f8r9-fgfm).
MASKED: Final = (
    "/proc/kcore", "/proc/keys", "/proc/sysrq-trigger", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
    "/proc/sched_debug", "/proc/interrupts", "/proc/acpi", "/proc/asound", "/proc/scsi",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RootFacts:
    """Of the host: `merged` are top-level names with the link target, or None for a directory of its own;
    `etc` pairs of cell path and real host path; `masked` which of MASKED exist; `prefixes` directories that
    the running Python needs beyond /usr, with their real paths."""

    merged: tuple[tuple[str, str | None], ...]
    etc: tuple[tuple[str, str], ...]
    masked: tuple[str, ...]
    prefixes: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PythonFacts:
    """Where a cell finds the running interpreter: `executable` and `path` (for PYTHONPATH) inside the cell;
    `prefixes` are pairs of cell path and real host directory to show there."""

    executable: str
    path: str
    prefixes: tuple[tuple[str, str], ...]


def place_python(directories: Sequence[str], executable: str, package: str) -> PythonFacts:
    """Pure. Each directory is shown at its own path, so that a venv and its interpreter find each other; one
    below a mount of the job (/work, /tmp) would be hidden by it and moves to /opt/aether."""
    shown: list[tuple[str, str]] = []
    for path in directories:
        if any(cp.is_beneath(path, host) for host in ("/usr", *(host for _, host in shown))):
            continue
        hidden = any(cp.is_beneath(path, mount) for mount in (JOB_HOME, "/tmp", "/dev", "/proc"))
        shown.append((f"/opt/aether/{posixpath.basename(path).lstrip('.')}" if hidden else path, path))

    def inside(path: str) -> str:
        for cell, host in shown:
            if cp.is_beneath(path, host):
                return cell + path[len(host) :]
        return path

    return PythonFacts(inside(executable), inside(package), tuple(shown))


def python_facts() -> PythonFacts:
    """Of the running interpreter: its venv, its installation, the directory of this package."""
    package = str(Path(__file__).resolve().parents[3])
    real = str(Path(sys.executable).resolve().parent.parent)
    return place_python((sys.prefix, sys.base_prefix, real, package), sys.executable, package)


def gather_root_facts(prefixes: Sequence[tuple[str, str]] = ()) -> RootFacts:
    """Reads the host; `prefixes` as in PythonFacts."""
    merged: list[tuple[str, str | None]] = []
    for name in _MERGED:
        path = Path(f"/{name}")
        if path.is_symlink():
            merged.append((str(path), posixpath.relpath(path.resolve(), "/")))
        elif path.is_dir():
            merged.append((str(path), None))
    return RootFacts(
        merged=tuple(merged),
        etc=tuple((p, os.path.realpath(p)) for p in _ETC if Path(p).exists()),
        masked=tuple(p for p in MASKED if os.path.lexists(p)),
        prefixes=tuple((cell, str(Path(host).resolve())) for cell, host in prefixes if Path(host).is_dir()),
    )


def source_roots(facts: RootFacts, *more: str) -> tuple[str, ...]:
    """Allowed roots that the default steps need, and `more` (such as the directory of work directories)."""
    roots = ["/usr", "/etc", *(real for _, real in facts.prefixes), *more]
    roots += [path for path, target in facts.merged if target is None]
    return tuple(dict.fromkeys(roots))


def _identity_files(hostname: str) -> list[cp.Step]:
    passwd = f"root:x:0:0:root:/:/bin/false\njob:x:{JOB_ID}:{JOB_ID}:job:{JOB_HOME}:/bin/sh\n"
    passwd += "nobody:x:65534:65534:nobody:/:/bin/false\n"
    return [
        cp.File("/etc/passwd", passwd),
        cp.File("/etc/group", f"root:x:0:\njob:x:{JOB_ID}:\nnogroup:x:65534:\n"),
        cp.File("/etc/hosts", f"127.0.0.1 localhost {hostname}\n::1 localhost\n"),
        cp.File("/etc/hostname", hostname + "\n"),
        cp.File("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
        cp.File("/etc/resolv.conf", ""),
    ]


def default_root_steps(
    facts: RootFacts, *, hostname: str = "cell", shm_bytes: int = SHM_BYTES, pty: bool = False
) -> tuple[cp.Step, ...]:
    """All of the root but /tmp and /work, which depend on the job."""
    steps: list[cp.Step] = [cp.BindRo("/usr", "/usr")]
    for path, target in facts.merged:
        steps.append(cp.BindRo(path, path) if target is None else cp.Symlink(path, target))
    steps += [cp.BindRo(path, real) for path, real in facts.etc if cp.is_beneath(real, "/etc")]
    # What lies in /usr is already shown: a link costs less than a mount.
    steps += [cp.Symlink(path, real) for path, real in facts.etc if cp.is_beneath(real, "/usr")]
    steps += _identity_files(hostname)
    steps += [cp.BindRo(path, real) for path, real in facts.prefixes]
    steps += [cp.Proc(), cp.DevMinimal(pty=pty), cp.Tmpfs("/dev/shm", shm_bytes, exec_allowed=False)]
    steps += [cp.Symlink("/var/tmp", "/tmp"), cp.Dir("/run"), cp.Dir("/root", 0o700)]
    if facts.masked:
        steps.append(cp.Mask(facts.masked))
    return tuple(steps)


def default_landlock_rules() -> tuple[cp.LandlockRule, ...]:
    """For the default root: everything may be read and run, devices used. /tmp and /work are the job's to add."""
    return (
        cp.LandlockRule("/", ("read", "execute")),
        cp.LandlockRule("/dev", ("read", "write", "device")),
    )


def process_landlock_rules(facts: RootFacts) -> tuple[cp.LandlockRule, ...]:
    """For the process level, on the host's own tree: what the default root would have shown, and no more."""
    shown = ["/usr", *(path for path, target in facts.merged if target is None)]
    shown += [real for _, real in (*facts.etc, *facts.prefixes)]
    rules = [cp.LandlockRule(path, ("read", "execute")) for path in dict.fromkeys(shown)]
    rules.append(cp.LandlockRule("/proc", ("read",)))
    rules += [cp.LandlockRule(f"/dev/{name}", ("read", "write")) for name in ("null", "zero", "full")]
    rules += [cp.LandlockRule(f"/dev/{name}", ("read",)) for name in ("random", "urandom")]
    return tuple(rules)
