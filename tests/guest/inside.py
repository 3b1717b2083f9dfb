"""Inside the guest, as its first process: mount what tests write to, then run pytest and power off.

The root is the host's, read-only: /tmp and what else tests may write is a scratch disk (ext4 on virtio, so that
I/O limits have a device) or memory. Every controller is enabled below the root cgroup, which may hold processes
and pass controllers down at once (cgroup-v2.rst, "No Internal Process Constraint" exempts the root).
The last line on the console is `AETHER-GUEST-EXIT <status>`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

RB_POWER_OFF = 0x4321FEDC
MS_BIND = 1 << 12
SCRATCH = "/tmp"
_libc = ctypes.CDLL(None, use_errno=True)


def mount(kind: str, target: str, options: str = "", source: str = "none", flags: int = 0) -> None:
    if _libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"cannot mount {kind} on {target}: {os.strerror(ctypes.get_errno())}")


def mount_scratch(repository: str) -> None:
    """The disk at /tmp; memory elsewhere. A repository that lies in one of these places is shown there again."""
    kept = os.open(repository, os.O_PATH | os.O_DIRECTORY)
    subprocess.run(["modprobe", "-a", "virtio_blk", "ext4", "bfq", "loop"], check=False)
    made = subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-i", "3072", "/dev/vda"], check=False)
    if made.returncode == 0:
        mount("ext4", SCRATCH, source="/dev/vda")
        Path("/sys/block/vda/queue/scheduler").write_text("bfq")
    else:
        mount("tmpfs", SCRATCH)
    Path(SCRATCH).chmod(0o1777)
    for target in ("/run", "/var/tmp"):
        with contextlib.suppress(FileNotFoundError):
            mount("tmpfs", target, "mode=0755")
    if not Path(__file__).exists():
        Path(repository).mkdir(parents=True)
        mount("", repository, source=f"/proc/self/fd/{kept}", flags=MS_BIND)
    os.close(kept)
    for target, kind, options in (("/dev/pts", "devpts", "gid=5,mode=620,ptmxmode=666"), ("/dev/shm", "tmpfs", "")):
        Path(target).mkdir(exist_ok=True)
        mount(kind, target, options)


def mount_cgroups() -> None:
    mount("cgroup2", "/sys/fs/cgroup")
    offered = Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
    control = Path("/sys/fs/cgroup/cgroup.subtree_control")
    for controller in offered:
        control.write_text(f"+{controller}")
    print(f"guest: Linux {os.uname().release}, cgroup2 controllers: {' '.join(offered)}", flush=True)


def run_tests(repository: str, arguments: list[str]) -> int:
    env = {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": SCRATCH,
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": f"{SCRATCH}/hypothesis",
        "AETHER_GUEST": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # those that no test here needs take as long to import as ten tests
    }
    plain = ["--color=no", "-p", "pytest_timeout", "-p", "no:cacheprovider", "-o", "timeout=600", *arguments]
    done = subprocess.run([sys.executable, "-m", "pytest", *plain], cwd=repository, env=env, check=False)
    return done.returncode


def main(repository: str, arguments: str) -> None:
    os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
    os.environ["HOME"] = SCRATCH
    print("AETHER-GUEST-UP", flush=True)
    status = 1
    try:
        mount_scratch(repository)
        mount_cgroups()
        subprocess.run(["ip", "link", "set", "lo", "up"], check=False)
        status = run_tests(repository, json.loads(arguments))
    except BaseException as error:
        print(f"guest: {error!r}", flush=True)
    print(f"AETHER-GUEST-EXIT {status}", flush=True)
    os.sync()
    _libc.reboot(RB_POWER_OFF)


main(sys.argv[1], sys.argv[2])
