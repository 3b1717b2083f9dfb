"""Labels: data-flow marks on jobs, artifacts, images and allocated cells.

They only ever add up. What a job reads is marked on it before the policy is asked, what it leaves is marked as it is,
and nobody takes a mark away; `local-only` is the one that the authority itself knows: it means no way out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from aether.contract import limits
from aether.contract.errors import AetherError

LOCAL_ONLY: Final = "local-only"
ISOLATED: Final = ("netns",)
"""What a cell of something local-only must be given, or it is not made."""


def union(*groups: Iterable[str]) -> tuple[str, ...]:
    """All of them, sorted; raises BAD_FIELD above LABELS_CARRIED_MAX."""
    found = {label for group in groups for label in group}
    if len(found) > limits.LABELS_CARRIED_MAX:
        why = f"{len(found)} come together, and the bound is {limits.LABELS_CARRIED_MAX}"
        raise AetherError("BAD_FIELD", f"cannot carry the labels: {why}")
    return tuple(sorted(found))


def check_stays(labels: Iterable[str], *, reaches: bool, isolated: bool, what: str) -> None:
    """Nothing local-only goes where there is a way out, whatever a policy permits; raises LABEL_REFUSED."""
    if LOCAL_ONLY in labels and (reaches or not isolated):
        why = "it has a network" if reaches else "it shares the host's network"
        raise AetherError("LABEL_REFUSED", f"cannot {what}: {why}, and what goes in is {LOCAL_ONLY}")
