"""Operations that keep the log: `audit.growth`, `audit.witnesses`, `audit.cosign`, `audit.retain`, `audit.rotate-key`.

- `audit.cosign` writes no record: what it keeps is signed by the log and by a witness that the node lists, and says
  nothing that the log does not. A record would make the log grow with each round of its witnesses, for ever.
- `audit.retain` takes away whole segments, as `audit.pruning` says. What an open job, a living cell, an approval or the
  snapshot of the ledger still needs is kept, however old.
- `audit.rotate-key` writes the record that names the new key, durable under the old one; then the node's file says the
  next epoch, which is the moment it counts; then the authority ends in good order and its supervisor starts it again:
  its first record commits to the last checkpoint of the old key (docs/formats.md "Epochs").
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aether.contract import auditcalls as wire
from aether.contract.calls import Caller, Nothing
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.limits import AUDIT_KEEP_MS_MAX, AUDIT_KEEP_MS_MIN, WITNESSES_MAX
from aether.substrate.access.access import Resource
from aether.substrate.audit import entry as codec
from aether.substrate.audit.cosign import signature_line
from aether.substrate.audit.log import AuditLog
from aether.substrate.audit.note import NoteError, Signer, decode_base64, split_note
from aether.substrate.audit.submit import WitnessAt, read_witnesses
from aether.substrate.book import Book
from aether.substrate.cellentries import ordered
from aether.substrate.cellhouse import CellHouse
from aether.substrate.gate import Gate
from aether.substrate.workers import WORKER_OP

_SNAPSHOT_TRIES: Final = 100
_WITNESS_FILE_BYTES_MAX: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Rotation:
    """How the composition root changes the key: makes the next one durable, makes it count, starts again with it."""

    prepare: Callable[[], Signer]
    commit: Callable[[], None]
    restart: Callable[[], None]


class AuditKeeping:
    """The handlers; `witnesses` is the file that lists them."""

    def __init__(self, gate: Gate, book: Book, house: CellHouse, witnesses: Path, rotation: Rotation) -> None:
        self._gate = gate
        self._book = book
        self._log: AuditLog = book.log
        self._house = house
        self._witnesses = witnesses
        self._rotation = rotation
        self._turn = asyncio.Lock()

    # ---- checkpoints and witnesses

    async def growth(self, caller: Caller, call: wire.AuditGrowth) -> wire.GrowthProof:
        """`audit.growth`: raises NOT_FOUND for a size that the checkpoint does not reach."""
        self._gate.admit(caller, "audit.growth", Resource(kind="audit"))
        note, size = self._log.published()
        if call.size > size:
            raise AetherError("NOT_FOUND", f"cannot prove {call.size} records: the checkpoint has {size}")
        hashes = self._log.prove_growth(call.size, size) if call.size else ()
        return wire.GrowthProof(size=call.size, checkpoint=note, hashes=hashes)

    async def witnesses(self, caller: Caller, call: Nothing) -> wire.Witnesses:
        """`audit.witnesses`: raises BAD_FIELD when the list cannot be read."""
        self._gate.admit(caller, "audit.witnesses", Resource(kind="audit"))
        return self._states(self._listed())

    async def cosign(self, caller: Caller, call: wire.CosignCall) -> wire.Witnesses:
        """`audit.cosign`: raises NOT_FOUND, and VERIFY_FAILED when one does not verify; then none is kept."""
        self._gate.admit(caller, "audit.cosign", Resource(kind="audit"))
        if not 1 <= len(call.cosignatures) <= WITNESSES_MAX:
            raise AetherError("BAD_FIELD", f"cannot take cosignatures: send 1 to {WITNESSES_MAX}")
        listed = self._listed()
        note = self._log.signed(call.size)
        text = split_note(note)[0]
        checked = [_checked(each, listed, text) for each in call.cosignatures]
        for witness, raw in checked:
            self._log.witnessed.put(witness.key.key_id, call.size, note, signature_line(witness.key.name, raw))
        return self._states(listed)

    def _listed(self) -> tuple[WitnessAt, ...]:
        try:
            with self._witnesses.open("rb") as file:
                text = file.read(_WITNESS_FILE_BYTES_MAX + 1)
            if len(text) > _WITNESS_FILE_BYTES_MAX:
                raise AetherError("BAD_FIELD", f"cannot read the witnesses: more than {_WITNESS_FILE_BYTES_MAX} bytes")
            return read_witnesses(text.decode("utf-8"))
        except FileNotFoundError:
            return ()
        except (OSError, UnicodeDecodeError) as error:
            raise AetherError("BAD_FIELD", f"cannot read the witnesses in {self._witnesses}: {error}") from error

    def _states(self, listed: tuple[WitnessAt, ...]) -> wire.Witnesses:
        found: list[wire.WitnessState] = []
        for each in listed:
            size, note = self._log.witnessed.by_key.get(each.key.key_id.hex(), (None, ""))
            time_s = each.key.time_of(note) if note else None
            found.append(
                wire.WitnessState(
                    witness=each.key.name,
                    key=str(each.key),
                    address=each.address,
                    size=size,
                    cosigned_at=rfc3339(time_s * 1_000_000_000) if time_s is not None else None,
                )
            )
        return wire.Witnesses(size=self._log.published()[1], witnesses=tuple(found))

    # ---- retention

    async def retain(self, caller: Caller, call: wire.RetainCall) -> wire.Retained:
        """`audit.retain`: raises BAD_FIELD, LOG_CORRUPT (the tree lacks the hash of something old: nothing goes)."""
        admission = self._gate.admit(caller, "audit.retain", Resource(kind="audit"))
        if not AUDIT_KEEP_MS_MIN <= call.keep_ms <= AUDIT_KEEP_MS_MAX:
            raise AetherError(
                "BAD_FIELD", f"cannot retain: keep_ms must be within {AUDIT_KEEP_MS_MIN}..{AUDIT_KEEP_MS_MAX}"
            )
        async with self._turn:
            before = rfc3339(self._book.now_ns() - call.keep_ms * 1_000_000)
            await self._seal(before)
            await self._snapshot()
            end, held_by = self._end(before)
            if end is None:
                return wire.Retained(first=self._log.first, pruned=0, log_index=None, held_by=held_by)
            await asyncio.to_thread(self._log.check_prunable, end)
            order = self._house.order(caller, admission, "audit.retain")
            detail = {"before": before, "end": str(end)}
            record = self._house.write(
                order,
                lambda index, now: ordered("audit.pruned", self._gate.node, order, index, now, detail=detail),
            )
            await self._book.durable(record)
            first = self._log.first
            await asyncio.to_thread(self._log.prune, end)
        return wire.Retained(
            first=self._log.first, pruned=self._log.first - first, log_index=record.log_index, held_by=held_by
        )

    async def _seal(self, before: str) -> None:
        """Ends the segment that is written when it begins with something old: the next call may find it old whole."""
        start = self._log.segment_start
        if start < self._log.durable_size and self._time_of(max(start, self._log.first)) < before:
            await self._log.seal()

    async def _snapshot(self) -> None:
        """Brings the ledger's snapshot as far as it goes; on a busy node it is that of a moment ago."""
        for _ in range(_SNAPSHOT_TRIES):
            await self._book.durable_all()
            if self._book.ledger.applied == self._log.durable_size:
                self._book.snapshot()
                return

    def _end(self, before: str) -> tuple[int | None, str | None]:
        """Where to prune to, if anything is to go, and what keeps records that are old enough."""
        needed, why = min(self._needs())
        chosen: int | None = None
        for end in self._log.ends():
            if self._time_of(end - 1) >= before:
                break
            if end > needed:
                return chosen, why
            chosen = end
        return chosen, None

    def _needs(self) -> list[tuple[int, str]]:
        """The first record that each of those who still need some needs."""
        ledger = self._book.ledger
        jobs = [
            (job.intent.log_index, f"job {job.intent.job_id} is open")
            for job in ledger.open.values()
            if job.intent.op != WORKER_OP  # lives as long as the node; the snapshot has what its end needs
        ]
        cells = [(cell.allocated.log_index, f"cell {cell_id} lives") for cell_id, cell in ledger.cells.live.items()]
        asked = [
            (each.requested.log_index, f"approval {each.approval_id} is not closed")
            for each in ledger.approvals.live.values()
        ]
        return [(self._book.snapshot_at, "the ledger's snapshot is older"), *jobs, *cells, *asked]

    def _time_of(self, index: int) -> str:
        return codec.decode(self._log.entry(index)).time

    # ---- the key

    async def rotate_key(self, caller: Caller, call: Nothing) -> wire.AuditKeyRotated:
        """`audit.rotate-key`: answers once the new key counts; the authority then starts again."""
        admission = self._gate.admit(caller, "audit.rotate-key", Resource(kind="audit"))
        async with self._turn:
            order = self._house.order(caller, admission, "audit.rotate-key")
            signer = await asyncio.to_thread(self._rotation.prepare)
            detail = {"key": str(signer.verifier)}
            record = self._house.write(
                order,
                lambda index, now: ordered("audit.key-rotated", self._gate.node, order, index, now, detail=detail),
            )
            await self._book.durable(record)
            former = self._log.published()[0].partition("\n")[0]
            await asyncio.to_thread(self._rotation.commit)
            self._rotation.restart()
        return wire.AuditKeyRotated(
            key=str(signer.verifier), origin=signer.name, former=former, log_index=record.log_index
        )


def _checked(each: wire.Cosignature, listed: tuple[WitnessAt, ...], text: str) -> tuple[WitnessAt, bytes]:
    """The witness and the bytes of its signature. Raises AetherError VERIFY_FAILED."""
    raw = decode_base64(each.signature) or b""
    for witness in listed:
        if witness.key.name == each.witness and raw[:4] == witness.key.key_id:
            try:
                witness.key.check(text, raw)
                return witness, raw
            except NoteError as error:
                raise AetherError("VERIFY_FAILED", f"cannot take a cosignature: {error.reason}") from error
    raise AetherError(
        "VERIFY_FAILED",
        f"cannot take a cosignature: {each.witness[:80]!r} with that key is not listed",
        "list the witness in policy/witnesses",
    )
