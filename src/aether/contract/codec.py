"""Frames between roles: a 4-byte big-endian length, then one msgpack value.

A frame is at most FRAME_BYTES_MAX; a longer announcement is a protocol error at once, before any byte of it
is kept. The codec is pure: `FrameBuffer` is fed bytes and returns whole payloads.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec

from aether.contract.errors import AetherError
from aether.contract.limits import FRAME_BYTES_MAX

_LENGTH: Final = struct.Struct(">I")
_ENCODER: Final = msgspec.msgpack.Encoder()
UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no value of a type: text that is not UTF-8 and deep nesting have errors of
their own."""


def encode_frame(value: Any) -> bytes:
    """One frame; raises AetherError TOO_LARGE when the value does not fit."""
    payload = _ENCODER.encode(value)
    if len(payload) > FRAME_BYTES_MAX:
        raise AetherError("TOO_LARGE", f"cannot send a frame of {len(payload)} bytes: the bound is {FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(payload)) + payload


class FrameBuffer:
    """Cuts a byte stream into payloads. Holds at most one incomplete frame."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads completed by `data`; raises AetherError PROTOCOL for an oversized frame."""
        buffer = self._buffer
        buffer += data
        payloads: list[bytes] = []
        start = 0
        while len(buffer) - start >= 4:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > FRAME_BYTES_MAX:
                raise AetherError("PROTOCOL", f"cannot read a frame of {length} bytes: the bound is {FRAME_BYTES_MAX}")
            end = start + 4 + length
            if end > len(buffer):
                break
            payloads.append(bytes(buffer[start + 4 : end]))
            start = end
        if start:
            del buffer[:start]
        return payloads
