"""Names of allocated cells and of executables in them.

A name is `/`-separated labels, the way from the outermost cell inwards: `agent` or `agent/worker-1`. A label is that
of a host name (RFC 1123): letters, digits and inner hyphens, at most 63. It holds no underscore, so neither an id
(`cell_...`) nor the `_` leaf of a cgroup is ever mistaken for a name. In a URL, where `/` separates paths, the labels
are separated by `:`.
"""

from __future__ import annotations

import re
from typing import Final

from aether.contract import ids, limits
from aether.contract.errors import AetherError

LABEL: Final = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
NAME_PATTERN: Final = rf"^{LABEL}(/{LABEL}){{0,{limits.CELL_DEPTH_MAX - 1}}}$"
_UUID7: Final = r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
PATH_NAME_PATTERN: Final = rf"^(cell_{_UUID7}|{LABEL}(:{LABEL}){{0,{limits.CELL_DEPTH_MAX - 1}}})$"
_NAME: Final = re.compile(NAME_PATTERN, re.ASCII)
_EXECUTABLE: Final = re.compile(f"^{LABEL}$", re.ASCII)


def check_name(text: str) -> str:
    """`text` as a cell's name; raises AetherError BAD_FIELD."""
    if len(text) > limits.CELL_NAME_CHARS_MAX or _NAME.fullmatch(text) is None:
        raise AetherError(
            "BAD_FIELD",
            f"cannot name a cell {text[:80]!r}: a name is labels of letters, digits and inner hyphens, joined by /",
            f"use at most {limits.CELL_DEPTH_MAX} labels of at most 63 characters",
        )
    return text


def check_executable(text: str) -> str:
    """`text` as the name of an executable, one label; raises AetherError BAD_FIELD."""
    if _EXECUTABLE.fullmatch(text) is None:
        raise AetherError("BAD_FIELD", f"cannot name an executable {text[:80]!r}: use letters, digits, inner hyphens")
    return text


def parent_of(name: str) -> str | None:
    """The name of the cell around it; None for an outermost one."""
    return name.rpartition("/")[0] or None


def is_within(name: str, ancestor: str) -> bool:
    """Whether `name` is `ancestor` or lies in it."""
    return name == ancestor or name.startswith(ancestor + "/")


def reference(text: str) -> str:
    """A cell's id, or a name in either spelling, as the authority understands it; raises BAD_ID."""
    if text.startswith(f"{ids.CELL}_"):
        return ids.parse(ids.CELL, text)
    name = text.replace(":", "/")
    if len(name) > limits.CELL_NAME_CHARS_MAX or _NAME.fullmatch(name) is None:
        raise AetherError("BAD_ID", f"cannot read {text[:80]!r}: neither a cell id nor the name of a cell")
    return name


def in_path(text: str) -> str:
    """An id or name as it stands in a URL."""
    return text.replace("/", ":")
