"""The roles in one process, through the codec: deaths of either side between any two steps of the link, from a seed.

Nothing that was accepted is lost, nothing runs or ends twice, whichever side dies at whichever step.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from aether.contract.calls import JobCall, SubmittedJob
from aether.contract.errors import AetherError
from aether.contract.jobs import TERMINAL, JobRequest, JobState
from aether.orchestrator.jobs.desk import REQUESTS_HELD_MAX
from aether.substrate.audit.verify import verify_receipt
from aether.substrate.cells.drivers.memory import Run
from aether.substrate.workers import WORKER_OP
from bench import sample
from tests.support.onenode import OneNode, caller, command

CLIENTS, JOBS_EACH, DEATHS = 4, 10, 6
AGAIN = frozenset({"UNAVAILABLE", "BUSY", "ENGINE_DIED", "INTERNAL"})
MODEL = msgspec.json.decode(sample.predict_request()[1], type=JobRequest)
PACKAGE = Path(__file__).parents[2] / "packages/pendulum"


class Trial:
    """One seed: clients, a killer, and what they saw."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.ran: Counter[str] = Counter()
        self.node = OneNode(directory, {"work": self.work}, models=True)
        self.accepted: dict[str, str] = {}
        self.deaths: list[str] = []
        self._step = asyncio.Event()
        self._until = 0
        self.node.on_step = self._stepped

    async def work(self, run: Run) -> int:
        """The one effect of a command job: it must not happen twice."""
        self.ran[run.spec.env["NAME"]] += 1
        await asyncio.sleep(float(run.spec.env["SECONDS"]))
        run.files["out.txt"] = run.spec.env["NAME"].encode()
        return int(run.spec.env["CODE"])

    def _stepped(self, name: str) -> None:
        self._until -= 1
        if self._until == 0:
            self._step.set()

    async def death(self) -> None:
        """Kills one side after a number of steps that the seed chooses, and brings it back."""
        self._step.clear()
        self._until = self.rng.randrange(1, 60)
        try:
            async with asyncio.timeout(0.5):
                await self._step.wait()
        except TimeoutError:
            pass  # nothing moves any more: as good a moment as any
        node, victim = self.node, self.rng.choice(("aetherd", "aurorad", "both", "spawner"))
        self.deaths.append(victim)
        if victim == "spawner":
            node.driver.die()
        if victim in ("aetherd", "both"):
            await node.kill_aetherd()
        if victim in ("aurorad", "both"):
            await node.kill_aurorad()
            await node.start_aurorad()
        if victim in ("aetherd", "both"):
            late = self.rng.random() < 0.5
            await node.start_aetherd(spawner=not late)
            if late:
                await asyncio.sleep(self.rng.uniform(0, 0.05))
                node.driver.start()

    def request(self, name: str, rng: random.Random) -> JobRequest:
        if rng.random() < 0.3:
            return MODEL
        env = {"NAME": name, "SECONDS": f"{rng.uniform(0, 0.05):.3f}", "CODE": rng.choice(("0", "0", "3"))}
        return command("work", env=env, outputs=["*.txt"])

    async def client(self, number: int) -> None:
        rng = random.Random(self.rng.random())
        for turn in range(JOBS_EACH):
            name = f"job-{number}-{turn}"
            request = self.request(name, rng)
            job = await self.submitted(request, name, rng.choice((0, 2_000)))
            self.accepted[job] = name if request.kind == "command" else ""

    async def submitted(self, request: JobRequest, key: str, wait_ms: int) -> str:
        """Repeats a submission with its key until it is answered."""
        while True:
            try:
                answer: SubmittedJob = await self.node.submit(request, caller(key=key), wait_ms)
                return answer.job_id
            except AetherError as error:
                if "job_id" in error.details:
                    return str(error.details["job_id"])
                if error.code not in AGAIN:
                    raise
            await asyncio.sleep(0.01)

    async def run(self) -> None:
        await self.node.start_aetherd()
        await self.node.start_aurorad()
        clients = [asyncio.ensure_future(self.client(number)) for number in range(CLIENTS)]
        for _ in range(DEATHS):
            await self.death()
        await asyncio.gather(*clients)
        await self.settled()

    async def settled(self) -> None:
        """Waits until every accepted job is terminal and its row says so."""
        await self.node.connected()
        for job_id in self.accepted:
            while True:
                try:
                    view = await self.node.view(job_id, wait_ms=1_000)
                    if view.state in TERMINAL and view.outcome_index is not None:
                        break
                except AetherError as error:
                    assert error.code in AGAIN, error
                await asyncio.sleep(0.01)

    async def judge(self) -> None:
        count: Counter[tuple[str, str]] = Counter()
        state: dict[str, str] = {}
        for record in await self.node.records():
            if record.job_id is not None and record.op != WORKER_OP:
                count[(record.job_id, record.type)] += 1
            if record.type == "job.outcome":
                state[record.job_id or ""] = record.state or ""
        assert {number for (_, kind), number in count.items() if kind != "job.stop"} == {1}
        intents = {job_id for job_id, kind in count if kind == "job.intent"}
        assert self.accepted.keys() <= intents <= state.keys()
        assert not [name for name, number in self.ran.items() if number > 1]
        public_key = self.node.layout.audit_public_key.read_text()
        for job_id, name in self.accepted.items():
            assert not name or self.ran[name] or state[job_id] in (JobState.FAILED, JobState.LOST)
            assert self.ran[name] == 1 or state[job_id] != JobState.SUCCEEDED or not name
            receipt = await self.node.call("job.receipt", caller(), JobCall(job_id=job_id))
            assert verify_receipt(msgspec.json.encode(receipt), public_key).ok
        for _ in range(500):  # cells are freed behind the answers
            if len(live := await self.node.driver.adopt()) <= 1:
                break
            await asyncio.sleep(0.02)
        assert len(live) <= 1, "only the model runtime lives on"


@pytest.mark.skipif(not PACKAGE.is_dir(), reason="the sample package is not here")
@pytest.mark.parametrize("seed", range(6))
def test_deaths_between_any_two_steps(tmp_path: Path, seed: int) -> None:
    async def main() -> None:
        trial = Trial(tmp_path, seed)
        try:
            async with asyncio.timeout(60):
                await trial.run()
                await trial.judge()
        finally:
            await trial.node.stop()
        assert len(trial.accepted) == CLIENTS * JOBS_EACH
        assert not trial.node.errors, (trial.deaths, trial.node.errors)

    asyncio.run(main())


@pytest.mark.skipif(not PACKAGE.is_dir(), reason="the sample package is not here")
def test_a_command_runs_beside_more_open_jobs_than_requests_are_held_for(tmp_path: Path) -> None:
    """Its launch overlaps the commit of its row, so the request must not be looked for in the store."""

    async def silent(run: Run) -> int:
        await asyncio.sleep(60)
        return 0

    async def main() -> None:
        node = OneNode(tmp_path, {"true": true, sys.executable: silent}, models=True)
        try:
            await node.start_aetherd()
            await node.start_aurorad()
            await node.connected()
            await asyncio.gather(*(node.submit(MODEL, caller()) for _ in range(REQUESTS_HELD_MAX + 10)))
            job = await node.submit(command("true"), caller(), 5_000)
            assert job.state is JobState.SUCCEEDED, job.error
        finally:
            await node.stop()

    asyncio.run(main())


async def true(run: Run) -> int:
    return 0
