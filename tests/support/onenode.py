"""The roles in one process, still through the codec: aetherd's composition over the memory driver, aurorad's Aurora
over its SQLite store, and a real link between them. Each side may die and come back on what it left on disk.

A death here commits what was queued (a kill of the real process, which may lose it, is `tests/simulation`).
`on_step` hears of every call and answer on the link, so that a death can be put between any two of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

from aether.backends.link import UnixLink, pair
from aether.backends.sqlite.store import SqliteStore
from aether.contract import ids
from aether.contract.calls import Caller, JobCall, SubmitCall, SubmittedJob
from aether.contract.errors import AetherError
from aether.contract.jobs import JobRequest, JobView
from aether.contract.paths import Layout
from aether.contract.records import Record
from aether.daemons import aetherd, samples
from aether.daemons.accounts import Accounts, prepare
from aether.orchestrator.service import Aurora, Settings
from aether.substrate.cells.drivers.memory import MemoryDriver, Program, Run

OWNER = os.getuid()
STRANGER = OWNER + 4_711


def caller(uid: int = OWNER, *, key: str | None = None, ticket: str | None = None) -> Caller:
    """A client of `uid`."""
    return Caller(
        uid=uid, gid=uid, pid=1, credential=ticket, request_id=ids.new(ids.REQUEST), idempotency_key=key
    )  # fmt: skip


def command(*argv: str, **params: Any) -> JobRequest:
    return JobRequest(kind="command", op="run", params={"argv": list(argv), **params})


async def cfcd(run: Run) -> int:
    """The real model runtime as a plain child process, on the channel."""
    assert run.channel is not None
    places = {"/mnt/model": run.spec.readonly_dirs["model"], "/mnt/keys": run.spec.readonly_dirs["keys"]}
    fd = run.channel.fileno()
    argv = [places.get(word, str(fd) if before == "--fd" else word) for before, word in _pairs(run.spec.argv)]
    process = await asyncio.create_subprocess_exec(*argv, pass_fds=(fd,), env={**os.environ, **run.spec.env})
    run.channel.close()
    try:
        code = await process.wait()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    return code if code >= 0 else 128 - code


def _pairs(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Each word with the one before it."""
    return list(zip(("", *words), words, strict=False))


