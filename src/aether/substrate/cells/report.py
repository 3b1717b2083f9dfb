"""From what the spawner saw to the types of the contract: sandbox report, exit status, usage. Pure."""

from __future__ import annotations

from typing import Any, Final

from aether.contract.cells import CellSpec, Contention, ExecEnd, ExitStatus, SandboxReport, Usage
from aether.contract.errors import AetherError
from aether.substrate.cells.facts import LIMIT_WORDS, NAMESPACE_WORDS

_FIGURES: Final = (
    "wall_us", "cpu_user_us", "cpu_system_us", "memory_peak_bytes", "io_read_bytes", "io_write_bytes", "pids_peak",
    "oom_kills", "throttled_us", "stdout_bytes", "stderr_bytes", "output_dropped_bytes",
)  # fmt: skip
_SECCOMP_FILTER: Final = 2


def sandbox_report(seen: dict[str, Any], missing: dict[str, str], uid: int, plan_digest: str) -> SandboxReport:
    """`seen` is the spawner's report of a running cell. A mechanism is enforced only if the kernel showed it."""
    enforced: dict[str, Any] = {NAMESPACE_WORDS[name]: True for name in seen.get("namespaces", {})}
    process = seen.get("process")
    if process is not None:
        if process["seccomp_mode"] == _SECCOMP_FILTER:
            enforced["seccomp"] = seen["seccomp_profile"]
        if process["no_new_privs"]:
            enforced["no_new_privs"] = True
        if not any(process[f"cap_{name}"] for name in ("effective", "permitted", "inheritable", "bounding")):
            enforced["no_capabilities"] = True
    if seen.get("landlock_abi"):
        enforced["landlock"] = seen["landlock_abi"]
    if seen.get("sched"):
        enforced["sched"] = seen["sched"]
    for limit, source in seen.get("limits", {}).items():
        enforced[LIMIT_WORDS.get(limit, limit)] = source
    driver = seen.get("driver", "native")
    enforced[driver] = True if driver == "native" else seen["executor"]
    if "sandbox" in seen:
        _sandboxed(enforced, seen["sandbox"], missing)
    if seen.get("level") != "process" and "pidns" in enforced and "mountns" in enforced:
        enforced["cell"] = True
    absent = {name: reason for name, reason in missing.items() if name not in enforced}
    return SandboxReport(
        level=seen.get("level", "process"),
        executor=seen.get("executor", ""),
        enforced=enforced,
        missing=absent,
        uid=uid,
        plan_digest=plan_digest,
    )


def _sandboxed(enforced: dict[str, Any], sandbox: dict[str, Any], missing: dict[str, str]) -> None:
    """A cell in gVisor's kernel: the sandbox is what the host's kernel confines; inside, the word is gVisor's own."""
    if sandbox["seccomp"] and {"userns", "mountns", "netns"} <= enforced.keys():
        enforced["gvisor"] = True
    if "pid" in sandbox["namespaces"]:
        enforced["pidns"] = "gvisor"
    for name in missing.keys() & enforced.keys():
        del enforced[name]


def verify_required(spec: CellSpec, report: SandboxReport) -> None:
    """After the start: raises LEVEL_UNMET when a required mechanism was not seen; the caller kills the cell."""
    for word in spec.require:
        if word != "process" and word not in report.enforced:
            why = report.missing.get(word, "the kernel did not show it")
            raise AetherError("LEVEL_UNMET", f"cannot meet the required level {word}: {why}")


def usage_of(view: dict[str, Any] | None) -> Usage:
    """The spawner's usage as the contract's; each figure that is there was measured, but one whose source is the
    cell around an executable, which is that of all its executables."""
    figures = {name: (view or {}).get(name) for name in _FIGURES}
    sources = (view or {}).get("sources", {})
    basis = {
        name: "apportioned" if sources.get(name) == "cell" else "measured"
        for name, value in figures.items()
        if value is not None
    }
    return Usage(**figures, basis=basis)


def contention_of(view: dict[str, Any]) -> Contention:
    """What the spawner's usage says of waiting; a cell that is gone has none."""
    return Contention(
        throttled_count=view.get("throttled_count"),
        memory_events=view.get("memory_events") or {},
        pressure=view.get("pressure") or {},
    )


def end_of(cell_id: str, view: dict[str, Any]) -> ExecEnd:
    """An ended executable of `cell.list` or `exec.exited`."""
    status = ExitStatus(
        code=view["code"],
        signal=view["signal"],
        oom_killed=view["oom"],
        timed_out=view["timed_out"],
        reason=view["reason"],
    )
    return ExecEnd(cell_id=cell_id, exec_id=view["exec"], exit=status, usage=usage_of(view["usage"]))
