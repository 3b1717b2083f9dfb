"""Kill roles with SIGKILL at random points under load; afterwards nothing may be lost, doubled or left.

    python -m tests.simulation.crash --seed 7 --kills 200

Submitters send command and model jobs with idempotency keys and repeat a submission whose answer was lost; a
killer picks a role and a moment from the seed. At the end every accepted job must be terminal, no job may have
started or ended twice, no key may stand for two jobs, every receipt must verify, the log must verify, and the
machine must be clean. Prints `accepted=N terminal=N duplicate=0 orphan=0 unverified=0` and exits 0 if that is so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from aether.client import Client
from aether.contract.errors import AetherError
from aether.contract.ids import JOB
from aether.contract.jobs import TERMINAL, JobRequest
from aether.contract.paths import Layout
from aether.contract.records import Record
from aether.daemons import control
from aether.substrate.audit import entry, segments
from aether.substrate.audit.verify import verify_log, verify_receipt
from bench.sample import MODEL
from tests.support import machine
from tests.support.instance import instance_marks, leftovers, role_pid

SUBMITTERS = 6
SETTLE_S = 90.0
VICTIMS = ("aetherd", "aurorad", "aetherd", "aurorad", "spawner", "keeper", "cfcd")
RETRIED = frozenset({"UNAVAILABLE", "UNREACHABLE", "BUSY", "PROTOCOL", "DRAINING", "ENGINE_DIED", "INTERNAL"})


@dataclass(slots=True)
class Seen:
    """What the submitters were told."""

    accepted: dict[str, str] = field(default_factory=dict)
    """job id -> idempotency key"""
    conflicts: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)

    def accept(self, job_id: str, key: str) -> None:
        with self.lock:
            self.conflicts += any(k == key and j != job_id for j, k in self.accepted.items())
            self.accepted[job_id] = key


def requests(rng: random.Random) -> Iterator[JobRequest]:
    """An endless mix of jobs."""
    while True:
        kind = rng.random()
        if kind < 0.35:
            yield JobRequest(kind="command", op="run", params={"argv": ["/bin/true"]})
        elif kind < 0.6:
            argv = [
                "/bin/sh",
                "-c",
                f"sleep {rng.uniform(0, 0.4):.2f}; echo out > out.txt; exit {rng.choice((0, 0, 3))}",
            ]
            yield JobRequest(kind="command", op="run", params={"argv": argv, "outputs": ["*.txt"]})
        else:
            obs = [[rng.uniform(-1, 1), rng.uniform(-1, 1)] for _ in range(4)]
            history = {"obs": obs, "action": [[0.0]] * 3, "dt": [0.05] * 3}
            inputs = {"history": history, "action": [0.0]}
            yield JobRequest(
                kind="model",
                op="predict_next_state",
                params={"model": MODEL, "horizons_s": [0.1]},
                inputs=inputs,
            )


def submitter(layout: Layout, seed: int, seen: Seen) -> None:
    """Submits until told to stop; a submission is repeated with its key until it is answered."""
    rng = random.Random(seed)
    with Client(state=layout.root, timeout_s=20) as client:
        for number, request in enumerate(requests(rng)):
            if seen.stop.is_set():
                return
            key = f"crash-{seed}-{number}"
            wait_s = 5.0 if request.kind == "model" and rng.random() < 0.5 else 0.0
            while True:
                try:
                    seen.accept(client.submit(request, wait_s=wait_s, idempotency_key=key).job_id, key)
                    break
                except AetherError as error:
                    job_id = error.details.get("job_id")
                    if isinstance(job_id, str) and job_id.startswith(JOB):
                        seen.accept(job_id, key)  # refused after it was recorded: it must still be terminal
                        break
                    if error.code not in RETRIED:
                        raise
                    if seen.stop.is_set():
                        return
                    time.sleep(0.02)


def victim_pid(layout: Layout, name: str) -> int | None:
    """The pid of a role, of the keeper, or of the model runtime inside its cell."""
    if name in ("aetherd", "aurorad", "spawner"):
        return role_pid(layout, name)
    spawner = role_pid(layout, "spawner")
    if spawner is None:
        return None
    wanted = "aether.runtime.cfcd" if name == "cfcd" else "keeper"
    for pid in machine.family(spawner)[1:]:
        if any(wanted in word for word in machine.argv_of(pid)):
            return pid
    return None


def killer(layout: Layout, seed: int, kills: int, seen: Seen) -> None:
    """SIGKILL, `kills` times, at moments that the seed chooses."""
    rng = random.Random(seed)
    while seen.kills.total() < kills:
        time.sleep(rng.uniform(0.0, 0.3))
        name = rng.choice(VICTIMS)
        pid = victim_pid(layout, name)
        if pid is None:
            continue
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                if victim_pid(layout, name) == pid:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    seen.kills[name] += 1
            finally:
                os.close(pidfd)


def settle(layout: Layout, accepted: list[str]) -> set[str]:
    """Waits until every accepted job is terminal; returns those that are."""
    terminal: set[str] = set()
    deadline = time.monotonic() + SETTLE_S
    with Client(state=layout.root) as client:
        while len(terminal) < len(accepted) and time.monotonic() < deadline:
            for job_id in accepted:
                if job_id in terminal:
                    continue
                with contextlib.suppress(AetherError):
                    if client.get(job_id).state in TERMINAL:
                        terminal.add(job_id)
            time.sleep(0.2)
    return terminal


def unverified(layout: Layout, terminal: set[str]) -> int:
    """Receipts and logs that do not verify."""
    key = layout.audit_public_key.read_text()
    bad = 0
    with Client(state=layout.root) as client:
        for job_id in sorted(terminal):
            report = verify_receipt(client.receipt_bytes(job_id), key)
            if not report.ok:
                print(f"receipt of {job_id}: {report.problems[:3]}")
                bad += 1
    return bad


def records(layout: Layout) -> Iterator[Record]:
    """Every record of the log, in order."""
    for path in sorted((layout.audit / "segments").glob("0*")):
        content = path.read_bytes()
        first = int(path.name)
        header = segments.check_header(content, first, read_origin(layout))
        for frame in segments.scan(content, header, first):
            for text in frame.entries:
                yield entry.decode(text)


def read_origin(layout: Layout) -> str:
    return layout.audit_public_key.read_text().split("+")[0]


def duplicates(layout: Layout) -> int:
    """Jobs with more than one intent, start or outcome, and jobs that share an idempotency key."""
    count: Counter[tuple[str, str]] = Counter()
    keys: dict[str, str] = {}
    doubled = 0
    for record in records(layout):
        if record.job_id is None or record.type == "job.stop":
            continue
        count[(record.job_id, record.type)] += 1
        if record.type == "job.intent" and record.idempotency_hash is not None:
            doubled += keys.setdefault(record.idempotency_hash, record.job_id) != record.job_id
    return doubled + sum(number - 1 for number in count.values())


def run(seed: int, kills: int) -> bool:
    """One simulation; prints its line and returns whether it holds."""
    state = Path(tempfile.mkdtemp(prefix="aether-crash-"))
    layout = Layout(state)
    seen = Seen()
    try:
        control.ensure_running(state, lambda text: None)
        threads = [
            threading.Thread(target=submitter, args=(layout, seed * 1000 + number, seen), daemon=True)
            for number in range(SUBMITTERS)
        ]
        for thread in threads:
            thread.start()
        killer(layout, seed, kills, seen)
        seen.stop.set()
        for thread in threads:
            thread.join(60)
        terminal = settle(layout, sorted(seen.accepted))
        bad = unverified(layout, terminal)
        marks = instance_marks(layout)
        control.down(state)
        log = verify_log(layout.audit, layout.audit_public_key.read_text())
        bad += not log.ok
        for problem in log.problems[:5]:
            print(problem)
        doubled = duplicates(layout) + seen.conflicts
        left = leftovers(layout, marks)
        for line in left[:10]:
            print(line)
        for job_id in sorted(set(seen.accepted) - terminal)[:10]:
            print(f"not terminal: {job_id}")
        print("kills: " + " ".join(f"{name}={number}" for name, number in sorted(seen.kills.items())))
        print(
            f"accepted={len(seen.accepted)} terminal={len(terminal)} duplicate={doubled} "
            f"orphan={len(left)} unverified={bad}"
        )
        return len(terminal) == len(seen.accepted) > 0 and not (doubled or left or bad)
    finally:
        seen.stop.set()
        with contextlib.suppress(Exception):
            control.down(state)
        if os.environ.get("AETHER_KEEP_STATE") is None:
            shutil.rmtree(state, ignore_errors=True)
        else:
            print(f"state kept in {state}")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--kills", type=int, default=200)
    asked = parser.parse_args()
    return 0 if run(asked.seed, asked.kills) else 1


if __name__ == "__main__":
    raise SystemExit(main())
