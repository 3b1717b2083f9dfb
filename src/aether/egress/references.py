"""What references to secrets stand for, read anew each time they are used: a changed value counts from the next use.

Files are opened without following where they lead into the state directory. age files are decrypted with the identity
in `secrets/age-identity` of the state directory (X25519, one per line; extra `age`). Vault is spoken to over HTTP at
AETHER_SECRET_VAULT_ADDR (http://127.0.0.1:PORT, https://..., or unix:/path), with the token in `secrets/vault-token`;
of the KV version 2 engine only `GET /v1/MOUNT/data/PATH` is used. Values have at most EGRESS_SECRET_BYTES_MAX bytes.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

from aether.contract import limits
from aether.contract.errors import AetherError

AGE_IDENTITY: Final = "age-identity"
VAULT_TOKEN: Final = "vault-token"
VAULT_ADDRESS: Final = "AETHER_SECRET_VAULT_ADDR"
VAULT_TIMEOUT_S: Final = 5.0
_ANSWER_BYTES_MAX: Final = 256 * limits.KIB


@dataclass(frozen=True, slots=True)
class References:
    """Where references may point: `state` is refused but for `shown` below it; `environment` is this process's."""

    state: Path
    shown: Path
    environment: Mapping[str, str] = field(repr=False)

    def read(self, what: str, source: str) -> bytes:
        """The value, without white space around it; `what` names the use. Blocks. Raises AetherError BAD_FIELD."""
        kind, _, where = source.partition(":")
        if kind == "env":
            found = self.environment.get(where, "").encode()
        elif kind == "age":
            found = self._decrypted(what, Path(where))
        elif kind == "vault":
            found = self._from_vault(what, where)
        else:
            found = self._file(what, Path(where), limits.EGRESS_SECRET_BYTES_MAX)
        value = found.strip(b"\r\n\t ")
        if not value or len(value) > limits.EGRESS_SECRET_BYTES_MAX or any(b < 0x20 or b == 0x7F for b in value):
            raise unusable(what, "it is empty, too long, or no single line of text")
        return value

    def _file(self, what: str, path: Path, bytes_max: int) -> bytes:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise unusable(what, f"{path}: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise unusable(what, f"{path} is no regular file")
        with open(fd, "rb") as file:
            real = Path(f"/proc/self/fd/{fd}").readlink()  # what was opened, through whatever links
            if real.is_relative_to(self.state.resolve()) and not real.is_relative_to(self.shown.resolve()):
                raise unusable(what, f"{path} lies in the state directory")
            value = file.read(bytes_max + 1)
        if len(value) > bytes_max:
            raise unusable(what, f"{path} is longer than {bytes_max} bytes")
        return value

    # ---- age

    def _decrypted(self, what: str, path: Path) -> bytes:
        try:
            from pyrage import DecryptError, decrypt, x25519
        except ImportError as error:
            raise unusable(what, "age files need the extra `age`: pip install 'aether-substrate[age]'") from error
        sealed = self._file(what, path, 4 * limits.EGRESS_SECRET_BYTES_MAX)
        lines = self._file(what, self.shown / AGE_IDENTITY, limits.EGRESS_SECRET_BYTES_MAX).decode().split()
        try:
            identities = [x25519.Identity.from_str(line) for line in lines if line.startswith("AGE-SECRET-KEY-")]
            return bytes(decrypt(sealed, identities))
        except (DecryptError, ValueError, Exception) as error:
            # what the library says may quote the identity
            raise unusable(what, f"{path} cannot be decrypted with {self.shown / AGE_IDENTITY}") from error

    # ---- Vault

    def _from_vault(self, what: str, where: str) -> bytes:
        path, _, name = where.partition("#")
        mount, _, rest = path.partition("/")
        token = self._file(what, self.shown / VAULT_TOKEN, limits.EGRESS_SECRET_BYTES_MAX).strip().decode("ascii")
        connection = self._vault(what)
        try:
            connection.request("GET", f"/v1/{quote(mount)}/data/{quote(rest)}", headers={"X-Vault-Token": token})
            answer = connection.getresponse()
            body = answer.read(_ANSWER_BYTES_MAX)
        except (OSError, http.client.HTTPException) as error:
            raise unusable(what, f"Vault does not answer: {type(error).__name__}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise unusable(what, f"Vault answered {answer.status} for {path}")
        try:
            value = json.loads(body)["data"]["data"][name]
        except (ValueError, KeyError, TypeError) as error:
            raise unusable(what, f"{path} has no field {name}") from error
        if not isinstance(value, str):
            raise unusable(what, f"the field {name} of {path} is no text")
        return value.encode()

    def _vault(self, what: str) -> http.client.HTTPConnection:
        address = self.environment.get(VAULT_ADDRESS, "")
        if address.startswith("unix:/"):
            return _UnixConnection(address.removeprefix("unix:"))
        parts = urlsplit(address)
        if parts.scheme == "https" and parts.hostname:
            return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=VAULT_TIMEOUT_S)
        if parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost"):
            return http.client.HTTPConnection(parts.hostname, parts.port, timeout=VAULT_TIMEOUT_S)
        raise unusable(what, f"{VAULT_ADDRESS} must be https://..., unix:/path, or http:// on the loopback")


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket, such as Vault's own listener of that type."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=VAULT_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(VAULT_TIMEOUT_S)
        self.sock.connect(self._path)


def unusable(what: str, why: str) -> AetherError:
    return AetherError(
        "BAD_FIELD",
        f"cannot use {what}: {why}",
        "name what egressd may read (`aether health --json` says its uid), or a variable it was started with",
    )
