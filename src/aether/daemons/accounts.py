"""Which uid each role runs as, and who owns what below the state directory.

As root every daemon has its own uid and all share one group (numeric ids that no passwd entry needs);
otherwise there is one uid and the split is fault isolation only.
"""

from __future__ import annotations

import ctypes
import os
import signal
from dataclasses import dataclass
from typing import Final

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
    gid: int
    split: bool
    """Whether the roles really have different uids."""


def accounts(uid: int, gid: int) -> Accounts:
    """The accounts for an instance started by `uid`."""
    if uid != 0:
        return Accounts(spawner=uid, aetherd=uid, aurorad=uid, keeper=uid, gid=gid, split=False)
    base = DAEMON_UID_BASE
    return Accounts(spawner=0, aetherd=base + 1, aurorad=base + 2, keeper=base + 3, gid=base, split=True)


def prepare(layout: Layout, who: Accounts) -> None:
    """Makes the state directory with tight owners and modes; raises AetherError STATE_UNUSABLE.

    Existing directories are only tightened, never widened; a symbolic link in their place is refused.
    """
    owned = {
        layout.root: (who.spawner, 0o750),
        layout.run: (who.aetherd, 0o750),
        layout.root / "logs": (who.spawner, 0o750),
        layout.audit: (who.aetherd, 0o750),
        layout.job_logs: (who.keeper, 0o750),
        layout.daemon_logs: (who.spawner, 0o750),
        layout.db: (who.aurorad, 0o700),
        layout.artifacts: (who.aurorad, 0o700),
        layout.models: (who.spawner, 0o750),
        layout.keys: (who.aetherd, 0o750),
        layout.trusted_keys: (who.spawner, 0o755),
        layout.policy.parent: (who.spawner, 0o750),
        layout.cells: (who.spawner, 0o711),
        layout.spool.parent: (who.spawner, 0o750),
        layout.spool: (who.aetherd, 0o700),
    }
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
        for directory, (uid, mode) in owned.items():
            directory.mkdir(exist_ok=True)
            if directory.is_symlink():
                raise OSError(f"{directory} is a symbolic link")
            os.chown(directory, uid, who.gid)
            directory.chmod(mode)
    except OSError as error:
        raise AetherError("STATE_UNUSABLE", f"cannot prepare the state directory {layout.root}: {error}") from error


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
