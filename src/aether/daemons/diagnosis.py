"""Why an instance does not come up: the last words of a role that keeps ending.

The supervisor counts quick ends in `instance.json`; the words are in the role's log: its "cannot run" line with code
and remedy, or the last line that is no structured one (the spawner's message, the end of a traceback).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

from aether.contract.errors import KINDS, AetherError
from aether.contract.paths import Layout

ENDS_MIN: Final = 2
"""As often a role has to end quickly before waiting for it is called vain."""
_TAIL_BYTES: Final = 65_536
_REASON_CHARS_MAX: Final = 1000
_PASSING: Final = "another spawner uses"
"""The spawner's words for a predecessor that is still ending; aetherd says ALREADY_RUNNING."""


def why_not_up(state: Path, found: dict[str, Any] | None) -> AetherError | None:
    """The error of the first role in `found` (`instance.json`) that keeps ending; None while there is hope."""
    ends = found.get("quick_ends") if found is not None else None
    for role, times in ends.items() if isinstance(ends, dict) else ():
        if isinstance(times, int) and times >= ENDS_MIN:
            error = last_words(state, role)
            if error is not None and error.code != "ALREADY_RUNNING" and _PASSING not in error.message:
                return error
    return None


def last_words(state: Path, role: str) -> AetherError | None:
    """What the role said since it last started; None when it has not said anything yet."""
    log = Layout(state).daemon_logs / f"{role}.log"
    what = f"cannot start an instance in {state}: {role}: "
    for line in reversed(_tail(log)):
        try:
            said = json.loads(line)
        except ValueError:
            return AetherError("UNREACHABLE", what + line[:_REASON_CHARS_MAX], f"see {log}")
        if not isinstance(said, dict) or said.get("event") == "started":
            return None
        if said.get("level") in ("error", "critical"):
            reason = str(said.get("reason") or said.get("error") or said.get("event"))[:_REASON_CHARS_MAX]
            if (code := said.get("code")) in KINDS:
                return AetherError(str(code), what + reason, str(said.get("remedy") or ""))
            return AetherError("UNREACHABLE", what + reason, f"see {log}")
    return None


def _tail(log: Path) -> list[str]:
    """The last whole lines that are not blank."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line.strip() for line in lines[int(size > _TAIL_BYTES) :] if line.strip()]
