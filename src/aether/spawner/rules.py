"""What the spawner lets a plan ask for, beyond its being well formed: whose ids, which host paths.

- Ids: as root, one whole block of the range for cells, which no other live cell holds; with ids that are lent to the
  spawner's user, a pair of them; else the spawner's own uid.
- `bind_rw` shows the cell's own work directory and nothing else.
- An overlay lies over an image. It keeps its changes in the cell's own work directory, or those of the root in the
  layer beside it, or in memory.
- Below the state directory only models, artifacts, the keys that models are checked with and the cell's own work
  directory may be shown, whatever the roots say, and nothing that contains the state directory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from aether.contract.cellplan import (
    BindRo,
    BindRw,
    ExecSpec,
    IdMap,
    Overlay,
    Plan,
    PlanError,
    is_beneath,
    parse_exec,
    parse_plan,
    root_layer,
)
from aether.spawner.linux.idspace import here
from aether.spawner.protocol import RefusedError
from aether.spawner.workdir import Owner

DEVICES = frozenset({"/dev/fuse", "/dev/kvm", "/dev/net/tun"})
STATE_SHOWN = ("models", "artifacts", "keys/models")
IMAGES = "cache/images"
GPU_PREFIXES = ("/dev/nvidia", "/dev/dri/", "/dev/kfd", "/dev/accel/")


@dataclass(frozen=True, slots=True)
class Rules:
    """`roots`: host directories that cells may see; `state`: ours; `work`: where work directories are."""

    roots: tuple[str, ...]
    state: str
    work: str
    devices: frozenset[str] = frozenset()

    def plan(self, value: Any) -> Plan:
        """A plan that may be carried out; raises RefusedError BAD_PLAN."""
        try:
            plan = parse_plan(value, source_roots=(*self.roots, self.work), devices=self.devices)
        except PlanError as error:
            raise RefusedError("BAD_PLAN", str(error)) from error
        check_ids(plan.id_map)
        own = f"{self.work}/{plan.cell_id}"
        for step in plan.steps:
            if isinstance(step, BindRw) and not is_beneath(step.source, own):
                raise _refused(step.source, "only the cell's own work directory may be shown read-write")
            if isinstance(step, BindRo):
                self._check_source(step.source, own)
            if isinstance(step, Overlay):
                self._check_overlay(step, root_layer(own) if step.path == "/" else own)
        return plan

    def _check_overlay(self, step: Overlay, layer: str) -> None:
        images = f"{self.state}/{IMAGES}"
        if step.lower == images or not is_beneath(step.lower, images):
            raise _refused(step.lower, "it is no image")
        if step.upper not in (None, layer):
            raise _refused(step.upper or "", "changes are kept in the cell's own directories alone")

    def _check_source(self, source: str, own: str) -> None:
        if is_beneath(self.state, source):
            raise _refused(source, "it contains the state directory")
        shown = (own, *(f"{self.state}/{name}" for name in STATE_SHOWN))
        if is_beneath(source, self.state) and not any(is_beneath(source, place) for place in shown):
            raise _refused(source, "it lies in the state directory")


def exec_spec(value: Any, stdio: list[str]) -> ExecSpec:
    """The executable of a request, its stdio shown as the descriptors that it becomes; raises RefusedError BAD_PLAN.

    A terminal is all three streams; a pipe that we make is the standard input.
    """
    if not isinstance(value, dict) or "stdio" in value or stdio[0] == "log":
        raise RefusedError("BAD_PLAN", "cannot use the executable: stdio is given beside it, and stdin is no log")
    if stdio.count("tty") not in (0, 3) or "pipe" in stdio[1:]:
        raise RefusedError("BAD_PLAN", "cannot use the executable: a terminal is all of stdio, a pipe is stdin")
    shown = ["null" if kind == "null" else "fd" for kind in stdio]
    try:
        return parse_exec({**value, "stdio": shown, "tty": stdio[0] == "tty"})
    except PlanError as error:
        raise RefusedError("BAD_PLAN", str(error)) from error


def check_ids(ids: IdMap) -> None:
    """As root a block of the cells' range, aligned to it, or a pair of lent ids; without root also exactly this user.
    Raises RefusedError BAD_PLAN."""
    space = here()
    if ids.count == 1 and space.kind != "root":
        if ids.host_uid != os.geteuid() or ids.host_gid != os.getegid():
            raise RefusedError("BAD_PLAN", "cannot use the id map: without root a cell has the spawner's own ids")
        return
    if space.kind == "own":
        raise RefusedError("BAD_PLAN", "cannot use the id map: the spawner has no ids but its own")
    for first in (ids.host_uid, ids.host_gid):
        if space.slot(first) is None:
            raise RefusedError("BAD_PLAN", f"cannot use the id map: {first} does not begin a block of the cells' range")
    if ids.count > space.block:
        raise RefusedError("BAD_PLAN", "cannot use the id map: it is larger than a block")


def check_owner(owner: dict[str, int]) -> Owner:
    """The owner of a directory prepared before its cell: within one block, as for a plan. Raises RefusedError."""
    uids = range(owner["uid_first"], owner["uid_first"] + owner["uid_count"])
    check_ids(IdMap(uids.start, owner["gid"] if len(uids) == 1 else uids.start, len(uids)))
    if owner["uid"] not in uids or (len(uids) > 1 and owner["gid"] not in uids):
        raise RefusedError("BAD_PLAN", "cannot use the owner: it lies outside its block")
    return Owner(owner["uid"], owner["gid"], uids)


def owner_of(ids: IdMap) -> Owner:
    """Who the cell's executables are on the host."""
    return Owner(*ids.job_host, range(ids.host_uid, ids.host_uid + ids.count))


def host_devices() -> frozenset[str]:
    """Device nodes that a plan may show: a short list and the GPUs of this host."""
    found = {path for path in DEVICES if os.path.exists(path)}  # noqa: PTH110
    for prefix in GPU_PREFIXES:
        directory, _, name = prefix.rpartition("/")
        try:
            with os.scandir(directory) as entries:
                found.update(e.path for e in entries if e.name.startswith(name) and not e.is_dir())
        except OSError:
            continue
    return frozenset(found)


def _refused(source: str, why: str) -> RefusedError:
    return RefusedError("BAD_PLAN", f"cannot show {source[:200]}: {why}")
