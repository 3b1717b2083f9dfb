"""One trajectory file for `predict` and `score`: `{t[n] or dt[n-1], obs[n], action[n-1] or action[n]}`. Pure.

A model takes n observations and the n-1 actions between them. A recording often has an action per observation:
its last one has no successor yet, so it is what `predict` holds, and `score` leaves it out. With n-1 actions
`predict` holds the last of them (zero-order hold).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aether.contract.errors import AetherError

_SEQUENCE = ("t", "dt", "obs", "action")


def prediction(given: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The history and the held action; `{history, action}` is taken as it stands. Raises BAD_FIELD."""
    if "history" in given:
        return given["history"], given.get("action", [])
    rows, count = given.get("action"), _count(given)
    if not isinstance(rows, list) or not rows:
        raise AetherError(
            "BAD_FIELD", "cannot predict: the input names no action", "add `action` rows, or give {history, action}"
        )
    history = {name: given[name] for name in _SEQUENCE if name in given}
    if len(rows) == count:
        history["action"] = rows[:-1]
    return history, rows[-1]


def sequence(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `score` sends."""
    rows = given.get("action")
    if isinstance(rows, list) and rows and len(rows) == _count(given):
        return {**given, "action": rows[:-1]}
    return dict(given)


def _count(given: Mapping[str, Any]) -> int | None:
    """How many observations there are, when they are plain rows."""
    rows = given.get("obs")
    return len(rows) if isinstance(rows, list) else None
