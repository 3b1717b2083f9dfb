"""Strict reading of the fields of a cell plan: each function returns the value it was given, or raises PlanError.

Standard library only, because the spawner reads plans with it. `field` names the place in messages.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Sequence
from dataclasses import MISSING, fields
from typing import Any, Final, NoReturn, cast

PATH_BYTES_MAX: Final = 1024


class PlanError(ValueError):
    """A plan or executable specification that is refused. `field` says where, `why` says why."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"cannot use plan: {field}: {why}")
        self.field = field
        self.why = why


def refuse(field: str, why: str) -> NoReturn:
    raise PlanError(field, why)


def object_of(value: object, field: str, required: Collection[str], optional: Collection[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        refuse(field, "must be an object")
    for name in value:
        if name not in required and name not in optional:
            refuse(f"{field}.{name}"[:120], "unknown field")
    for name in required:
        if name not in value:
            refuse(f"{field}.{name}", "missing")
    return cast("dict[str, Any]", value)


def dataclass_object(value: object, field: str, kind: type[Any], *also: str) -> dict[str, Any]:
    """Required are the fields of `kind` without a default."""
    names = {f.name: f.default is MISSING for f in fields(kind)}
    required = [*also, *(n for n, needed in names.items() if needed)]
    return object_of(value, field, required, [n for n, needed in names.items() if not needed])


def integer(value: object, field: str, low: int, high: int) -> int:
    """Integers above 2^53 may travel as decimal strings."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        refuse(field, f"must be an integer from {low} to {high}")
    return value


def boolean(value: object, field: str) -> bool:
    if not isinstance(value, bool):
        refuse(field, "must be true or false")
    return value


def text(value: object, field: str, bytes_max: int) -> str:
    if not isinstance(value, str):
        refuse(field, "must be a string")
    if "\0" in value:
        refuse(field, "must not hold NUL")
    try:
        size = len(value.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        refuse(field, "must be valid text")
    if size > bytes_max:
        refuse(field, f"must be at most {bytes_max} bytes")
    return value


def match(value: object, field: str, pattern: re.Pattern[str]) -> str:
    found = text(value, field, 256)
    if not pattern.fullmatch(found):
        refuse(field, f"must match {pattern.pattern}")
    return found


def choice(value: object, field: str, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        refuse(field, f"must be one of {', '.join(allowed)}")
    return value


def list_of(value: object, field: str, count_max: int) -> list[Any]:
    if not isinstance(value, list | tuple):
        refuse(field, "must be a list")
    if len(value) > count_max:
        refuse(field, f"must have at most {count_max} entries")
    return list(value)


def path(value: object, field: str) -> str:
    """Absolute, normalised, without '..': the text is the path that is used."""
    found = text(value, field, PATH_BYTES_MAX)
    if not found.startswith("/") or found.startswith("//") or posixpath.normpath(found) != found:
        refuse(field, "must be an absolute normalised path")
    return found


def below_root(value: object, field: str) -> str:
    found = path(value, field)
    if found == "/":
        refuse(field, "must not be the root itself")
    return found


def is_beneath(path: str, root: str) -> bool:
    """Lexically: `path` is `root` or lies below it."""
    return root == "/" or path == root or path.startswith(root + "/")
