"""What a model runtime says: whatever it is, the channel answers a request with a reply or ends."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.contract.codec import encode_frame
from aether.contract.modelwire import Hello, InferReply
from aether.orchestrator.engines.channel import Channel
from tests.support.hostile import changed_bytes, changed_json

SAID = [dict.fromkeys(kind.__struct_encode_fields__, 1) for kind in (Hello, InferReply)]
FRAMES = st.sampled_from(SAID).flatmap(changed_json).map(encode_frame)


@settings(max_examples=80, deadline=None)
@given(st.lists(FRAMES | FRAMES.flatmap(changed_bytes) | st.binary(max_size=20), max_size=4))
def test_any_bytes_of_a_runtime_are_heard_or_end_the_channel(said: list[bytes]) -> None:
    async def main() -> None:
        channel = Channel()
        for data in said:
            channel.data_received(data)
        if channel.hello.done():
            assert channel.hello.exception() is not None or isinstance(channel.hello.result(), Hello)

    asyncio.run(main())


def test_text_that_is_none_and_deep_nesting() -> None:
    def frame(payload: bytes) -> bytes:
        return len(payload).to_bytes(4, "big") + payload

    async def main(payload: bytes) -> None:
        channel = Channel()
        channel.data_received(frame(payload))
        assert channel.closed.done() and channel.hello.exception() is not None

    raw: list[Any] = [b"\x81\xa1\xff\x01", b"\x81\xa1a" + b"\x91" * 50_000 + b"\x01", msgspec.msgpack.encode("no")]
    for payload in raw:
        asyncio.run(main(payload))
