"""C2SP signed notes and tlog checkpoints with Ed25519, pure.

https://c2sp.org/signed-note and https://c2sp.org/tlog-checkpoint. A note is a text that ends in a newline, an
empty line, and lines `— <key name> <base64(key id || signature)>`; the signature covers the text.

Rules of `Verifier.open`, in this order:
- the note is UTF-8, at most NOTE_BYTES_MAX, without control characters other than newline;
- it has a text, an empty line (the last one counts) and at least one well-formed signature line;
- base64 has one spelling: padded, pad bits zero;
- lines of other keys are ignored; a line of our key (name and id) that does not verify refuses the note;
- one line of our key verifies.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

NOTE_BYTES_MAX: Final = 65_536
SIZE_MAX: Final = 2**53 - 1
_ALGORITHM: Final = b"\x01"
"""Ed25519 in the signed-note registry."""
DASH: Final = "\u2014 "


Key = TypeVar("Key")


class NoteError(Exception):
    """A note that does not hold. `code` is a failure name of docs/formats.md."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def key_id(name: str, public_key: bytes, algorithm: bytes = _ALGORITHM) -> bytes:
    """The first 4 bytes of SHA-256(name || 0x0A || algorithm || public key)."""
    return hashlib.sha256(name.encode() + b"\n" + algorithm + public_key).digest()[:4]


def read_key(vkey: str, algorithm: bytes, kind: str, make: Callable[[str, bytes], Key]) -> Key:
    """A key of `kind` from its line `<name>+<id hex>+<base64(algorithm || key)>`, the newline optional, by `make(name,
    key)`; raises NoteError KEY_FORMAT."""
    name, _, rest = vkey.removesuffix("\n").partition("+")
    identity, _, encoded = rest.partition("+")
    raw = decode_base64(encoded)
    try:
        if raw is None or len(raw) != 33 or raw[:1] != algorithm:
            raise ValueError(f"it is not an Ed25519 key with algorithm 0x{algorithm.hex()}")
        key = make(name, raw[1:])
    except ValueError as error:
        raise NoteError("KEY_FORMAT", f"cannot read the {kind} key: {error}") from error
    if identity != key_id(name, raw[1:], algorithm).hex():
        raise NoteError("KEY_FORMAT", f"cannot read the {kind} key: its id does not match its name and key")
    return key


@dataclass(frozen=True, slots=True)
class Verifier:
    """A public key with its name; travels as `<name>+<id hex>+<base64(0x01 || key)>`."""

    name: str
    public_key: bytes
    _key: Ed25519PublicKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        object.__setattr__(self, "_key", Ed25519PublicKey.from_public_bytes(self.public_key))

    @classmethod
    def parse(cls, vkey: str) -> Verifier:
        """Reads a verifier key line, its newline optional; raises NoteError KEY_FORMAT."""
        return read_key(vkey, _ALGORITHM, "verifier", cls)

    @property
    def key_id(self) -> bytes:
        return key_id(self.name, self.public_key)

    def __str__(self) -> str:
        encoded = base64.b64encode(_ALGORITHM + self.public_key).decode()
        return f"{self.name}+{self.key_id.hex()}+{encoded}"

    def open(self, note: str) -> str:
        """The text of a note signed by this key; raises NoteError NOTE_FORMAT or NOTE_SIGNATURE."""
        text, signatures = split_note(note)
        verified = False
        for name, raw in signatures:
            if name != self.name or raw[:4] != self.key_id:
                continue
            try:
                self._key.verify(raw[4:], text.encode())
            except InvalidSignature:
                raise NoteError("NOTE_SIGNATURE", f"the signature of {self.name} does not verify") from None
            verified = True
        if not verified:
            raise NoteError("NOTE_SIGNATURE", f"there is no signature of {self.name} with key {self.key_id.hex()}")
        return text


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key with its name. `repr` shows neither."""

    name: str
    seed: bytes = field(repr=False)
    _key: Ed25519PrivateKey = field(init=False, repr=False, compare=False)
    verifier: Verifier = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        key = Ed25519PrivateKey.from_private_bytes(self.seed)
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "verifier", Verifier(self.name, key.public_key().public_bytes_raw()))

    def sign(self, text: str) -> str:
        """The note of `text`, which ends in a newline. Ed25519 is deterministic: so is the note."""
        if not text.endswith("\n"):
            raise ValueError("a note's text ends in a newline")
        raw = self.verifier.key_id + self._key.sign(text.encode())
        return f"{text}\n{DASH}{self.name} {base64.b64encode(raw).decode()}\n"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A commitment to the first `size` entries of the log `origin`."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


def parse_checkpoint(text: str) -> Checkpoint:
    """The three lines of a checkpoint's text; raises NoteError NOTE_FORMAT."""
    lines = text.split("\n")
    if len(lines) != 4 or lines[3] or not lines[0]:
        raise NoteError("NOTE_FORMAT", "a checkpoint has exactly three lines")
    size = lines[1]
    # isdecimal alone would let other scripts' digits through
    if not (size.isascii() and size.isdecimal()) or len(size) > 16 or (size[0] == "0" and size != "0"):
        raise NoteError("NOTE_FORMAT", "the checkpoint's size is not a plain decimal number")
    if int(size) > SIZE_MAX:
        raise NoteError("NOTE_FORMAT", f"the checkpoint's size is beyond {SIZE_MAX}")
    root = decode_base64(lines[2])
    if root is None or len(root) != 32:
        raise NoteError("NOTE_FORMAT", "the checkpoint's root is not 32 bytes of base64")
    return Checkpoint(lines[0], int(size), root)


