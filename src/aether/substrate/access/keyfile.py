"""The root secrets of tickets on disk: one line `<name> <64 hex digits>` each, mode 0600, made at the first start.

`implicit` is for the tickets that uids have by themselves; their text never leaves the authority, so it stays. `e1`,
`e2`, ... are epochs, oldest first: the last is minted with, an earlier one is kept for as long as a ticket of it may
still be used. The log says which epoch is the newest (`ticket.key-rotated`, written first); the file follows. It is
replaced by rename, so that a death leaves the old one or the new one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from aether.contract.errors import AetherError
from aether.substrate.access.tickets import SECRET_BYTES
from aether.substrate.audit.files import fsync_dir, write_file

IMPLICIT: Final = "implicit"
_EPOCH: Final = re.compile(r"e([1-9][0-9]{0,8})")
Random = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Keys:
    """The secrets as they stand; `epochs` by name, oldest first."""

    implicit: bytes = field(repr=False)
    epochs: dict[str, bytes] = field(repr=False)

    @property
    def newest(self) -> str:
        return list(self.epochs)[-1]


def epoch_name(number: int) -> str:
    return f"e{number}"


def epoch_number(name: str) -> int:
    """The number in an epoch's name; 0 for what is none."""
    match = _EPOCH.fullmatch(name)
    return int(match[1]) if match else 0


def settle(path: Path, newest: int, needed: Collection[str], random: Random = os.urandom) -> Keys:
    """The keys in `path` after it was brought to the state that the log asks for: epoch `newest` is there, and of
    those before it the `needed` ones alone. Made when absent. Raises AetherError STATE_UNUSABLE."""
    try:
        found = _read(path) if path.exists() else None
        implicit = found.implicit if found else random(SECRET_BYTES)
        epochs = dict(found.epochs) if found else {}
        last = max([newest, *map(epoch_number, epochs)])
        kept = {name: secret for name, secret in epochs.items() if name in needed or epoch_number(name) == last}
        kept.setdefault(epoch_name(last), random(SECRET_BYTES))
        keys = Keys(implicit, kept)
        if keys != found:
            _write(path, keys)
    except OSError as error:
        raise AetherError("STATE_UNUSABLE", f"cannot open the ticket keys {path}: {error.strerror}") from error
    return keys


def _read(path: Path) -> Keys:
    if path.stat().st_mode & 0o077:
        why = "others can read it"
        raise AetherError("STATE_UNUSABLE", f"cannot use the ticket keys {path}: {why}", f"chmod 600 {path}")
    try:
        secrets = {name: bytes.fromhex(digits) for name, digits in map(str.split, path.read_text().splitlines())}
    except ValueError:
        secrets = {}
    implicit = secrets.pop(IMPLICIT, b"")
    numbers = [epoch_number(name) for name in secrets]
    whole = all(len(secret) == SECRET_BYTES for secret in (implicit, *secrets.values()))
    if not (whole and numbers and all(numbers) and numbers == sorted(numbers)):
        raise AetherError("STATE_UNUSABLE", f"cannot use the ticket keys {path}: it is malformed")
    return Keys(implicit, secrets)


def _write(path: Path, keys: Keys) -> None:
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    lines = [f"{name} {secret.hex()}\n" for name, secret in ((IMPLICIT, keys.implicit), *keys.epochs.items())]
    write_file(path, "".join(lines).encode(), mode=0o600, sync=True)
    fsync_dir(path.parent)
