"""Many jobs, and aurorad killed and the link broken at random; the seed is in the test's name.

To look at one run: `pytest -k 'simulation and 17'`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import pytest

from aether.contract.cells import ExecEnd, ExitStatus, Usage
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.contract.wire import Empty, JobStop
from tests.unit.orchestrator.fake_world import Cell, World, command, eventually, install_model, predict
from tests.unit.orchestrator.test_crash_points import _all_over, _judge

JOBS = 25
GONE = ExecEnd(cell_id="", exec_id="", exit=ExitStatus(), usage=Usage())
ENDS = (
    ExitStatus(code=0),
    ExitStatus(code=7),
    ExitStatus(signal=9, oom_killed=True),
    ExitStatus(signal=9, timed_out=True),
    ExitStatus(reason="spawner-died"),
)


@pytest.mark.parametrize("seed", range(20))
def test_simulation(seed: int, tmp_path: Path) -> None:
    asyncio.run(_simulate(random.Random(seed), tmp_path))


async def _simulate(rng: random.Random, tmp_path: Path) -> None:
    install_model(tmp_path / "models")
    world = World(tmp_path)
    world.authority.cell_end = lambda cell: _end(rng, cell)
    world.authority.outputs = {"out": b"x"}
    await world.start()
    trouble = asyncio.ensure_future(_trouble(world, rng))
    accepted: set[str] = set()
    try:
        await asyncio.gather(*(_client(world, rng, accepted) for _ in range(JOBS)))
        trouble.cancel()
        await asyncio.gather(trouble, return_exceptions=True)
        await _calm(world)
        await eventually(lambda: _all_over(world), 10.0)
        await _judge(world)
        for job_id in accepted:
            row = await world.store.get(job_id)
            assert row is not None and row.phase == "done", f"{job_id} was accepted and is lost"
        assert {JobState(o.state or "") for o in world.authority.outcomes.values()} >= {JobState.SUCCEEDED}
    finally:
        trouble.cancel()
        await world.stop()


def _end(rng: random.Random, cell: Cell) -> tuple[float, ExitStatus] | None:
    return None if rng.random() < 0.2 else (rng.random() * 0.02, rng.choice(ENDS))


async def _client(world: World, rng: random.Random, accepted: set[str]) -> None:
    """Submits one job of some kind; a command may have to be stopped to end."""
    await asyncio.sleep(rng.random() * 0.3)
    kind = rng.random()
    try:
        if kind < 0.25:
            await world.authority.run(predict(x=1))
            return
        job_id = await world.authority.submit(predict(x=2) if kind < 0.5 else command("job", outputs=("*",)))
    except (AetherError, AssertionError):
        return
    if job_id is None:
        return
    accepted.add(job_id)
    for _ in range(2000):
        if job_id in world.authority.outcomes:
            return
        await asyncio.sleep(0.01)
        if rng.random() < 0.1:
            await _stop(world, job_id)


async def _stop(world: World, job_id: str) -> None:
    link = world.authority.link
    if link is None or link.closed or not world.ready:
        return
    with contextlib.suppress(AetherError):
        await link.call("job.stop", JobStop(job_id=job_id, grace_ms=0), Empty)


async def _trouble(world: World, rng: random.Random) -> None:
    """Kills aurorad, breaks the link, kills runtimes."""
    while True:
        await asyncio.sleep(rng.random() * 0.04)
        what = rng.random()
        if what < 0.4:
            await _kill(world, rng)
        elif what < 0.7:
            await _break(world)
        elif what < 0.8:
            await _lose_cells(world, rng)
        else:
            for cell in list(world.authority.cells.values()):
                if cell.runtime is not None and cell.end is None:
                    world.authority.end_cell(cell, ExitStatus(signal=9))


async def _kill(world: World, rng: random.Random) -> None:
    world.steps.kill_at = len(world.steps.names) + rng.randrange(1, 12)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(world.dead.wait(), 0.05)
    world.steps.kill_at = None
    await asyncio.shield(_again(world))


async def _again(world: World) -> None:
    await world.bury()
    await world.start()


async def _lose_cells(world: World, rng: random.Random) -> None:
    """The authority comes back and knows nothing of some cells."""
    for job_id, cell in list(world.authority.cells.items()):
        if cell.runtime is None and cell.end is None and rng.random() < 0.5:
            del world.authority.cells[job_id]
            cell.end = GONE
    await _break(world)


async def _break(world: World) -> None:
    if world.link is None:
        return
    world.link.close()
    await asyncio.sleep(0.001)
    await asyncio.shield(world.connect())


async def _calm(world: World) -> None:
    """One last connection, so that the end does not depend on where the trouble stopped."""
    if world.aurora is None or world.link is None or world.link.closed or not world.ready:
        if world.aurora is not None:
            await world.bury()
        await world.start()
