"""The log's private key on disk: one line `PRIVATE+KEY+<name>+<id hex>+<base64(0x01 || seed)>`, mode 0600.

The form is that of golang.org/x/mod/sumdb/note, so other signed-note tools read it. The public half is written
beside it as a verifier key for everybody.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from aether.contract.errors import AetherError
from aether.substrate.audit.files import fsync_dir, write_file
from aether.substrate.audit.note import Signer

_PREFIX: Final = "PRIVATE+KEY+"


def open_signer(private: Path, public: Path, name: str, random: Callable[[int], bytes] = os.urandom) -> Signer:
    """The signer kept in `private`, created at the first start; `public` is (re)written to match.

    Raises AetherError STATE_UNUSABLE for a key that others can read, that is malformed or that has another
    name: a log keeps one key and one origin.
    """
    try:
        signer = _read(private, name) if private.exists() else _create(private, name, random)
        line = f"{signer.verifier}\n".encode()
        if not public.exists() or public.read_bytes() != line:
            write_file(public, line, mode=0o644, sync=True)
            fsync_dir(public.parent)
    except OSError as error:
        raise AetherError("STATE_UNUSABLE", f"cannot open the audit key {private}: {error.strerror}") from error
    return signer


def _create(private: Path, name: str, random: Callable[[int], bytes]) -> Signer:
    signer = Signer(name, random(32))
    encoded = base64.b64encode(b"\x01" + signer.seed).decode()
    line = f"{_PREFIX}{name}+{signer.verifier.key_id.hex()}+{encoded}\n"
    private.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    write_file(private, line.encode(), mode=0o600, sync=True)
    fsync_dir(private.parent)
    return signer


def _read(private: Path, name: str) -> Signer:
    if private.stat().st_mode & 0o077:
        raise AetherError(
            "STATE_UNUSABLE", f"cannot use the audit key {private}: others can read it", f"chmod 600 {private}"
        )
    parts = private.read_text().strip().removeprefix(_PREFIX).split("+", 2)
    try:
        raw = base64.b64decode(parts[2], validate=True)
        signer = Signer(parts[0], raw[1:])
    except (ValueError, IndexError) as error:
        raise AetherError("STATE_UNUSABLE", f"cannot use the audit key {private}: it is malformed") from error
    if raw[:1] != b"\x01" or parts[1] != signer.verifier.key_id.hex() or parts[0] != name:
        raise AetherError("STATE_UNUSABLE", f"cannot use the audit key {private}: it is not the key of {name}")
    return signer
