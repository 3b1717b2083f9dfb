"""Which uid each role runs as, and who owns what below the state directory.

As root every daemon has its own uid and all share one group (numeric ids that no passwd entry needs);
otherwise there is one uid and the split is fault isolation only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

from aether.api.address import SUN_PATH_BYTES_MAX
from aether.contract.errors import AetherError
from aether.contract.limits import DAEMON_UID_BASE
from aether.contract.paths import Layout

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_DUMPABLE: Final = 4


@dataclass(frozen=True, slots=True)
class Accounts:
    """Numeric uids of the roles and their shared gid."""

    spawner: int
    aetherd: int
    aurorad: int
    keeper: int
    egressd: int
    spired: int
    gid: int
    split: bool
    """Whether the roles really have different uids."""


def accounts(uid: int, gid: int) -> Accounts:
    """The accounts for an instance started by `uid`."""
    if uid != 0:
        return Accounts(
            spawner=uid, aetherd=uid, aurorad=uid, keeper=uid, egressd=uid, spired=uid, gid=gid, split=False
        )
    base = DAEMON_UID_BASE
    return Accounts(
        spawner=0,
        aetherd=base + 1,
        aurorad=base + 2,
        keeper=base + 3,
        egressd=base + 4,
        spired=base + 5,
        gid=base,
        split=True,
    )


def prepare(layout: Layout, who: Accounts, by_path: bool = False) -> None:
    """Makes the state directory and gives each directory its owner and mode; raises AetherError STATE_UNUSABLE.

    `by_path` is for a machine on which cells are given no view of files of their own: with uids of their own they
    must be able to walk to their work directories and packages, so three directories can be walked through then.
    Some lie in a directory of aetherd's, which could put anything in their place: each is opened, never through a
    symbolic link, and what was opened is changed.
    """
    walked = 0o751 if by_path and who.split else 0o750
    owned = {
        layout.root: (who.spawner, walked),
        layout.supervisor: (who.spawner, 0o755),
        layout.run: (who.aetherd, 0o750),
        layout.root / "logs": (who.spawner, 0o750),
        layout.audit: (who.aetherd, 0o750),
        layout.job_logs: (who.keeper, 0o750),
        layout.daemon_logs: (who.spawner, 0o750),
        layout.db: (who.aurorad, 0o700),
        layout.artifacts: (who.aurorad, 0o700),
        layout.models: (who.spawner, walked),
        layout.keys: (who.aetherd, walked),
        layout.secrets: (who.egressd, 0o700),
        layout.trusted_keys: (who.spawner, 0o755),
        layout.policy.parent: (who.spawner, 0o750),
        layout.cells: (who.spawner, 0o711),
        layout.spool.parent: (who.spawner, 0o750),
        layout.spool: (who.aetherd, 0o700),
        layout.images: (who.aurorad, 0o750),
        layout.spire: (who.spired, 0o750),
    }
    _check_length(layout)
    for path, (uid, mode) in owned.items():
        try:
            layout.root.parent.mkdir(parents=True, exist_ok=True)
            with directory(layout.root, path.relative_to(layout.root)) as handle:
                os.fchown(handle, uid, who.gid)
                os.fchmod(handle, mode)
        except OSError as error:
            reason = f"{path}: {error.strerror or error}"
            raise AetherError("STATE_UNUSABLE", f"cannot prepare the state directory: {reason}") from error


@contextlib.contextmanager
def directory(root: Path, below: PurePath) -> Iterator[int]:
    """The directory `root/below`, made if need be, reached through no link from `root` on; raises OSError."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    with contextlib.ExitStack() as opened:
        handle = os.open(root, flags)
        opened.callback(os.close, handle)
        for name in below.parts:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=handle)
            handle = os.open(name, flags, dir_fd=handle)
            opened.callback(os.close, handle)
        yield handle


def _check_length(layout: Layout) -> None:
    longest = max(
        len(os.fsencode(path)) for path in (layout.api_socket, layout.authority_socket, layout.spawner_socket)
    )
    if longest > SUN_PATH_BYTES_MAX:
        raise AetherError(
            "STATE_UNUSABLE",
            f"cannot use {layout.root} as state directory: paths of sockets in it have {longest} bytes, and the kernel "
            f"takes {SUN_PATH_BYTES_MAX} (unix(7))",
            "choose a shorter $AETHER_STATE",
        )


def become(uid: int, gid: int, umask: int = 0o027) -> None:
    """Drops to `uid`:`gid` for good and dies with the parent.

    PDEATHSIG is set after setresuid, which clears it (prctl(2)); a parent that died before is seen by its pid.
    """
    parent = os.getppid()
    os.umask(umask)
    if os.getuid() == 0 and uid != 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("the supervisor is gone")
