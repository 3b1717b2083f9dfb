"""A spawner of an ordinary user to whom ids are lent: each cell has two of its own, with either executor.

The rest of what such cells are is tested with those of root and of the user alone in test_spawner_process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.contract.cells import Images
from aether.substrate.cells.drivers.native import NativeDriver
from aether.substrate.cells.logs import ExecLog
from tests.support import subids
from tests.support.spawnerprocess import ORDINARY, SYSTEM_PYTHON, Spawner, launch, with_driver

DIGEST = "ab" * 32
WHO = "cat /proc/self/uid_map /proc/1/status | grep -E '^ |^Uid'; kill -9 1; touch /work/f"


@pytest.fixture(params=["native", "portable"])
def spawner(request: pytest.FixtureRequest) -> Iterator[Spawner]:
    subids.needed()
    if not Path(SYSTEM_PYTHON).exists():
        pytest.skip("no system Python that an ordinary user may run")
    running = Spawner(ORDINARY, lent=True, executor=request.param)
    yield running
    running.close()


def test_every_cell_has_ids_of_its_own(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        if "cell" in driver.facts.missing:
            pytest.skip(driver.facts.missing["cell"].reason)
        assert driver.facts.ids.kind == "subordinate" and driver.facts.ids.lent == subids.FIRST
        started = [await launch(driver, WHO) for _ in range(2)]
        uids = {each.report.uid for each in started}
        assert len(uids) == 2 and all(subids.FIRST < uid < subids.FIRST + subids.COUNT for uid in uids)
        for each in started:
            await driver.wait(each.handle, each.exec_id)
            assert "own-uids" not in each.report.missing and "daemon-uids" in each.report.missing
            log = ExecLog(spawner.state / "logs/jobs" / each.handle, each.exec_id)
            rows = log.read("stdout", 0).data.decode().split("\n")
            assert [row.split()[::2] for row in rows[:2]] == [["0", "1"], ["1000", "1"]]
            assert rows[2].split() == ["Uid:", "0", "0", "0", "0"], "PID 1 is another user than its executables"
        files = (spawner.state / "cells" / spawner.instances[-1]).glob("*/f")
        assert {path.stat().st_uid for path in files} == uids
        for each in started:
            await driver.free(each.handle)

    with_driver(spawner, step)


def test_an_image_is_shown_with_the_users_own_id(spawner: Spawner) -> None:
    """Its files are the user's, and the job may change what lies over them."""
    tree = spawner.state / "cache/images" / DIGEST / "root"
    tree.mkdir(parents=True)
    (tree / "given").write_text("given")
    for path in (tree, tree / "given"):
        os.chown(path, ORDINARY, ORDINARY)

    async def step(driver: NativeDriver) -> None:
        if "cell" in driver.facts.missing:
            pytest.skip(driver.facts.missing["cell"].reason)
        script = "echo more >> given && echo new > made && cat given made && id -u"
        started = await launch(driver, script, images=Images(work=f"sha256:{DIGEST}"))
        end = await driver.wait(started.handle, started.exec_id)
        log = ExecLog(spawner.state / "logs/jobs" / started.handle, started.exec_id)
        assert (end.exit.code, log.read("stdout", 0).data) == (0, b"givenmore\nnew\n1000\n")
        assert started.report.uid == ORDINARY and "shows an image" in started.report.missing["own-uids"]
        await driver.free(started.handle)
        assert (tree / "given").read_text() == "given"

    with_driver(spawner, step)


def test_without_lent_ids_the_user_is_one(spawner: Spawner) -> None:
    """The setting turns them off; a spawner that died is followed by one of another kind."""
    spawner.kill()
    spawner._env["AETHER_SUBORDINATE_IDS"] = "off"
    spawner.start()

    async def step(driver: NativeDriver) -> None:
        assert driver.facts.ids.kind == "own" and driver.facts.ids.user == ORDINARY
        started = await launch(driver, "true")
        await driver.wait(started.handle, started.exec_id)
        assert started.report.uid == ORDINARY and "own-uids" in started.report.missing
        await driver.free(started.handle)

    spawner._lent = False
    with_driver(spawner, step)
