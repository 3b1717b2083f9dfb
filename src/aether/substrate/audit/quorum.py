"""How many of the witnesses that a verifier trusts cosigned what it looks at, pure.

A note counts for a witness when its cosignature on it verifies; whether the log contains what the note says is checked
where notes are. A cosignature of a trusted witness that does not verify is a failure by itself (NOTE_SIGNATURE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from aether.substrate.audit.cosign import WitnessKey, cosigned_by
from aether.substrate.audit.note import NoteError, parse_checkpoint, split_note
from aether.substrate.audit.report import Findings


@dataclass(slots=True)
class Quorum:
    """`needed` of `keys` must have cosigned. After `check`, `sizes` says up to which size each did."""

    keys: Sequence[WitnessKey] = ()
    needed: int = 0
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, vkeys: Sequence[str], needed: int | None) -> Quorum:
        """All of the keys unless `needed` says how many. Raises NoteError KEY_FORMAT, ValueError."""
        keys = tuple(WitnessKey.parse(vkey) for vkey in vkeys)
        distinct = len({key.public_key for key in keys})
        needed = distinct if needed is None else needed
        if not 0 <= needed <= distinct:
            raise ValueError(f"a quorum of {needed} cannot be had of {distinct} witnesses")
        return cls(keys, needed)

    def check(self, notes: Mapping[str, bytes], found: Findings) -> None:
        """Adds to `found` when fewer than needed cosigned any of the notes (by a name for the report)."""
        if not self.keys:
            return
        for place, raw in notes.items():
            try:
                note = raw.decode()
                size = parse_checkpoint(split_note(note)[0]).size
                for name in cosigned_by(note, self.keys):
                    self.sizes[name] = max(size, self.sizes.get(name, 0))
            except UnicodeDecodeError:
                continue  # no note at all: said where notes are read
            except NoteError as error:
                if error.code == "NOTE_SIGNATURE":
                    found.add(error.code, place, error.reason)
        if len(self.sizes) < self.needed:
            reason = f"{len(self.sizes)} of {len(self.keys)} witnesses cosigned, {self.needed} are needed"
            found.add("WITNESS_QUORUM", "cosignatures", reason)

    def facts(self) -> dict[str, int | str | None]:
        """`witnesses` that cosigned, and the size up to which as many as needed did; nothing where none is trusted."""
        if not self.keys:
            return {}
        sizes = sorted(self.sizes.values(), reverse=True)
        count = max(self.needed, 1)
        return {"witnesses": len(sizes), "witnessed_size": sizes[count - 1] if len(sizes) >= count else None}


NO_QUORUM: Final = Quorum()