def node_of(origin: str) -> str | None:
    """The node that an origin `aether/<node id>/<epoch>` names."""
    parts = origin.split("/")
    return parts[1] if len(parts) == 3 and parts[0] == "aether" else None


def open_checkpoint(note: str, verifier: Verifier) -> Checkpoint:
    """The checkpoint in a signed note; raises NoteError, CHECKPOINT_ORIGIN when it is another log's."""
    checkpoint = parse_checkpoint(verifier.open(note))
    if checkpoint.origin != verifier.name:
        raise NoteError("CHECKPOINT_ORIGIN", f"the checkpoint is of {checkpoint.origin!r}, not {verifier.name!r}")
    return checkpoint


def _is_name(name: str) -> bool:
    return bool(name) and "+" not in name and not any(c.isspace() for c in name)


def check_name(name: str) -> None:
    """Raises ValueError unless `name` may be that of a key."""
    if not _is_name(name):
        raise ValueError(f"cannot use {name[:80]!r} as a key name: it is empty or holds white space or '+'")


def split_note(note: str) -> tuple[str, list[tuple[str, bytes]]]:
    """The text, and name and bytes (key id first) of each signature, unchecked. Raises NoteError NOTE_FORMAT."""
    if len(note.encode("utf-8", "surrogatepass")) > NOTE_BYTES_MAX:
        raise NoteError("NOTE_FORMAT", f"the note is longer than {NOTE_BYTES_MAX} bytes")
    if any((c < " " and c != "\n") or "\ud800" <= c <= "\udfff" for c in note):
        raise NoteError("NOTE_FORMAT", "the note holds control characters")
    head, gap, tail = note.rpartition("\n\n")
    if not gap or not tail.endswith("\n"):
        raise NoteError("NOTE_FORMAT", "the note has no signature lines after an empty line")
    signatures: list[tuple[str, bytes]] = []
    for line in tail[:-1].split("\n"):
        name, _, encoded = line.removeprefix(DASH).partition(" ")
        raw = decode_base64(encoded)
        if not line.startswith(DASH) or not _is_name(name) or raw is None or len(raw) < 5:
            raise NoteError("NOTE_FORMAT", f"{line[:80]!r} is not a signature line")
        signatures.append((name, raw))
    return head + "\n", signatures


def decode_base64(text: str) -> bytes | None:
    """The bytes of RFC 4648 section 4 in its one spelling, else None.

    The module's own decoder takes pad bits that are not zero: four spellings of a 64-byte signature would verify.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if base64.b64encode(raw).decode() == text else None
