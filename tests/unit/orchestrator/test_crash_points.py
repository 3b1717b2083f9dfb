"""aurorad killed at every single step of a job's way, restarted, and judged by what the authority saw."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from aether.contract.cells import ExitStatus
from aether.contract.errors import AetherError
from aether.contract.jobs import TERMINAL, JobState
from aether.contract.wire import Empty, JobStop
from tests.unit.orchestrator.fake_world import World, command, eventually, install_model, predict

Scenario = Callable[[World], Awaitable[None]]


async def _command(world: World) -> None:
    world.authority.outputs = {"out.txt": b"hello", "big.bin": b"x" * 100_000}
    await world.authority.submit(command("job", outputs=("*",)))


async def _failing(world: World) -> None:
    world.authority.cell_end = lambda cell: (0.0, ExitStatus(code=3))
    await world.authority.submit(command("job"))


async def _stopped(world: World) -> None:
    world.authority.cell_end = lambda cell: None
    job_id = await world.authority.submit(command("job"))
    for _ in range(200):
        if job_id is None or job_id in world.authority.outcomes:
            return
        if world.authority.link is not None and not world.authority.link.closed:
            with contextlib.suppress(AetherError):
                await world.authority.link.call("job.stop", JobStop(job_id=job_id, grace_ms=0), Empty)
        await asyncio.sleep(0.005)


async def _model(world: World) -> None:
    await world.authority.submit(predict(x=1))


async def _run(world: World) -> None:
    with contextlib.suppress(AetherError):
        await world.authority.run(predict(x=1))


async def _all_over(world: World) -> bool | None:
    """Every admitted job has its outcome, every row is done, every cell of a job is freed."""
    authority = world.authority
    if any(intent.op != "serve" for intent in authority.open.values()):
        return None
    rows = await world.store.open_jobs()
    jobs = [cell for job_id, cell in authority.cells.items() if authority.outcomes.get(job_id) is not None]
    return True if not rows and all(cell.freed for cell in jobs) else None


async def _one_life(world: World, scenario: Scenario) -> None:
    """Runs the scenario; when the kill comes, restarts at once."""
    await world.start()
    acting = asyncio.ensure_future(scenario(world))
    dying = asyncio.ensure_future(world.dead.wait())
    over = asyncio.ensure_future(eventually(lambda: _all_over_after(world, acting), 4.0))
    await asyncio.wait({dying, over}, return_when=asyncio.FIRST_COMPLETED)
    if world.dead.is_set():
        over.cancel()
        await world.bury()
        world.steps.kill_at = None
        await world.start()
        over = asyncio.ensure_future(eventually(lambda: _all_over_after(world, acting), 4.0))
    dying.cancel()
    try:
        await over
    except AssertionError:
        raise AssertionError(f"hangs: {world.aurora!r} open={world.authority.open} steps={world.steps.names}") from None
    await acting


async def _all_over_after(world: World, acting: asyncio.Future[None]) -> bool | None:
    return await _all_over(world) if acting.done() else None


async def _judge(world: World) -> None:
    authority = world.authority
    assert authority.violations == []
    assert all(count == 1 for count in authority.launches.values()), "an attempt was launched twice"
    for job_id, outcome in authority.outcomes.items():
        assert outcome.state is not None and JobState(outcome.state) in TERMINAL
        row = await world.store.get(job_id)
        if row is not None:
            assert (row.state, row.outcome_index) == (outcome.state, outcome.log_index)
        elif outcome.op != "serve":
            assert outcome.error is not None and outcome.error.code == "ABANDONED", f"{job_id} has no row"
    for job_id, reply in authority.released.items():
        row = await world.store.get(job_id)
        assert row is not None and row.state == reply.state, "a released answer has no row"


@pytest.mark.parametrize("scenario", [_command, _failing, _stopped, _model, _run], ids=lambda f: f.__name__)
def test_every_step(scenario: Scenario, tmp_path: Path) -> None:
    """Kill at step 1, 2, 3, ... until a whole life needs fewer steps than that."""

    async def lives() -> int:
        kill_at = 0
        while True:
            kill_at += 1
            home = tmp_path / str(kill_at)
            install_model(home / "models")
            world = World(home, kill_at)
            try:
                await _one_life(world, scenario)
                await _judge(world)
            except BaseException as error:
                error.add_note(f"killed at step {kill_at}: {world.steps.names[max(0, kill_at - 3) : kill_at]}")
                raise
            finally:
                await world.stop()
            if len(world.steps.names) < kill_at:
                return kill_at

    lifetimes = asyncio.run(lives())
    assert lifetimes > 10
