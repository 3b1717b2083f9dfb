"""What the native driver asks of the spawner about allocated cells: one function per verb, over a connection."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aether.contract.allocations import FileEntry, FileListing
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.jobs import Stdio
from aether.substrate.cells.client import SpawnerLink

LOGGED: Final = ("null", "log", "log")
STDIO: Final[dict[Stdio, tuple[str, str, str]]] = {
    "logs": LOGGED,
    "pipe": ("pipe", "log", "log"),
    "tty": ("tty", "tty", "tty"),
}
BUSY_TRIES: Final = 300
BUSY_S: Final = 0.1


async def terminal(link: SpawnerLink, cell: str, exec_id: str) -> tuple[Stdio, int]:
    reply = await link.call("exec.terminal", {"cell": cell, "exec": exec_id})
    kind: Stdio = "tty" if reply.value["kind"] == "tty" else "pipe"
    return kind, reply.fds[0]


async def window(link: SpawnerLink, cell: str, exec_id: str, rows: int, columns: int) -> None:
    await _plain(link, "exec.window", {"cell": cell, "exec": exec_id, "rows": rows, "columns": columns})


async def stop_exec(link: SpawnerLink, cell: str, exec_id: str, grace_ms: int) -> None:
    await _plain(link, "exec.stop", {"cell": cell, "exec": exec_id, "grace_ms": grace_ms})


async def freeze(link: SpawnerLink, cell: str, frozen: bool) -> None:
    """What the host cannot do is LEVEL_UNMET: `freezer` is a mechanism that it lacks."""
    try:
        await _plain(link, "cell.freeze", {"cell": cell, "frozen": frozen})
    except AetherError as error:
        if error.code != "INTERNAL":
            raise
        remedy = "mount cgroup v2 or the v1 freezer, and let the spawner write there"
        raise AetherError("LEVEL_UNMET", f"cannot freeze the cell: {error.message}", remedy) from error


async def resize(link: SpawnerLink, cell: str, limits: dict[str, Any]) -> None:
    await _plain(link, "cell.limit", {"cell": cell, "limits": limits})


async def put(link: SpawnerLink, cell: str, path: str, fd: int, executable: bool) -> None:
    args = {"cell": cell, "path": path, "mode": 0o755 if executable else 0o644}
    (await link.call("work.put", args, [fd])).close()


async def files(link: SpawnerLink, cell: str, path: str) -> FileListing:
    found = (await link.call("work.list", {"cell": cell, "path": path})).json()
    entries = tuple(
        FileEntry(
            name=row["name"],
            kind=row["kind"],
            size_bytes=row["size_bytes"],
            mode=row["mode"],
            modified_at=rfc3339(row["modified_us"] * 1000),
        )
        for row in found["entries"]
    )
    return FileListing(path=path, entries=entries, truncated=found["truncated"])


async def free(link: SpawnerLink, cell: str) -> None:
    """Waits for a work directory that is still being read or written."""
    for tries_left in range(BUSY_TRIES, -1, -1):
        try:
            await _plain(link, "cell.free", {"cell": cell})
            return
        except AetherError as error:
            if error.code != "BUSY" or tries_left == 0:
                raise
        await asyncio.sleep(BUSY_S)


async def _plain(link: SpawnerLink, op: str, args: dict[str, Any]) -> None:
    (await link.call(op, args)).close()
