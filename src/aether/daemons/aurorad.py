"""Composition root of aurorad: store, artifacts and engines behind one link to aetherd.

It connects, shakes hands, reconciles, and works until the link breaks; then it connects again. Jobs stay where
they are meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any, Final

from aether.backends import link as links
from aether.backends.sqlite.store import SqliteStore
from aether.contract.errors import AetherError
from aether.contract.paths import Layout
from aether.daemons import process
from aether.orchestrator.service import Aurora, Settings

RECONNECT_S: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


async def serve(layout: Layout, log: Any, stop: asyncio.Event) -> None:
    """Runs the role until `stop`."""
    store = SqliteStore(layout.db / "jobs.sqlite3", process.die(log, "the job store cannot be written"))
    aurora = Aurora(store, Settings(layout.artifacts, layout.models, layout.images))
    await aurora.start()
    working = asyncio.create_task(_work(aurora, layout, log))
    try:
        await stop.wait()
    finally:
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
        await aurora.close()


async def _work(aurora: Aurora, layout: Layout, log: Any) -> None:
    tries = 0
    while True:
        lost = asyncio.Event()
        try:
            link = await _connect(aurora, layout, lost, log)
            await aurora.attach(link)
            log.info("reconciled with aetherd")
            tries = 0
            await lost.wait()
        except (OSError, AetherError) as error:
            if tries == len(RECONNECT_S):
                log.warning("cannot work with aetherd yet", reason=str(error))
        await asyncio.sleep(RECONNECT_S[min(tries, len(RECONNECT_S) - 1)])
        tries += 1


async def _connect(aurora: Aurora, layout: Layout, lost: asyncio.Event, log: Any) -> links.UnixLink:
    def closed(link: links.UnixLink) -> None:
        aurora.detach(link)
        lost.set()

    def failed(verb: str, error: BaseException) -> None:
        log.error("a call failed", verb=verb, error=f"{type(error).__name__}: {error}")

    def make(side: socket.socket) -> links.UnixLink:
        return links.UnixLink(side, aurora.handlers(), aurora.events(), on_close=closed, on_error=failed)

    return await links.connect(layout.authority_socket, make)


def main() -> None:
    process.run("aurorad", serve)


if __name__ == "__main__":
    main()
