"""The audit log with its keys: opened for the epoch that `keys/node.json` says, and how the next one begins.

Keys: `audit.key` (epoch 1) or `audit-<epoch>.key` signs, `audit.pub` is its public half; `audit-<epoch>.pub` is that of
each epoch that another followed. The next epoch counts from the moment that `node.json` says it: before that a key that
was made for it is taken up again, after it the log is opened under it and begins with a record that commits to the
last checkpoint of the epoch before.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.paths import Layout
from aether.daemons import process
from aether.daemons.node import NodeFile, write_node
from aether.substrate.audit.keyfile import open_signer
from aether.substrate.audit.log import AuditLog
from aether.substrate.audit.note import NoteError, Signer, Verifier
from aether.substrate.audit.redact import mask_also, read_patterns
from aether.substrate.auditentries import opening
from aether.substrate.auditkeeping import Rotation


def open_log(layout: Layout, node: NodeFile, log: Any) -> tuple[AuditLog, Signer]:
    """Raises AetherError as `open_signer` and `AuditLog.open` do, and STATE_UNUSABLE without the former key or with a
    file of patterns that cannot be used."""
    mask_also(_patterns(layout))
    signer = open_signer(layout.audit_key(node.epoch), layout.audit_public_key, node.origin)
    former = _former(layout, node.epoch - 1) if node.epoch > 1 else None
    audit = AuditLog.open(
        layout.audit,
        signer,
        node.origin,
        now_ns=time.monotonic_ns,
        on_fatal=process.die(log, "the audit log cannot be written"),
        former=former,
        opening=opening(node.node_id, former, lambda: rfc3339(time.time_ns())) if former is not None else None,
    )
    return audit, signer


def rotation(layout: Layout, node: NodeFile, restart: Callable[[], None]) -> Rotation:
    """How this node's log gets its next key."""
    following = node.next

    def prepare() -> Signer:
        # the same key as now: it writes the public half under the name that stays
        open_signer(layout.audit_key(node.epoch), layout.audit_epoch_key(node.epoch), node.origin)
        return open_signer(layout.audit_key(following.epoch), layout.audit_epoch_key(following.epoch), following.origin)

    return Rotation(prepare, lambda: write_node(layout.keys / "node.json", following), restart)


def _patterns(layout: Layout) -> tuple[re.Pattern[str], ...]:
    """What is masked in records besides the known forms of secrets."""
    try:
        return read_patterns(layout.mask.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        why = f"cannot read the patterns in {layout.mask}: {error}"
        raise AetherError("STATE_UNUSABLE", why, "correct that file, or take it away") from error


def _former(layout: Layout, epoch: int) -> Verifier:
    path = layout.audit_epoch_key(epoch)
    try:
        return Verifier.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, NoteError) as error:
        raise AetherError("STATE_UNUSABLE", f"cannot read the key of the epoch before, {path}: {error}") from error
