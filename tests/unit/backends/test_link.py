"""The link: calls both ways, errors, events, descriptors, bounds, a peer that goes away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.backends.link import UnixLink, connect, pair, peer_uid, serve
from aether.contract.codec import encode_frame
from aether.contract.errors import AetherError
from tests.support.hostile import changed_bytes


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Both event loops: their transports and socket calls differ."""
    return request.param  # type: ignore[no-any-return]


Run = Callable[[Coroutine[Any, Any, None]], None]


class Text(msgspec.Struct, frozen=True):
    text: str
    token: int = 0


class Desk:
    """Handlers of one end."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.link: UnixLink | None = None

    async def echo(self, body: Text) -> Text:
        return Text(body.text.upper())

    async def refuse(self, body: Text) -> Text:
        raise AetherError("BUSY", "cannot serve: busy", retry_after_s=2)

    async def broken(self, body: Text) -> Text:
        raise RuntimeError("a bug")

    async def hang(self, body: Text) -> Text:
        await asyncio.sleep(3600)
        return body

    async def read(self, body: Text) -> Text:
        assert self.link is not None
        fd = await self.link.take_fd(body.token)
        with open(fd, "rb") as file:
            return Text(file.read().decode())

    def note(self, body: Text) -> None:
        self.events.append(body.text)

    def make(self, side: socket.socket) -> UnixLink:
        verbs = {name: (Text, getattr(self, name)) for name in ("echo", "refuse", "broken", "hang", "read")}
        self.link = UnixLink(side, verbs, {"note": (Text, self.note)})
        return self.link


async def make_pair() -> tuple[UnixLink, UnixLink, Desk]:
    desk = Desk()
    ours, theirs = await pair(Desk().make, desk.make)
    return ours, theirs, desk


def test_calls_both_ways_and_errors(run: Run) -> None:
    async def main() -> None:
        ours, theirs, _ = await make_pair()
        assert await ours.call("echo", Text("a"), Text) == Text("A")
        assert await theirs.call("echo", Text("b"), Text) == Text("B")
        answers = await asyncio.gather(*(ours.call("echo", Text(str(i)), Text) for i in range(500)))
        assert [a.text for a in answers] == [str(i) for i in range(500)]
        for verb, code in (("refuse", "BUSY"), ("broken", "INTERNAL"), ("nothing", "PROTOCOL")):
            with pytest.raises(AetherError) as caught:
                await ours.call(verb, Text(""), Text)
            assert caught.value.code == code
        ours.close()
        theirs.close()

    run(main())


def test_events_keep_their_order_before_a_call(run: Run) -> None:
    async def main() -> None:
        ours, theirs, desk = await make_pair()
        for i in range(10):
            ours.notify("note", Text(str(i)))
        await ours.call("echo", Text("x"), Text)
        assert desk.events == [str(i) for i in range(10)]
        ours.close()
        theirs.close()

    run(main())


def test_descriptor_crosses(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        ours, theirs, _ = await make_pair()
        path = tmp_path / "f"
        path.write_text("inside")
        fd = os.open(path, os.O_RDONLY)
        token = await ours.send_fd(fd)
        os.close(fd)
        assert (await ours.call("read", Text("", token), Text)).text == "inside"
        ours.close()
        theirs.close()

    run(main())


def test_lost_peer_fails_pending_calls(run: Run) -> None:
    async def main() -> None:
        ours, theirs, _ = await make_pair()
        hanging = asyncio.create_task(ours.call("hang", Text(""), Text))
        await ours.call("echo", Text(""), Text)
        theirs.close()
        with pytest.raises(AetherError) as caught:
            await hanging
        assert caught.value.code == "UNAVAILABLE"
        with pytest.raises(AetherError):
            await ours.call("echo", Text(""), Text)
        assert ours.closed

    run(main())


def test_oversized_frame_closes_the_link(run: Run) -> None:
    async def main() -> None:
        ours, theirs, _ = await make_pair()
        with pytest.raises(AetherError) as caught:
            await ours.call("echo", Text("x" * 300_000), Text)
        assert caught.value.code == "TOO_LARGE"
        assert await ours.call("echo", Text("still"), Text) == Text("STILL")
        assert ours._transport is not None
        ours._transport.write(b"\xff\xff\xff\xff")
        for _ in range(100):
            if ours.closed and theirs.closed:
                break
            await asyncio.sleep(0.01)
        assert theirs.closed
        ours.close()

    run(main())


def test_listen_connect_and_refusal(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "s"
        stop = await serve(path, 0o600, lambda sock: peer_uid(sock) == os.getuid(), Desk().make)
        link = await connect(path, Desk().make)
        assert await link.call("echo", Text("hi"), Text) == Text("HI")
        assert path.stat().st_mode & 0o777 == 0o600
        link.close()
        stop()
        stop = await serve(path, 0o600, lambda sock: False, Desk().make)
        with pytest.raises(AetherError):
            await connect(path, Desk().make)
        stop()

    run(main())


GOOD_FRAMES = [encode_frame((kind, 1, verb, {"text": "a", "token": 1})) for kind, verb in ((0, "echo"), (3, "note"))]
PAYLOADS = st.binary(max_size=30) | st.sampled_from(
    [b"\x94\x03\x00\xa1\xff\x80", b"\x94\x00\x01\xa1a" + b"\x91" * 50_000]
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        PAYLOADS.map(lambda raw: len(raw).to_bytes(4, "big") + raw)
        | st.sampled_from(GOOD_FRAMES).flatmap(changed_bytes),
        min_size=1,
        max_size=4,
    )
)
def test_any_bytes_are_served_or_close_the_link(frames: list[bytes]) -> None:
    """Text that is not UTF-8, deep nesting, unknown verbs: no exception leaves the link of who hears them."""

    async def main() -> None:
        escaped: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: escaped.append(context))
        ours, _, desk = await make_pair()
        assert ours._transport is not None
        ours._transport.write(b"".join(frames))
        assert desk.link is not None
        with contextlib.suppress(AetherError, TimeoutError):
            async with asyncio.timeout(0.02):
                await ours.call("echo", Text("a"), Text)
        ours.close()
        for _ in range(1_000):
            await asyncio.sleep(0)
            if desk.link.closed:
                break
        assert desk.link.closed and not escaped

    asyncio.run(main())
