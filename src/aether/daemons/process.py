"""What every daemon's `main` does alike: arguments, logger, limits, privileges, the loop, the end.

Order: what the role reads is made reachable, then privileges are dropped, then files are opened. A role ends on
SIGTERM or SIGINT in an orderly way; any other end is safe too, that is what the log is for.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import resource
import signal
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import uvloop

from aether.contract.errors import AetherError
from aether.contract.paths import Layout
from aether.daemons.accounts import become
from aether.daemons.view import open_up
from aether.telemetry import logs

EXIT_FATAL: Final = 70


def package_version() -> str:
    """The installed version; roles of different versions refuse each other."""
    try:
        return version("aether-substrate")
    except PackageNotFoundError:
        return "0"


def run(role: str, serve: Callable[[Layout, Any, asyncio.Event], Awaitable[None]]) -> None:
    """Runs `serve(layout, logger, stop)` until it returns; `stop` is set by a signal."""
    parser = argparse.ArgumentParser(prog=f"aether-{role}")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--uid", type=int, default=os.getuid())
    parser.add_argument("--gid", type=int, default=os.getgid())
    asked = parser.parse_args()
    log = logs.configure(role)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold keys and tickets
    try:
        if os.getuid() == 0 and asked.uid != 0:
            open_up(asked.state)
        become(asked.uid, asked.gid)
        uvloop.run(_main(serve, Layout(asked.state), log))
    except AetherError as error:
        log.error("cannot run", code=error.code, reason=error.message, remedy=error.remedy)
        raise SystemExit(error.kind.exit) from error


async def _main(serve: Callable[[Layout, Any, asyncio.Event], Awaitable[None]], layout: Layout, log: Any) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signo in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signo, stop.set)
    # Start-up objects live as long as the process: keep the collector from walking them again and again.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    log.info("started", pid=os.getpid(), uid=os.getuid(), version=package_version())
    await serve(layout, log, stop)
    log.info("stopped")


def die(log: Any, what: str) -> Callable[[BaseException], None]:
    """For a failed write or sync: says so and ends the process at once, nothing is retried."""

    def fatal(error: BaseException) -> None:
        try:
            log.critical(what, error=f"{type(error).__name__}: {error}")
        finally:
            os._exit(EXIT_FATAL)

    return fatal
