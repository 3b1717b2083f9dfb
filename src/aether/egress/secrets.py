"""Credentials: read from their reference when a cell is opened, put into requests to their host, taken out of answers.

A value lives in this process only, for as long as its cell. It has no representation as text, so that no log line,
record or traceback shows it. A server that echoes what it was sent would hand it to the cell: `Mask` blanks it in
everything that comes back (answers to such requests are asked for uncompressed, so that it can be seen).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from aether.contract import limits
from aether.contract.errors import AetherError
from aether.contract.network import Credential

MASK_BYTES_MIN: Final = 6
"""Shorter values would be found by chance in ordinary bytes."""


@dataclass(frozen=True, slots=True)
class Injection:
    """A header to send for one credential."""

    name: str
    header: bytes
    value: bytes = field(repr=False)
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where references may point: `state` is refused but for `shown` below it; `environment` is this process's."""

    state: Path
    shown: Path
    environment: Mapping[str, str] = field(repr=False)

    def load(self, credential: Credential) -> Injection:
        """Raises AetherError BAD_FIELD when the value cannot be had or cannot be a header."""
        kind, _, where = credential.source.partition(":")
        found = self.environment.get(where, "").encode() if kind == "env" else self._read(credential, Path(where))
        secret = found.strip(b"\r\n\t ")
        if not secret or any(byte < 0x20 or byte == 0x7F for byte in secret):
            raise _unusable(credential, "it is empty or no single line of text")
        header = credential.header.lower().encode()
        return Injection(credential.name, header, credential.prefix.encode() + secret, secret)

    def _read(self, credential: Credential, path: Path) -> bytes:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise _unusable(credential, f"{path}: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise _unusable(credential, f"{path} is no regular file")
        with open(fd, "rb") as file:
            real = Path(f"/proc/self/fd/{fd}").readlink()  # what was opened, through whatever links
            if real.is_relative_to(self.state.resolve()) and not real.is_relative_to(self.shown.resolve()):
                raise _unusable(credential, f"{path} lies in the state directory")
            value = file.read(limits.EGRESS_SECRET_BYTES_MAX + 1)
        if len(value) > limits.EGRESS_SECRET_BYTES_MAX:
            raise _unusable(credential, f"{path} is longer than {limits.EGRESS_SECRET_BYTES_MAX} bytes")
        return value


def _unusable(credential: Credential, why: str) -> AetherError:
    return AetherError(
        "BAD_FIELD",
        f"cannot use credential {credential.name}: {why}",
        "name a file that egressd may read (`aether health --json` says its uid), or a variable it was started with",
    )


class Mask:
    """Replaces every occurrence of a secret in a stream of bytes by as many `*`, whatever way the stream is cut."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret if len(secret) >= MASK_BYTES_MIN else b""
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What can be passed on now; an end that may be the beginning of the secret is held back."""
        if not self._secret:
            return data
        data = (self._held + data).replace(self._secret, b"*" * len(self._secret))
        keep = next(
            (n for n in range(min(len(self._secret) - 1, len(data)), 0, -1) if data.endswith(self._secret[:n])), 0
        )
        self._held = data[len(data) - keep :]
        return data[: len(data) - keep]

    def rest(self) -> bytes:
        """What was held back, at the end."""
        held, self._held = self._held, b""
        return held

    def whole(self, data: bytes) -> bytes:
        """The same for a value that is all there."""
        return data.replace(self._secret, b"*" * len(self._secret)) if self._secret else data
