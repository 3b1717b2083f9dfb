"""Cosignatures of witnesses on checkpoints: C2SP tlog-cosignature, Ed25519 (`cosignature/v1`), pure.

https://c2sp.org/tlog-cosignature. A witness signs `cosignature/v1`, `time <seconds>` and the checkpoint's text; its
line in the note is `— <name> <base64(key id || u64 time || signature)>` with key id =
SHA-256(name || 0x0A || 0x04 || public key)[0:4]. So it says: at that time this was the largest tree of this origin
that I saw, and it contains every smaller one that I signed.

Rules of `WitnessKey.time_of`, as for a note: lines of other keys are ignored, a line of this key that does not verify
refuses the note (NOTE_SIGNATURE), the latest of several good ones counts.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from aether.substrate.audit.note import DASH, NoteError, check_name, key_id, read_key, split_note

ALGORITHM: Final = b"\x04"
"""Ed25519 cosignature/v1 in the signed-note registry."""
_TIME: Final = struct.Struct(">Q")
_RAW_BYTES: Final = 4 + _TIME.size + 64
TIME_MAX: Final = 2**63 - 1


def message(text: str, time_s: int) -> bytes:
    """What is signed: the header, the time, the text of the note with its last newline."""
    return f"cosignature/v1\ntime {time_s}\n{text}".encode()


@dataclass(frozen=True, slots=True)
class WitnessKey:
    """A witness's public key with its name; travels as `<name>+<id hex>+<base64(0x04 || key)>`."""

    name: str
    public_key: bytes
    _key: Ed25519PublicKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        object.__setattr__(self, "_key", Ed25519PublicKey.from_public_bytes(self.public_key))

    @classmethod
    def parse(cls, vkey: str) -> WitnessKey:
        """Reads a verifier key line, its newline optional; raises NoteError KEY_FORMAT."""
        return read_key(vkey, ALGORITHM, "witness", cls)

    @property
    def key_id(self) -> bytes:
        return key_id(self.name, self.public_key, ALGORITHM)

    def __str__(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{base64.b64encode(ALGORITHM + self.public_key).decode()}"

    def time_of(self, note: str) -> int | None:
        """When this witness cosigned the note, seconds since the epoch; None when it did not. Raises NoteError."""
        text, signatures = split_note(note)
        found: int | None = None
        for name, raw in signatures:
            if name == self.name and raw[:4] == self.key_id:
                found = max(found or 0, self.check(text, raw))
        return found

    def check(self, text: str, raw: bytes) -> int:
        """The time in one cosignature (key id, time, signature) on `text`. Raises NoteError NOTE_SIGNATURE."""
        why = NoteError("NOTE_SIGNATURE", f"the cosignature of {self.name} does not verify")
        if len(raw) != _RAW_BYTES or raw[:4] != self.key_id:
            raise why
        (time_s,) = _TIME.unpack_from(raw, 4)
        if time_s > TIME_MAX:
            raise why
        try:
            self._key.verify(raw[4 + _TIME.size :], message(text, time_s))
        except InvalidSignature:
            raise why from None
        return int(time_s)


@dataclass(frozen=True, slots=True)
class Cosigner:
    """A witness's private key with its name. `repr` shows neither."""

    name: str
    seed: bytes = field(repr=False)
    key: WitnessKey = field(init=False, repr=False, compare=False)
    _private: Ed25519PrivateKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        private = Ed25519PrivateKey.from_private_bytes(self.seed)
        object.__setattr__(self, "_private", private)
        object.__setattr__(self, "key", WitnessKey(self.name, private.public_key().public_bytes_raw()))

    def line(self, text: str, time_s: int) -> str:
        """The signature line on the checkpoint `text` at `time_s`, its newline included."""
        raw = self.key.key_id + _TIME.pack(time_s) + self._private.sign(message(text, time_s))
        return signature_line(self.name, raw)


def signature_line(name: str, raw: bytes) -> str:
    return f"{DASH}{name} {base64.b64encode(raw).decode()}\n"


def cosigned_by(note: str, keys: Sequence[WitnessKey]) -> dict[str, int]:
    """Which of the witnesses cosigned, with the time of each, seconds. Raises NoteError; two names of one key count
    once: the message does not name the witness (tlog-cosignature, "Additional statements")."""
    found: dict[str, int] = {}
    seen: set[bytes] = set()
    for key in keys:
        if key.public_key not in seen and (time_s := key.time_of(note)) is not None:
            found[key.name] = time_s
            seen.add(key.public_key)
    return found
