"""The model engine with the runtime and the sample package that ship: a process, no cell."""

from __future__ import annotations

import asyncio
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from aether.contract import ids, wire
from aether.contract.jobs import JobRequest, JobState
from tests.unit.orchestrator.fake_world import Authority, World, grant_of

PACKAGES = Path(__file__).parents[3] / "packages"


class RealAuthority(Authority):
    """Starts cfcd as a child process."""

    def __init__(self, world: World) -> None:
        super().__init__(world.steps)
        self.processes: list[subprocess.Popen[bytes]] = []

    def _spawn(self, argv: list[str], fd: int) -> None:
        self.processes.append(subprocess.Popen(argv, pass_fds=(fd,)))

    async def _worker(self, body: wire.WorkerLaunch) -> wire.WorkerLaunched:
        assert self.link is not None
        job_id = ids.new(ids.JOB)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            fd = theirs.fileno()
            argv = [
                sys.executable, "-m", "aether.runtime.cfcd", "--fd", str(fd),
                "--package", body.package_dir, "--keys", str(PACKAGES / "keys"),
            ]  # fmt: skip
            self._spawn(argv, fd)
            token = await self.link.send_fd(ours.fileno())
        cell = wire.CellLaunched(cell_id="cell_x", exec_id="exec_x", started_at="t", plan_digest="p", channel=token)
        return wire.WorkerLaunched(grant=grant_of(job_id), cell=cell)


def _request(op: str, angle: float = 0.3) -> JobRequest:
    obs = [[math.cos(angle), math.sin(angle)]] * 8
    steps = {"action": [[0.0]] * 7, "dt": [0.05] * 7}
    if op == "predict_next_state":
        inputs = {"history": {"obs": obs, **steps}, "action": [0.0]}
        return JobRequest(kind="model", op=op, params={"model": "pendulum", "horizons_s": [0.1]}, inputs=inputs)
    inputs = {"obs": obs} if op == "encode_state" else {"obs": obs, **steps}
    return JobRequest(kind="model", op=op, params={"model": "pendulum"}, inputs=inputs)


@pytest.mark.skipif(not (PACKAGES / "pendulum").is_dir(), reason="the sample package is not here")
def test_the_shipped_package_answers(tmp_path: Path) -> None:
    shutil.copytree(PACKAGES / "pendulum", tmp_path / "models/pendulum")

    async def main() -> None:
        world = World(tmp_path)
        authority = world.authority = RealAuthority(world)
        await world.start()
        try:
            for op in ("predict_next_state", "encode_state", "score_sequence"):
                reply = await authority.run(_request(op))
                assert reply.state is JobState.SUCCEEDED, reply.error
                assert msgspec.json.decode(reply.result or b"")
            many = await asyncio.gather(*(authority.run(_request("encode_state", n / 10)) for n in range(32)))
            assert max(reply.usage.batch_size or 0 for reply in many) > 1, "requests in flight share a batch"
            bad = await authority.run(
                JobRequest(kind="model", op="encode_state", params={"model": "pendulum"}, inputs={"obs": [["x"]]})
            )
            assert bad.state is JobState.FAILED and bad.error is not None and bad.error.code != "ENGINE_DIED"
            authority.processes[0].kill()
            authority.processes[0].wait()
        finally:
            await world.stop()
            for process in authority.processes:
                assert process.wait(10) is not None

    asyncio.run(main())
