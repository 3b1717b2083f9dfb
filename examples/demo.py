"""`make demo`: the main job on real input, in three scenes: the intruder, the model, the proof.

Starts an instance of its own in a temporary directory, runs everything through the public API, and removes it
at the end. What this machine cannot enforce is said first, with how to get it; an attempt of the intruder that
nothing here can prevent is shown as not prevented. Exits 1 when a promise broke that this machine can keep.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aether.client import Client
from aether.contract.cells import Limits, SandboxReport
from aether.contract.errors import AetherError
from aether.contract.jobs import CommandParams, JobState, JobView
from aether.contract.limits import MIB
from aether.contract.paths import Layout
from aether.contract.records import Record
from aether.daemons import control
from aether.worldmodel import data
from examples import plot

SEED = 20_26
MODEL = "pendulum"
HISTORY = 24
console = Console(highlight=False)
broken: list[str] = []


def expect(holds: bool, promise: str) -> None:
    """Notes a promise that does not hold; the demo goes on and fails at the end."""
    if not holds:
        broken.append(promise)
        console.print(f"  [bold red]broken:[/] {promise}")


@contextlib.contextmanager
def instance() -> Iterator[Layout]:
    """An instance in a temporary state directory, stopped and removed at the end."""
    state = Path(tempfile.mkdtemp(prefix="aether-demo-"))
    try:
        start = time.perf_counter()
        control.ensure_running(state, lambda text: None)
        console.print(
            f"An instance is up after {time.perf_counter() - start:.1f} s (spawner, keeper, aetherd, aurorad)."
        )
        yield Layout(state)
    finally:
        with contextlib.suppress(AetherError):
            control.down(state)
        shutil.rmtree(state, ignore_errors=True)


# ---- what this machine can do


def host(client: Client) -> set[str]:
    """Says what is missing here and how to get it; returns the names of what is missing."""
    missing = [check for check in client.doctor().checks if not check["ok"]]
    reasons: dict[tuple[str, str], list[str]] = {}
    for check in missing:
        reasons.setdefault((str(check["reason"]), str(check.get("remedy") or "")), []).append(str(check["name"]))
    for (reason, remedy), names in reasons.items():
        console.print(f"  [yellow]missing[/] {', '.join(names)}: {reason}")
        if remedy:
            console.print(f"          {remedy}")
    if not missing:
        console.print("This machine can enforce everything that a cell asks for.")
    if "cell" in client.explain(CommandParams(argv=("true",))).missing:
        console.print("Cells get the level `process` here: Landlock, seccomp and rlimits, no namespaces of their own.")
    return {str(check["name"]) for check in missing}


# ---- scene 1


@dataclass(frozen=True, slots=True)
class Attempt:
    """What the intruder tries. `stopped_by` are mechanisms of which one is enough; empty: every machine has some."""

    title: str
    words: tuple[str, ...]
    stopped_by: frozenset[str] = frozenset()
    timeout_ms: int = 20_000

    @property
    def limits(self) -> Limits:
        return Limits(memory_bytes=64 * MIB, pids=32, timeout_ms=self.timeout_ms, grace_ms=200)


def attempts(secret: Path, port: int) -> list[Attempt]:
    return [
        Attempt("read the planted secret", ("secret", str(secret)), frozenset({"mountns", "landlock"})),
        Attempt("see other processes", ("processes",), frozenset({"pidns"})),
        Attempt("reach the network", ("network", str(port)), frozenset({"netns", "seccomp"})),
        Attempt("fork without end", ("forks",)),
        Attempt("eat memory", ("memory",)),
        Attempt("flood stdout", ("flood",), timeout_ms=2_000),
    ]


def intruder(client: Client, missing: set[str]) -> str:
    """An untrusted script tries what it must not do; one cell per attempt. Returns the first attempt's job id."""
    console.rule("[bold]1. The intruder")
    console.print("An untrusted script, one cell per attempt:")
    script = {"intruder.py": Path(__file__).with_name("intruder.py")}
    planted = Path(tempfile.mkdtemp(prefix=".aether-demo-", dir=Path.home())) / "secret"
    planted.write_text("hunter2\n")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, planted.parent)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        jobs = [
            (attempt, client.run(["python3", "intruder.py", *attempt.words], files=script, limits=attempt.limits))
            for attempt in attempts(planted, listener.getsockname()[1])
        ]
    logs = {job.job_id: b"".join(client.logs(job.job_id)) for _, job in jobs}
    console.print(_table(jobs, logs))
    console.print(f"The kernel enforced, says the receipt: {_enforced(client, jobs[0][1].job_id)}.")
    for attempt, job in jobs:
        if job.state is JobState.SUCCEEDED and attempt.stopped_by and attempt.stopped_by <= missing:
            needed = " or ".join(sorted(attempt.stopped_by))
            console.print(f"  [yellow]not prevented here:[/] {attempt.title}; it takes {needed}")
            continue
        stopped = job.state in (JobState.FAILED, JobState.TIMED_OUT)
        expect(stopped, f"the intruder cannot {attempt.title}")
        expect(not stopped or b"hunter2" not in logs[job.job_id], "the secret is not in any output")
    return jobs[0][1].job_id