class OneNode:
    """See the module head. `programs` are the commands there are; cells outlive both sides, as the spawner's do."""

    def __init__(self, directory: Path, programs: dict[str, Program], *, models: bool = False) -> None:
        self.layout = Layout(directory / "state")
        who = Accounts(OWNER, OWNER, OWNER, OWNER, OWNER, OWNER, os.getgid(), False)
        prepare(self.layout, who)
        if models:
            samples.install(self.layout, who)
        self.driver = MemoryDriver({sys.executable: cfcd, **programs})
        self.on_step: Callable[[str], None] = lambda name: None
        self.errors: list[str] = []
        self._authority: aetherd.Authority | None = None
        self._aurora: Aurora | None = None
        self._store: SqliteStore | None = None
        self._link: UnixLink | None = None
        self._working: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[Any]] = set()

    # ---- clients

    async def call(self, operation: str, by: Caller, body: Any) -> Any:
        """An operation as an interface would call it; UNAVAILABLE when aetherd is not there or dies meanwhile."""
        if self._authority is None:
            raise AetherError("UNAVAILABLE", "cannot connect: aetherd is not there")
        work: asyncio.Task[Any] = asyncio.ensure_future(self._authority.service.handlers[operation](by, body))
        self._calls.add(work)
        work.add_done_callback(self._calls.discard)
        done, _ = await asyncio.wait({work})
        if work.cancelled():
            raise AetherError("UNAVAILABLE", "cannot go on: aetherd went away")
        return done.pop().result()

    async def submit(self, request: JobRequest, by: Caller, wait_ms: int = 0) -> SubmittedJob:
        answer = await self.call("job.submit", by, SubmitCall(request=request, wait_ms=wait_ms))
        assert isinstance(answer, SubmittedJob)
        return answer

    async def view(self, job_id: str, by: Caller | None = None, wait_ms: int = 0) -> JobView:
        answer = await self.call("job.get", by or caller(), JobCall(job_id=job_id, wait_ms=wait_ms))
        assert isinstance(answer, JobView)
        return answer

    # ---- what is inside

    @property
    def parts(self) -> aetherd.Parts:
        assert self._authority is not None
        return self._authority.parts

    @property
    def link(self) -> UnixLink:
        """aurorad's end."""
        assert self._link is not None
        return self._link

    async def records(self, kind: str | None = None) -> list[Record]:
        """The durable log, once all that was written is durable."""
        log = self.parts.book.log
        await log.durable(log.size - 1)
        return [record for record in log.read(0, log.size) if kind in (None, record.type)]

    # ---- lives and deaths

    async def start_aetherd(self, spawner: bool = True) -> None:
        """`spawner` False: it is connected later, by `driver.start`."""
        with mock.patch.object(aetherd, "NativeDriver", lambda path: self.driver):
            authority = aetherd.compose(self.layout, frozenset({OWNER}), mock.Mock())
        log = authority.parts.book.log
        await log.durable(log.size - 1)
        self._authority = authority
        if spawner:
            self.driver.start()

    async def kill_aetherd(self) -> None:
        authority, self._authority = self._authority, None
        assert authority is not None
        asking = authority.parts.asking
        asking.close()
        housework = (authority.parts.execution._background, authority.parts.house._background, asking._background)
        for task in (*self._calls, *(task for tasks in housework for task in tasks)):
            task.cancel()
        if self._link is not None:
            self._link.close()
        await self.driver.close()
        authority.parts.book.log.close()
        await asyncio.sleep(0)

    async def start_aurorad(self) -> None:
        self._store = SqliteStore(self.layout.db / "jobs.sqlite3", self._fatal)
        aurora = Aurora(self._store, Settings(self.layout.artifacts, self.layout.models, self.layout.images))
        await aurora.start()
        self._aurora = aurora
        self._working = asyncio.ensure_future(self._work(aurora))

    async def kill_aurorad(self) -> None:
        aurora, self._aurora = self._aurora, None
        assert aurora is not None and self._working is not None
        self._working.cancel()
        await asyncio.gather(self._working, return_exceptions=True)
        await aurora.close()

    def _fatal(self, error: BaseException) -> None:
        self.errors.append(f"store: {error}")

    async def _work(self, aurora: Aurora) -> None:
        """As aurorad does: connect, shake hands, reconcile, until the link breaks."""
        while True:
            lost = asyncio.Event()
            with contextlib.suppress(AetherError):
                if self._authority is not None:
                    await aurora.attach(await self._connect(self._authority, aurora, lost))
                    await lost.wait()
            await asyncio.sleep(0.01)

    async def _connect(self, authority: aetherd.Authority, aurora: Aurora, lost: asyncio.Event) -> UnixLink:
        ours: list[UnixLink] = []

        def failed(verb: str, error: BaseException) -> None:
            self.errors.append(f"{verb}: {type(error).__name__}: {error}")

        def detached(link: UnixLink) -> None:
            aurora.detach(link)
            lost.set()

        def make_a(side: socket.socket) -> UnixLink:
            verbs = self._stepping(authority.service.verbs(lambda: ours[0], lambda: None))
            detach = authority.parts.orchestra.detach
            link = UnixLink(side, verbs, authority.service.events(), on_close=detach, on_error=failed)
            ours.append(link)
            return link

        def make_b(side: socket.socket) -> UnixLink:
            return UnixLink(
                side, self._stepping(aurora.handlers()), aurora.events(), on_close=detached, on_error=failed
            )

        _, self._link = await pair(make_a, make_b)
        return self._link

    def _stepping(self, handlers: Any) -> dict[str, Any]:
        return {verb: (kind, self._stepped(verb, run)) for verb, (kind, run) in handlers.items()}

    def _stepped(self, verb: str, run: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        async def stepped(body: Any) -> Any:
            self.on_step(f"call {verb}")
            try:
                return await run(body)
            finally:
                self.on_step(f"answer {verb}")

        return stepped

    async def connected(self) -> None:
        """Returns when aurorad is reconciled."""
        async with asyncio.timeout(10):
            while self._authority is None or not self.parts.orchestra.connected:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Ends whatever is there and every cell."""
        if self._aurora is not None:
            await self.kill_aurorad()
        if self._authority is not None:
            await self.kill_aetherd()
        for adopted in await self.driver.adopt():
            await self.driver.free(adopted.handle)


@contextlib.asynccontextmanager
async def running(
    directory: Path, programs: dict[str, Program], *, models: bool = False, policy: str | None = None
) -> AsyncIterator[OneNode]:
    """A node that is up and connected; `policy` instead of the default one."""
    node = OneNode(directory, programs, models=models)
    if policy is not None:
        node.layout.policy.write_text(policy)
    try:
        await node.start_aetherd()
        await node.start_aurorad()
        await node.connected()
        yield node
    finally:
        await node.stop()
    assert not node.errors, node.errors
