"""What confines this process from outside, and which of it keeps cells from being made: for `aether doctor`.

`look` reads the host; the rest is pure. Nothing here is an authority: what works is found by trying (`probe`); this
names the cause and the exact remedy where it does not.

Sources: apparmor(7) and Ubuntu's restriction of unprivileged user namespaces (23.10); Docker's default profile
(seccomp filter, AppArmor `docker-default`, no CAP_SYS_ADMIN, masked paths of /proc); mount_namespaces(7): a new /proc
is refused in a user namespace while the one that is seen is partly covered; subuid(5), newuidmap(1).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aether.contract.cellids import PAIR
from aether.spawner.linux import idspace, subordinate

_CAP_SYS_ADMIN: Final = 21
_MARKS: Final = (("/.dockerenv", "docker"), ("/run/.containerenv", "podman"))
PROFILE: Final = "deploy/apparmor/aether"
_INSTALL: Final = (
    f"as root: install -m 644 {PROFILE} /etc/apparmor.d/aether && apparmor_parser -r /etc/apparmor.d/aether, with the "
    "path of this command in /etc/apparmor.d/tunables/aether"
)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """`container` its kind or None; `label` of AppArmor, None without it; `restricted` whether unconfined programs
    get no user namespace; `filtered` whether a seccomp filter is on us; `administrator` CAP_SYS_ADMIN; `covered`
    paths of /proc with something mounted over them; `slots` how many cells may have ids of their own; `alone` why none
    may (reason, remedy)."""

    uid: int
    container: str | None
    label: str | None
    restricted: bool
    filtered: bool
    administrator: bool
    covered: tuple[str, ...]
    slots: int
    alone: tuple[str, str] | None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _status(text: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def look(root: Path = Path("/")) -> Surroundings:
    """Of this process; `root` stands in for the file tree."""
    status = _status(_read(root / "proc/self/status"))
    label = _read(root / "proc/self/attr/current").strip("\0\n ") or None
    mounts = (line.split() for line in _read(root / "proc/self/mountinfo").splitlines())
    covered = {row[4] for row in mounts if len(row) > 4 and row[4].startswith("/proc/")}
    uid = os.geteuid()
    own = idspace.space(uid, _read(root / "proc/self/uid_map"))
    alone = subordinate.lacking(uid, root) if own.kind == "own" else None
    effective = int(status.get("CapEff", "0") or "0", 16)
    kinds = [kind for mark, kind in _MARKS if (root / mark[1:]).exists()]
    return Surroundings(
        uid=uid,
        container=kinds[0] if kinds else None,
        label=label,
        restricted=_read(root / "proc/sys/kernel/apparmor_restrict_unprivileged_userns").strip() == "1",
        filtered=status.get("Seccomp") == "2",
        administrator=bool(effective >> _CAP_SYS_ADMIN & 1),
        covered=tuple(sorted(covered - {"/proc/sys/fs/binfmt_misc"})),  # automounted everywhere, covers nothing
        slots=own.slots if own.kind != "own" else 0 if alone else subordinate.lent(uid, root).count // PAIR,
        alone=alone,
    )


def barriers(seen: Surroundings) -> list[tuple[str, str]]:
    """Pairs (reason, remedy): each thing of a container that can keep cells from being made."""
    found = []
    if seen.filtered:
        found.append(("its seccomp filter", "--security-opt seccomp=unconfined"))
    if seen.label not in (None, "unconfined", "aether (unconfined)"):
        found.append((f"its AppArmor profile {seen.label}", "--security-opt apparmor=unconfined"))
    if seen.uid == 0 and not seen.administrator:
        found.append(("no CAP_SYS_ADMIN", "--cap-add SYS_ADMIN"))
    if seen.covered:
        shown = ", ".join(seen.covered[:3]) + (", ..." if len(seen.covered) > 3 else "")
        found.append((f"parts of /proc are covered ({shown})", "--security-opt systempaths=unconfined"))
    return found


def _apparmor(seen: Surroundings) -> list[tuple[str, str]]:
    stops_us = seen.restricted and seen.uid != 0 and seen.label in (None, "unconfined")
    return [("AppArmor gives unconfined programs of ordinary users no user namespace", _INSTALL)] if stops_us else []


def cause(seen: Surroundings) -> tuple[str, str] | None:
    """(reason, remedy) when namespaces or mounts were refused, None when nothing is seen that refuses them."""
    lacks = _apparmor(seen)
    if seen.container is not None and (found := barriers(seen)):
        what = ", ".join(reason for reason, _ in found)
        lacks.append((f"{seen.container} refuses it: {what}", "run it with " + " ".join(way for _, way in found)))
    if not lacks:
        return None
    return "; ".join(reason for reason, _ in lacks), "; ".join(remedy for _, remedy in lacks)


def rows(seen: Surroundings, cells_work: bool) -> list[dict[str, Any]]:
    """Checks for people. With `cells_work` nothing stands in the way, whatever is there."""
    found = None if cells_work else cause(seen)
    reason, remedy = found or (None, None)
    value = seen.container or "none"
    if seen.label is not None:
        value += f", AppArmor {seen.label}"
    return [
        {"name": "confinement", "ok": found is None, "value": value, "reason": reason, "remedy": remedy},
        _ids(seen),
    ]


def _ids(seen: Surroundings) -> dict[str, Any]:
    """That cells share the user's uid is no fault, but there is a remedy."""
    reason, remedy = seen.alone or (None, None)
    value = "one uid for all cells" if seen.alone else f"ids of their own for {seen.slots} cells"
    return {"name": "ids", "ok": True, "value": value, "reason": reason, "remedy": remedy}
