"""Two tenants in turn on warm cells: each looks for what the other left, then leaves its own ten markers.

Nothing may be seen: a prepared cell serves one job, and an interpreter started ahead of it too. The number of turns
is ALTERNATIONS in the environment: `make alternation` takes a thousand, which is minutes of starting interpreters.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Final

import pytest

from aether.contract import ids
from aether.contract.cells import CellSpec, ExecEnd, Interpreter
from aether.substrate.cells.drivers.native import NativeDriver
from aether.substrate.cells.drivers.port import Handle, Order
from aether.substrate.cells.logs import ExecLog
from tests.support.spawnerprocess import Spawner

TURNS: Final = int(os.environ.get("ALTERNATIONS", "60"))

MARKERS: Final = """
import builtins, ctypes, os, socket, subprocess, sys, threading
me, other = sys.argv[1], sys.argv[2]
libc = ctypes.CDLL(None, use_errno=True)
found = []
def look(name, true):
    try:
        if true(): found.append(name)
    except OSError: pass
def connects(address):
    with socket.socket(socket.AF_UNIX) as s:
        return s.connect_ex(address) == 0
files = [f"{d}/marker-{{}}" for d in ("/work", "/tmp", "/dev/shm", "/var/tmp")]
for path in files:
    look(path, lambda: any(n.startswith("marker-") for n in os.listdir(os.path.dirname(path))))
look("environment", lambda: "MARKER" in os.environ)
look("keyring", lambda: libc.syscall(250, 10, 0xfffffffd, b"user", b"marker", 0) >= 0)  # KEYCTL_SEARCH, session
look("path socket", lambda: connects("/tmp/sock"))
look("abstract socket", lambda: connects("\\0marker"))
look("port", lambda: socket.socket().connect_ex(("127.0.0.1", 4711)) == 0)
look("shared memory", lambda: libc.shmget(0x4711, 4096, 0) >= 0)
look("module global", lambda: hasattr(builtins, "marker") or "marker" in sys.modules)
pids = [p for p in os.listdir("/proc") if p.isdigit() and int(p) not in (1, os.getpid())]
look("process", lambda: any(b"marker" in open(f"/proc/{p}/cmdline", "rb").read() for p in pids))
look("thread", lambda: threading.active_count() > 1)

planted = 0
for path in files:
    try: open(path.format(me), "w").write(me); planted += 1
    except OSError: pass
os.environ["MARKER"] = me; planted += 1
libc.syscall(248, b"user", b"marker", me.encode(), len(me), 0xfffffffd)  # add_key; the filter refuses it
for address in ("/tmp/sock", "\\0marker"):
    s = socket.socket(socket.AF_UNIX); s.bind(address); s.listen(); globals()[address] = s; planted += 1
tcp = socket.socket(); tcp.bind(("127.0.0.1", 4711)); tcp.listen(); planted += 1
planted += libc.shmget(0x4711, 4096, 0o1666) >= 0
builtins.marker = me; sys.modules["marker"] = sys; planted += 1
subprocess.Popen(["/bin/sh", "-c", "sleep 60 # marker"], start_new_session=True); planted += 1
print(",".join(found) or "nothing", planted, flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def spawner() -> Iterator[Spawner]:
    made = Spawner(None)
    yield made
    made.close()


async def turn(driver: NativeDriver, tenant: int, python: Interpreter) -> ExecEnd:
    cell_id = ids.new(ids.CELL)
    argv = ("-c", MARKERS, f"tenant{tenant}", f"tenant{1 - tenant}")
    order = Order(cell_id, "exec" + cell_id[4:], CellSpec(argv=argv, python=python))
    started = await driver.launch(order)
    end = await driver.wait(started.handle, started.exec_id)
    await driver.free(Handle(cell_id))
    return end


def test_tenants_that_alternate_see_nothing_of_each_other(spawner: Spawner) -> None:
    seen: set[str] = set()
    least = 99

    async def main() -> None:
        nonlocal least
        async with spawner.driver() as driver:
            for number in range(TURNS):
                end = await turn(driver, number % 2, Interpreter())
                log = ExecLog(spawner.state / "logs/jobs" / end.cell_id, end.exec_id).read("stdout", 0).data.decode()
                assert end.exit.code == 0, f"turn {number}: {end}"
                found, _, planted = log.strip().rpartition(" ")
                seen.add(found)
                least = min(least, int(planted))
            facts = await driver.probe()
            assert facts["warm"]["taken"] >= TURNS

    asyncio.run(main())
    assert seen == {"nothing"}
    assert least >= 10, f"only {least} markers could be planted"
