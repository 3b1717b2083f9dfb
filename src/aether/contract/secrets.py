"""References to secrets: where egressd finds a value. Pure; a reference is no secret itself.

file:/absolute/path                 a file that egressd may read
env:AETHER_SECRET_ and more         a variable that egressd alone was started with
age:/absolute/path.age              a file encrypted with age (age-encryption.org/v1), its identity egressd's
vault:MOUNT/PATH#FIELD              a field of a secret in a KV version 2 engine of Vault
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from aether.contract.errors import AetherError

SECRET_VARIABLE: Final = "AETHER_SECRET_"
"""Variables that begin so are secrets: egressd alone is started with them."""
SECRETS_MAX: Final = 16
"""Of one job."""
SOURCE_PATTERN: Final = (
    rf"(?:file|age):/[^\x00-\x1f\x7f]{{1,1023}}|env:{SECRET_VARIABLE}[A-Z0-9_]{{1,100}}"
    r"|vault:[A-Za-z0-9_-]{1,64}(?:/[A-Za-z0-9_.-]{1,128}){1,16}#[A-Za-z0-9_.-]{1,128}"
)
VARIABLE_PATTERN: Final = r"[A-Za-z_][A-Za-z0-9_]{0,127}"
_SOURCE: Final = re.compile(SOURCE_PATTERN)
_VARIABLE: Final = re.compile(VARIABLE_PATTERN)


def check_source(what: str, source: str) -> None:
    """Raises AetherError BAD_FIELD for what is no reference."""
    if _SOURCE.fullmatch(source) is None or ".." in re.split("[/#]", source):
        ways = f"file:/absolute/path, age:/absolute/path, env:{SECRET_VARIABLE}NAME or vault:MOUNT/PATH#FIELD"
        raise AetherError("BAD_FIELD", f"cannot accept {what}: its source must be {ways}")


def check_secrets(secrets: Mapping[str, str], env: Mapping[str, str]) -> None:
    """Those of a job, by variable; raises AetherError BAD_FIELD."""
    if len(secrets) > SECRETS_MAX:
        raise AetherError("BAD_FIELD", f"cannot accept the secrets: more than {SECRETS_MAX}")
    for name, source in secrets.items():
        what = f"secret {name[:80]!r}"
        if _VARIABLE.fullmatch(name) is None or name in env:
            raise AetherError("BAD_FIELD", f"cannot accept {what}: it must be the name of a variable that env has not")
        check_source(what, source)


def path_of(source: str) -> str | None:
    """The file that a reference names, which a ticket's `paths` must allow reading."""
    kind, _, where = source.partition(":")
    return where if kind in ("file", "age") else None