def _table(jobs: list[tuple[Attempt, JobView]], logs: dict[str, bytes]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("attempt", "stopped", "what it met"):
        table.add_column(name, no_wrap=name == "attempt")
    table.add_column("ended", no_wrap=True)
    for name in ("CPU", "memory", "output kept"):
        table.add_column(name, justify="right", no_wrap=True)
    for attempt, job in jobs:
        usage, succeeded = job.usage, job.state is JobState.SUCCEEDED
        table.add_row(
            attempt.title,
            "[bold red]NO[/]" if succeeded else "yes",
            _met(job, logs[job.job_id]),
            f"signal {job.signal}" if job.exit_code is None else f"exit {job.exit_code}",
            _cpu(job),
            _mib(usage.memory_peak_bytes if usage else None),
            _kept(job),
        )
    if any(job.usage is None or job.usage.memory_peak_bytes is None for _, job in jobs):
        table.caption = "- is not measured here"
    return table


def _met(job: JobView, log: bytes) -> str:
    """In a line, how it ended: the kernel's doing, or the last thing that the script said."""
    if job.usage is not None and (job.usage.oom_kills or (job.error and job.error.code == "OUT_OF_MEMORY")):
        return "killed: out of its memory"
    if job.state is JobState.TIMED_OUT:
        return "its pipe was full, its time over"
    lines = log.decode(errors="replace").strip().splitlines()
    return escape(lines[-1][:60]) if lines else f"exit {job.exit_code}, signal {job.signal}"


def _enforced(client: Client, job_id: str) -> str:
    """The sandbox report that the receipt of a job carries, in a line."""
    receipt = client.receipt(job_id)
    outcome = msgspec.json.decode(receipt.entries[-1].entry, type=Record)
    assert outcome.code is not None and outcome.code.sandbox_digest is not None
    report = msgspec.json.decode(receipt.documents[outcome.code.sandbox_digest], type=SandboxReport)
    return f"level {report.level} ({', '.join(name for name, seen in sorted(report.enforced.items()) if seen)})"


def _kept(job: JobView) -> str:
    if job.usage is None or not job.usage.output_dropped_bytes or job.usage.stdout_bytes is None:
        return "all"
    kept = job.usage.stdout_bytes - job.usage.output_dropped_bytes
    return f"{kept / MIB:.0f} of {job.usage.stdout_bytes / MIB:.0f} MiB"


def _cpu(job: JobView) -> str:
    if job.usage is None or job.usage.cpu_user_us is None:
        return "-"
    return f"{(job.usage.cpu_user_us + (job.usage.cpu_system_us or 0)) / 1000:.0f} ms"


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / MIB:.1f} MiB"


# ---- scene 2


def forecast(client: Client) -> None:
    """One forecast per irregular step of a trajectory that the model never saw; each is an audited job."""
    console.rule("[bold]2. The model")
    seen = data.generate(1, HISTORY + 48, SEED, stream=9)
    obs, action, dt = seen.obs[0], seen.action[0], seen.dt[0]
    steps = range(HISTORY, len(dt))
    start = time.perf_counter()
    rows = [
        client.predict(
            MODEL,
            {"obs": obs[: k + 1].tolist(), "action": action[:k].tolist(), "dt": dt[:k].tolist()},
            [float(dt[k])],
            action=action[k].tolist(),
        )["predictions"][0]
        for k in steps
    ]
    elapsed = time.perf_counter() - start
    t = [float(seen.t[0][k + 1]) for k in steps]
    truth = np.array([seen.clean[0][k + 1] for k in steps])
    mean = np.array([row["mean"] for row in rows])
    interval = np.array([row["interval90"] for row in rows])
    console.print(
        f"A CfC-JEPA package in cfcd, in a cell without network, forecasts a held-out pendulum (position only, noisy):"
        f" {len(rows)} audited jobs in {elapsed:.2f} s."
    )
    lines = plot.band(
        t,
        truth[:, 0].tolist(),
        mean[:, 0].tolist(),
        interval[:, 0, 0].tolist(),
        interval[:, 0, 1].tolist(),
        width=min(76, console.width - 9),
    )
    console.print("cos θ:  ◉ forecast on truth   · forecast   o truth   ░ 90% interval")
    console.print("\n".join(lines))
    before = np.array([obs[k] for k in steps])
    error, persistence = float(((mean - truth) ** 2).mean()), float(((before - truth) ** 2).mean())
    inside = float(((truth >= interval[..., 0]) & (truth <= interval[..., 1])).mean())
    console.print(
        f"Mean squared error {error:.5f}; persistence {persistence:.5f} ({persistence / error:.0f} times as much)."
    )
    console.print(f"The truth lies in the 90% interval in {inside:.0%} of the steps.")
    expect(error < persistence / 10, "the forecast beats persistence by far")


