"""Composition root of egressd: a proxy per cell behind one link to aetherd.

It connects, shakes hands, says which cells it serves, and works until the link breaks; then it connects again. Cells
are served on meanwhile. Its environment is where `env:` credentials come from.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import socket
from typing import Any, Final

from aether.backends import link as links
from aether.contract.errors import AetherError
from aether.contract.paths import Layout
from aether.daemons import process
from aether.egress.dial import SystemNames, client_tls
from aether.egress.proxy import Outside
from aether.egress.secrets import Sources
from aether.egress.service import Egress

RECONNECT_S: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def compose(layout: Layout, names: SystemNames) -> Egress:
    """The service on this host's resolver and trusted certificates."""
    return Egress(
        Sources(layout.root, layout.secrets, os.environ),
        Outside(names.resolve, client_tls()),
        process.package_version(),
        lambda: datetime.datetime.now(datetime.UTC),
    )


async def serve(layout: Layout, log: Any, stop: asyncio.Event) -> None:
    """Runs the role until `stop`."""
    names = SystemNames()
    egress = compose(layout, names)
    working = asyncio.create_task(_work(egress, layout, log))
    try:
        await stop.wait()
    finally:
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
        await egress.close()
        names.close()


async def _work(egress: Egress, layout: Layout, log: Any) -> None:
    tries = 0
    while True:
        lost = asyncio.Event()
        try:
            link = await connect(egress, layout, lost, log)
            await egress.attach(link)
            log.info("connected to aetherd", cells=repr(egress))
            tries = 0
            await lost.wait()
        except (OSError, AetherError) as error:
            if tries == len(RECONNECT_S):
                log.warning("cannot work with aetherd yet", reason=str(error))
        await asyncio.sleep(RECONNECT_S[min(tries, len(RECONNECT_S) - 1)])
        tries += 1


async def connect(egress: Egress, layout: Layout, lost: asyncio.Event, log: Any) -> links.UnixLink:
    """A link to aetherd that serves `egress`; sets `lost` when it breaks."""
    holder: list[links.UnixLink] = []

    def closed(link: links.UnixLink) -> None:
        egress.detach(link)
        lost.set()

    def failed(verb: str, error: BaseException) -> None:
        log.error("a call failed", verb=verb, error=f"{type(error).__name__}: {error}")

    def make(side: socket.socket) -> links.UnixLink:
        link = links.UnixLink(
            side, egress.handlers(lambda: holder[0]), egress.events(), on_close=closed, on_error=failed
        )
        holder.append(link)
        return link

    return await links.connect(layout.egress_socket, make)


def main() -> None:
    process.run("egressd", serve)


if __name__ == "__main__":
    main()
