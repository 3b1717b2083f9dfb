"""A plan as the `config.json` of an OCI bundle (runtime-spec 1.0.2, config.md and config-linux.md). Pure.

The container is the cell without its executables: its process is our own init (`aether-init serve 3`), which gets
the rest of the plan over descriptor 3 and does in the container what it does in every cell. So the work divides:

- the runtime: namespaces and id mappings, the root and its mounts, masked paths, host name, the capabilities that
  PID 1 needs to start executables under another id, no_new_privs, seccomp;
- our init, first of all: an empty bounding set, Landlock, the exact seccomp program; then per executable: ids,
  no capabilities, rlimits, working directory, descriptors, terminal;
- the spawner: limits and accounts. The runtime is started inside the cell's cgroup and told to manage none, hence
  no `cgroupsPath` and no `resources`: limits, live changes, freezing, usage and OOM counts are those of any cell.

Directories, links and files of the plan (SKELETON) are not mounts: they are made in `rootfs` beforehand. So are
overlays, whose layers a bundle cannot name safely: the one at "/" is `rootfs`, others are bound to their place.
What a runtime cannot do raises PlanError: nothing that a plan asks for is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from aether.contract import cellplan as cp
from aether.spawner.linux.oci_seccomp import oci_seccomp

OCI_VERSION: Final = "1.0.2"
INIT_PATH: Final = "/.aether-init"
"""Where the container has our init: the one thing in its root that no plan names."""
CONTROL_FD: Final = 3
MOUNTED: Final = (cp.BindRo, cp.BindRw, cp.BindDev, cp.Overlay, cp.Tmpfs, cp.Proc, cp.DevMinimal)
_NAMESPACES: Final = {
    "user": "user", "pid": "pid", "mnt": "mount", "net": "network", "ipc": "ipc", "uts": "uts", "cgroup": "cgroup",
}  # fmt: skip
_CAPABILITIES: Final = ("CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_SETPCAP")
SKELETON: Final = (cp.Dir, cp.Symlink, cp.File)
"""Steps that are no mounts: made in `rootfs` beforehand."""


def _mount(path: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": path, "type": kind, "source": source, "options": list(options)}


def _mounts_of(step: cp.Step, source: str | None = None) -> list[dict[str, Any]]:
    """`source` replaces the host path of a bind."""
    match step:
        case cp.BindRo():
            return [_mount(step.path, "bind", source or step.source, "rbind", "ro", "nosuid", "nodev")]
        case cp.BindRw():
            return [_mount(step.path, "bind", source or step.source, "rbind", "rw", "nosuid", "nodev")]
        case cp.BindDev():
            return [_mount(step.path, "bind", source or step.source, "bind", "nosuid", "noexec")]
        case cp.Overlay() if step.path != "/":
            return [_mount(step.path, "bind", source or step.lower, "rbind", "rw", "nosuid", "nodev")]
        case cp.Tmpfs():
            size = (f"size={step.size_bytes}", f"nr_inodes={step.inodes_max}", f"mode={step.mode:o}")
            exec_options = () if step.exec_allowed else ("noexec",)
            return [_mount(step.path, "tmpfs", "tmpfs", "nosuid", "nodev", *exec_options, *size)]
        case cp.Proc():
            return [_mount(step.path, "proc", "proc", "nosuid", "nodev", "noexec", "ro")]
        case cp.DevMinimal():
            size = ("size=65536", "nr_inodes=64", "mode=755")
            mounts = [_mount(step.path, "tmpfs", "tmpfs", "nosuid", "noexec", "ro", *size)]
            if step.pty:
                pts = ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620")
                mounts.append(_mount(f"{step.path}/pts", "devpts", "devpts", *pts))
            return mounts
        case _:
            return []


def _check_step(field: str, step: cp.Step, mounted: Sequence[str]) -> None:
    if not isinstance(step, (*SKELETON, *MOUNTED, cp.Mask)):
        raise cp.PlanError(field, f"an OCI bundle cannot say {step.op}: use the native driver")
    if isinstance(step, cp.Mask):
        return
    if isinstance(step, SKELETON) and any(cp.is_beneath(step.path, mount) for mount in mounted):
        raise cp.PlanError(field, "it lies below a mount, where an OCI bundle cannot put it: order it before")
    wanted = {cp.DevMinimal: "/dev", cp.Proc: "/proc"}.get(type(step))
    if wanted is not None and step.path != wanted:
        raise cp.PlanError(field, f"OCI runtimes know it at {wanted} only")


def check_bundle(plan: cp.Plan, runtime: str) -> None:
    """Raises PlanError, with the reason, for what `runtime` cannot do. See the head of this module."""
    mounted: list[str] = []
    for index, step in enumerate(plan.steps):
        _check_step(f"plan.steps[{index}]", step, mounted)
        mounted += [mount["destination"] for mount in _mounts_of(step)]
    if "/proc" not in mounted or "/dev" not in mounted:
        raise cp.PlanError("plan.steps", "an OCI runtime needs proc and dev_minimal")
    if plan.id_map.count == 1:
        raise cp.PlanError("plan.id_map", f"{runtime} needs a block of ids, which only root has")
    if runtime == "runsc":
        _check_sentry(plan)


def _check_sentry(plan: cp.Plan) -> None:
    """gVisor's kernel is not Linux: no Landlock, no ambient capabilities, no devices of the host, no network
    namespace to share, and masked paths only where its own files already say nothing."""
    if plan.landlock is not None:
        raise cp.PlanError("plan.landlock", "gVisor has none: leave it out of the plan")
    if "net" not in plan.namespaces:
        raise cp.PlanError("plan.namespaces", "gVisor without a network of its own would reach the host's")
    if "user" not in plan.namespaces:
        raise cp.PlanError("plan.namespaces", "gVisor cannot give PID 1 of another id the right to change ids")
    masked = [path for step in plan.steps if isinstance(step, cp.Mask) for path in step.paths]
    if not all(cp.is_beneath(path, "/proc") or cp.is_beneath(path, "/sys") for path in masked):
        raise cp.PlanError("plan.steps", "gVisor masks nothing: leave such files out of the root")
    if any(isinstance(step, cp.BindDev) for step in plan.steps):
        raise cp.PlanError("plan.steps", "gVisor shows no device of the host: use runc or crun")


def _keeps_changes(step: cp.Step) -> bool:
    """A root whose changes are kept is the one that may be written."""
    return isinstance(step, cp.Overlay) and step.path == "/" and step.upper is not None


def _process(plan: cp.Plan) -> dict[str, Any]:
    ids = plan.id_map
    joined = "user" in plan.namespaces
    uid, gid = (ids.init_uid, ids.init_uid) if joined else (ids.host_uid + ids.init_uid, ids.host_gid + ids.init_uid)
    capabilities = {name: list(_CAPABILITIES) for name in ("bounding", "effective", "permitted")}
    if uid != 0:  # execve(2) leaves capabilities to another id only by way of the ambient set, capabilities(7)
        capabilities |= {name: list(_CAPABILITIES) for name in ("inheritable", "ambient")}
    return {
        "terminal": False,
        "user": {"uid": uid, "gid": gid},
        "args": [INIT_PATH, "serve", str(CONTROL_FD)],
        "env": [],
        "cwd": "/",
        "noNewPrivileges": True,
        "capabilities": capabilities,
    }


def oci_config(
    plan: cp.Plan, runtime: str, init: str, sources: Mapping[int, str] = MappingProxyType({})
) -> dict[str, Any]:
    """`config.json` of the cell of `plan` for `runtime` (runc, crun, runsc); `init` is aether-init on the host.

    `sources` maps the index of a bind to where its source is shown instead; else it is the plan's. `rootfs` beside
    it must hold the SKELETON and the mount points. Raises PlanError for what the runtime cannot do.
    """
    check_bundle(plan, runtime)
    linux: dict[str, Any] = {
        "namespaces": [{"type": _NAMESPACES[name]} for name in plan.namespaces],
        "maskedPaths": [path for step in plan.steps if isinstance(step, cp.Mask) for path in step.paths],
        "rootfsPropagation": "private",
        "seccomp": oci_seccomp(plan.seccomp_profile),
    }
    ids = plan.id_map
    if "user" in plan.namespaces:
        linux["uidMappings"] = [{"containerID": 0, "hostID": ids.host_uid, "size": ids.count}]
        linux["gidMappings"] = [{"containerID": 0, "hostID": ids.host_gid, "size": ids.count}]
    config: dict[str, Any] = {
        "ociVersion": OCI_VERSION,
        "root": {"path": "rootfs", "readonly": not any(_keeps_changes(step) for step in plan.steps)},
        "process": _process(plan),
        "mounts": [mount for i, step in enumerate(plan.steps) for mount in _mounts_of(step, sources.get(i))],
        "linux": linux,
    }
    if runtime == "runsc":  # its /dev refuses writes to the devices themselves when it is read-only
        dev = next(mount for mount in config["mounts"] if mount["destination"] == "/dev")
        dev["options"].remove("ro")
    config["mounts"].append(_mount(INIT_PATH, "bind", init, "bind", "ro", "nosuid", "nodev"))
    if "uts" in plan.namespaces:
        config["hostname"] = plan.hostname
    return config
