"""The start of a cell with a network: its listener is handed over between the cell and its executable.

Nothing of the job's runs before somebody outside serves the listener; when that fails, the cell is freed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from aether.contract.errors import AetherError
from aether.substrate.cells.client import SpawnerLink
from aether.substrate.cells.drivers.port import Order


async def begin(link: SpawnerLink, order: Order, executable: dict[str, Any], fds: Sequence[int]) -> dict[str, Any]:
    """Starts the executable of a cell that stands; the spawner's report of both. Raises AetherError."""
    assert order.listening is not None
    try:
        reply = await link.call("cell.listen", {"cell": order.cell_id})
        try:
            await order.listening(reply.fds[0])
        finally:
            reply.close()
        args = {"cell": order.cell_id, "exec": executable}
        report: dict[str, Any] = (await link.call("exec.start", args, fds, key=order.exec_id)).value["report"]
        return report
    except BaseException:
        with contextlib.suppress(AetherError):
            await link.call("cell.free", {"cell": order.cell_id})
        raise
