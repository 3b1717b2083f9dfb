"""What the spawner says about its host, read once into frozen types when it connects.

The plan is a pure function of a specification and these facts. `missing` names each mechanism that this host
cannot enforce, with the reason and the remedy, in the words of `require`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from aether.contract.cellids import IdSpace, read_space
from aether.contract.cellplan import NAMESPACES, LandlockRule, Plan, Step, parse_plan

NAMESPACE_WORDS: Final = {
    "user": "userns",
    "pid": "pidns",
    "mnt": "mountns",
    "net": "netns",
    "ipc": "ipcns",
    "uts": "utsns",
    "cgroup": "cgroupns",
}
LIMIT_WORDS: Final = {
    "memory_bytes": "cgroup-memory",
    "cpu_millis": "cgroup-cpu",
    "pids": "cgroup-pids",
    "disk_bytes": "disk",
}


@dataclass(frozen=True, slots=True)
class Lack:
    """Why a mechanism is absent and what helps."""

    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Python:
    """This installation's interpreter: `host` is its path here, `cell` inside a cell; `path` is for PYTHONPATH."""

    host: str
    cell: str
    path: str


@dataclass(frozen=True, slots=True)
class Facts:
    """`root` and `landlock_rules`: the read-only root that every cell gets here, and what Landlock allows of it."""

    instance: str
    work_root: str
    logs: str
    ids: IdSpace
    uid: int
    gid: int
    executor: str
    level: str
    namespaces: tuple[str, ...]
    landlock_abi: int
    root: tuple[Step, ...]
    landlock_rules: tuple[LandlockRule, ...]
    python: Python
    missing: dict[str, Lack]
    limits_missing: dict[str, str]
    """Limits that the cgroups here cannot hold, with the reason."""
    drivers: dict[str, Lack | None]
    """The OCI runtimes: why one cannot be used, or None for one that can."""

    @property
    def is_root(self) -> bool:
        return self.ids.kind == "root"

    def image(self, digest: str) -> str:
        """Where the tree of an image is: below the state directory, which is two above the work directories."""
        state = self.work_root.rpartition("/")[0].rpartition("/")[0]
        return f"{state}/cache/images/{digest.removeprefix('sha256:')}/root"


def read_facts(hello: dict[str, Any]) -> Facts:
    """The reply to `hello`. The cgroup driver's missing limits become missing mechanisms."""
    host, cgroup = hello["host"], hello["cgroup"]
    missing = {name: Lack(lack["reason"], lack["remedy"]) for name, lack in host["missing"].items()}
    for limit, reason in cgroup["missing"].items():
        if limit in LIMIT_WORDS:
            missing[LIMIT_WORDS[limit]] = Lack(reason, cgroup["remedy"])
    namespaces = tuple(name for name in NAMESPACES if NAMESPACE_WORDS[name] not in missing)
    level = "process" if "cell" in missing else "cell"
    base = _base_plan(host["root_steps"], host["landlock_rules"])
    return Facts(
        instance=hello["instance"],
        work_root=hello["work_root"],
        logs=hello["logs"],
        ids=read_space(hello["ids"]),
        uid=hello["uid"],
        gid=hello["gid"],
        executor=hello["executor"],
        level=level,
        namespaces=namespaces if level == "cell" else (),
        landlock_abi=host["landlock_abi"],
        root=base.steps,
        landlock_rules=base.landlock.rules if base.landlock is not None else (),
        python=Python(hello["python"], host["python"]["executable"], host["python"]["path"]),
        missing=missing,
        limits_missing=cgroup["missing"],
        drivers={
            name: Lack(found["reason"], found["remedy"]) if found["reason"] else None
            for name, found in hello["drivers"].items()
        },
    )


def _base_plan(steps: list[Any], rules: list[Any]) -> Plan:
    """The spawner's steps and rules through the strict parser of plans."""
    outline = {
        "cell_id": "base",
        "level": "cell" if steps else "process",
        "namespaces": list(NAMESPACES) if steps else [],
        "id_map": {"host_uid": 1, "host_gid": 1, "count": 1, "init_uid": 1, "job_uid": 1, "job_gid": 1},
        "hostname": "cell",
        "steps": steps,
        "seccomp_profile": "cell" if steps else "offline",
        "landlock": {"rules": rules},
    }
    return parse_plan(outline, source_roots=("/",))