def surprise(client: Client) -> str:
    """The surprise rises where a fault was injected. Returns the job's id."""
    faulty = data.generate(1, 64, SEED + 1, stream=9, fault="spike")
    at = int(faulty.fault_step[0])
    obs, action, t = faulty.obs[0].tolist(), faulty.action[0].tolist(), faulty.t[0].tolist()
    result = client.score(MODEL, {"t": t, "obs": obs, "action": action})
    values = result["surprise"]
    peak = int(np.argmax(values[8:])) + 8
    console.print(
        f"\nThe same plant, its sensor with one spike: surprise per step (peak at {peak}, spike in observation {at})."
    )
    console.print("\n".join(plot.bars(values, mark=at - 1, ceiling=max(values))))
    alarm = "alarm" if result["seq_score"] > result["threshold"] else "no alarm"
    console.print(f"Sequence score {result['seq_score']:.1f}, alarm level {result['threshold']:.1f}: {alarm}.")
    expect(abs(peak + 1 - at) <= 2, "the surprise peaks where the fault was injected")
    return client.list(limit=1).jobs[0].job_id


# ---- scene 3


def proof(client: Client, layout: Layout, jobs: dict[str, str]) -> None:
    """Receipts verify offline; a copy of the log with one changed byte does not."""
    console.rule("[bold]3. The proof")
    with tempfile.TemporaryDirectory(prefix="aether-demo-") as away:
        key = shutil.copy(layout.audit_public_key, away)
        for name, job_id in jobs.items():
            path = Path(away) / f"{name}.receipt.json"
            path.write_bytes(client.receipt_bytes(job_id))
            expect(_aether("verify", str(path), "--key", key) == 0, f"the {name} receipt verifies")
        time.sleep(1.2)  # the published checkpoint is at most a second old
        copy = shutil.copytree(layout.audit, Path(away) / "audit", ignore=shutil.ignore_patterns("lock"))
        expect(_aether("audit", "verify", str(copy), "--key", key) == 0, "the log verifies")
        segment = next((copy / "segments").glob("0*"))
        damaged = bytearray(segment.read_bytes())
        at = damaged.index(b'"job.outcome"')
        damaged[at + 1] ^= 0x01
        segment.write_bytes(damaged)
        console.print(f"\nNow one byte of the copy is changed, at offset {at + 1} of {segment.name}:")
        expect(_aether("audit", "verify", str(copy), "--key", key) != 0, "the changed log does not verify")


def _aether(*words: str) -> int:
    shown = " ".join(word if len(word) < 60 else "…" + word[-40:] for word in words)
    console.print(f"[dim]$ aether {shown}[/]", soft_wrap=True)
    return subprocess.run([Path(sys.executable).with_name("aether"), *words], check=False).returncode


def model(client: Client) -> dict[str, str]:
    """The model's scene; a refusal is a broken promise, on any machine. Returns the job to prove, by name."""
    try:
        forecast(client)
        return {"model": surprise(client)}
    except AetherError as error:
        expect(False, f"the model answers ({escape(str(error))})")
        return {}


def main() -> int:
    start = time.perf_counter()
    with instance() as layout, Client(state=layout.root) as client:
        missing = host(client)
        jobs = {"intruder": intruder(client, missing)}
        proof(client, layout, jobs | model(client))
    console.rule()
    held = "every promise held" + (" that does not need what is missing here" if missing else "")
    verdict = held if not broken else f"[bold red]{len(broken)} promises broke[/]"
    console.print(f"Done in {time.perf_counter() - start:.0f} s: {verdict}.")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
