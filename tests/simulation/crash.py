"""Kill roles with SIGKILL at random points under load; afterwards nothing may be lost, doubled or left.

    python -m tests.simulation.crash --seed 7 --kills 200

Submitters send command and model jobs with idempotency keys and repeat a submission whose answer was lost; a
killer picks roles and moments from the seed. At the end every accepted job must be terminal with an end that can
be true, every job that the log admitted must have an outcome, no job may have started or ended twice, no key may
stand for two jobs, every receipt and the log must verify, results must be there, and the machine must be clean.
Prints `accepted=N terminal=N duplicate=0 orphan=0 unverified=0` and exits 0 if that is so.

Cells survive the death of aetherd (the spawner keeps exit statuses), of aurorad (but for model runtimes, whose
channel it held) and of the keeper (output waits in the pipe). They die with the spawner (PDEATHSIG): commands
that ran then end `lost`, or `failed` by a signal. The runtime `cfcd` takes what it was computing with it: those
jobs fail with ENGINE_DIED unless they can be computed again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
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
from aether.contract.jobs import TERMINAL, JobRequest, JobState, JobView
from aether.contract.paths import Layout
from aether.daemons import control
from bench.sample import MODEL
from tests.simulation import evidence
from tests.support import machine
from tests.support.instance import instance_marks, leftovers, role_pid

SUBMITTERS = 6
SETTLE_S = 60.0
VICTIMS = ("aetherd",) * 3 + ("aurorad",) * 3 + ("spawner", "keeper", "cfcd") * 2
"""One round of deaths; the seed shuffles each round, so that every role gets its share."""
VICTIM_WAIT_S = 15.0
RETRIED = frozenset({"UNAVAILABLE", "UNREACHABLE", "BUSY", "PROTOCOL", "DRAINING", "ENGINE_DIED", "INTERNAL"})


@dataclass(frozen=True, slots=True)
class Task:
    """A request and the exit code that it is due to end with."""

    request: JobRequest
    exit_code: int = 0


@dataclass(slots=True)
class Seen:
    """What the submitters were told, and what went wrong meanwhile."""

    accepted: dict[str, Task] = field(default_factory=dict)
    unreleased: set[str] = field(default_factory=set)
    """Jobs that a repeated submission found succeeded, their answer never released and its bytes lost in the crash."""
    keys: dict[str, str] = field(default_factory=dict)
    doubled: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)

    def accept(self, job_id: str, key: str, task: Task) -> None:
        with self.lock:
            first = self.keys.setdefault(key, job_id)
            if first != job_id:
                self.doubled.append(f"{key}: {first} and {job_id}")
            self.accepted[job_id] = task


def tasks(rng: random.Random) -> Iterator[Task]:
    """An endless mix of jobs."""
    while True:
        kind = rng.random()
        if kind < 0.35:
            yield Task(JobRequest(kind="command", op="run", params={"argv": ["/bin/true"]}))
        elif kind < 0.6:
            code = rng.choice((0, 0, 3))
            argv = ["/bin/sh", "-c", f"sleep {rng.uniform(0, 0.4):.2f}; echo out > out.txt; exit {code}"]
            yield Task(JobRequest(kind="command", op="run", params={"argv": argv, "outputs": ["*.txt"]}), code)
        else:
            obs = [[rng.uniform(-1, 1), rng.uniform(-1, 1)] for _ in range(4)]
            history = {"obs": obs, "action": [[0.0]] * 3, "dt": [0.05] * 3}
            params = {"model": MODEL, "horizons_s": [0.1]}
            inputs = {"history": history, "action": [0.0]}
            yield Task(JobRequest(kind="model", op="predict_next_state", params=params, inputs=inputs))


def submitter(layout: Layout, seed: int, seen: Seen) -> None:
    """Submits until told to stop."""
    rng = random.Random(seed)
    try:
        with Client(state=layout.root, timeout_s=20) as client:
            for number, task in enumerate(tasks(rng)):
                wait_s = 5.0 if task.request.kind == "model" and rng.random() < 0.5 else 0.0
                if not submit(client, task, f"crash-{seed}-{number}", wait_s, seen):
                    return
                time.sleep(rng.uniform(0, 0.05))
    except Exception as error:
        seen.problems.append(f"submitter {seed}: {type(error).__name__}: {error}")


def submit(client: Client, task: Task, key: str, wait_s: float, seen: Seen) -> bool:
    """Repeats a submission with its key until it is answered; False when it is time to stop."""
    while not seen.stop.is_set():
        try:
            answer = client.submit(task.request, wait_s=wait_s, idempotency_key=key)
            if answer.kind == "model" and answer.state is JobState.SUCCEEDED and answer.result is None:
                seen.unreleased.add(answer.job_id)
            seen.accept(answer.job_id, key, task)
            return True
        except AetherError as error:
            job_id = error.details.get("job_id")
            if isinstance(job_id, str) and job_id.startswith(JOB):
                seen.accept(job_id, key, task)  # refused after it was recorded: it must still be terminal
                return True
            if error.code not in RETRIED:
                raise
            time.sleep(0.02)
    return False


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


def strike(layout: Layout, name: str) -> bool:
    """SIGKILL to the one process that has the role now; False when there is none."""
    pid = victim_pid(layout, name)
    if pid is None:
        return False
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if victim_pid(layout, name) != pid:
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)


def killer(layout: Layout, seed: int, kills: int, seen: Seen) -> None:
    """`kills` deaths in the order and, as far as the machine allows, at the moments that the seed chooses.

    Half of the deaths follow closely upon the one before; the others find an instance that works again.
    """
    rng = random.Random(seed)
    told = time.monotonic()
    while seen.kills.total() < kills:
        for name in rng.sample(VICTIMS, len(VICTIMS))[: kills - seen.kills.total()]:
            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, 0.3))
            else:
                until_accepted(seen, 5, 6.0)
                time.sleep(rng.uniform(0, 0.5))
            deadline = time.monotonic() + VICTIM_WAIT_S
            while not strike(layout, name):
                if time.monotonic() > deadline:
                    seen.problems.append(f"{name} did not come back within {VICTIM_WAIT_S:.0f} s")
                    break
                time.sleep(0.01)
            else:
                seen.kills[name] += 1
            told = tell(seen, kills, told)


def until_accepted(seen: Seen, more: int, within_s: float) -> None:
    """Until `more` jobs were accepted, or the time is over."""
    wanted = len(seen.accepted) + more
    deadline = time.monotonic() + within_s
    while len(seen.accepted) < wanted and time.monotonic() < deadline:
        time.sleep(0.02)


def tell(seen: Seen, kills: int, told: float) -> float:
    """Progress on stderr: on a terminal every 3 s, else every 20 deaths. Returns when it was told last."""
    due = time.monotonic() - told > 3 if sys.stderr.isatty() else seen.kills.total() % 20 == 0
    if not due:
        return told
    print(f"killed {seen.kills.total()} of {kills}, accepted {len(seen.accepted)}", file=sys.stderr, flush=True)
    return time.monotonic()


def settle(client: Client, seen: Seen) -> dict[str, JobView]:
    """Waits until nothing is open; returns the final views of the accepted jobs that have one."""
    final: dict[str, JobView] = {}
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(AetherError):
            for job_id in seen.accepted.keys() - final.keys():
                view = client.get(job_id)
                if view.state in TERMINAL and view.outcome_index is not None:
                    final[job_id] = view
            still = client.list(states=(JobState.QUEUED, JobState.RUNNING)).jobs
            if len(final) == len(seen.accepted) and not still:
                break
        time.sleep(0.2)
    return final


def simulate(layout: Layout, seed: int, kills: int, seen: Seen) -> None:
    """The load and the deaths."""
    threads = [
        threading.Thread(target=submitter, args=(layout, seed * 1000 + number, seen), daemon=True)
        for number in range(SUBMITTERS)
    ]
    for thread in threads:
        thread.start()
    try:
        killer(layout, seed, kills, seen)
    finally:
        seen.stop.set()
        for thread in threads:
            thread.join(60)
    if any(thread.is_alive() for thread in threads):
        seen.problems.append("a submitter hangs")


def judge(layout: Layout, seen: Seen) -> bool:
    """Looks at all that is left, stops the instance, and prints what was found; whether nothing is wrong."""
    problems = seen.problems
    with Client(state=layout.root) as client:
        final = settle(client, seen)
        bad = evidence.unproved(client, layout.audit_public_key.read_text(), final, seen.unreleased)
    for job_id, view in sorted(final.items()):
        task = seen.accepted[job_id]
        if (why := evidence.wrong(view, task.request, task.exit_code)) is not None:
            problems.append(f"{job_id}: {why}")
    marks = instance_marks(layout)
    control.down(layout.root)
    bad += evidence.log_problems(layout)
    doubled = evidence.duplicates(layout) + seen.doubled
    left = leftovers(layout, marks)
    lost = [f"not terminal: {job_id}" for job_id in sorted(seen.accepted.keys() - final.keys())]
    problems += [f"no outcome: {job_id}" for job_id in evidence.unfinished(layout)]
    for line in (*lost, *problems, *bad, *doubled, *left)[:20]:
        print(line)
    states = Counter(str(view.state) for view in final.values())
    print("kills: " + " ".join(f"{name}={seen.kills[name]}" for name in sorted(set(VICTIMS))))
    print("ended: " + " ".join(f"{name}={number}" for name, number in sorted(states.items())))
    print(
        f"accepted={len(seen.accepted)} terminal={len(final)} duplicate={len(doubled)} "
        f"orphan={len(left)} unverified={len(bad)}"
    )
    return bool(seen.accepted) and not (lost or problems or bad or doubled or left)


def run(seed: int, kills: int) -> bool:
    """One simulation; prints its lines and returns whether it holds. AETHER_KEEP_STATE keeps a bad one's state."""
    state = Path(tempfile.mkdtemp(prefix="aether-crash-"))
    layout = Layout(state)
    seen = Seen()
    good = False
    try:
        control.ensure_running(state, lambda text: None)
        simulate(layout, seed, kills, seen)
        good = judge(layout, seen)
        return good
    finally:
        with contextlib.suppress(Exception):
            control.down(state)
        if good or os.environ.get("AETHER_KEEP_STATE") is None:
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
