"""The root secret of tickets on disk: 64 hex digits, mode 0600, made at the first start."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from aether.contract.errors import AetherError
from aether.substrate.access.tickets import SECRET_BYTES


def open_secret(path: Path, random: Callable[[int], bytes] = os.urandom) -> bytes:
    """The secret in `path`, created when absent. Raises AetherError STATE_UNUSABLE."""
    try:
        if not path.exists():
            _create(path, random(SECRET_BYTES))
        if path.stat().st_mode & 0o077:
            raise AetherError(
                "STATE_UNUSABLE", f"cannot use the ticket key {path}: others can read it", f"chmod 600 {path}"
            )
        secret = bytes.fromhex(path.read_text().strip())
    except OSError as error:
        raise AetherError("STATE_UNUSABLE", f"cannot open the ticket key {path}: {error.strerror}") from error
    except ValueError as error:
        raise AetherError("STATE_UNUSABLE", f"cannot use the ticket key {path}: it is malformed") from error
    if len(secret) != SECRET_BYTES:
        raise AetherError("STATE_UNUSABLE", f"cannot use the ticket key {path}: it is malformed")
    return secret


def _create(path: Path, secret: bytes) -> None:
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, secret.hex().encode() + b"\n")
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
