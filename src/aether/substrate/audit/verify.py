"""Verifies a log directory offline, with nothing but its files and the public key.

Rules, as in docs/formats.md "Verifying a log"; the name in parentheses is the failure:
- the checkpoint is there (CHECKPOINT_MISSING), is a note (NOTE_FORMAT) signed by the key (NOTE_SIGNATURE) for the
  key's origin (CHECKPOINT_ORIGIN);
- segments follow each other without gap or overlap (SEGMENT_MISSING), with right headers (SEGMENT_HEADER) and valid
  frames (FRAME_BAD); one torn frame may end the log where the checkpoint does not reach;
- each entry is canonical (ENTRY_NOT_CANONICAL), a record (ENTRY_SCHEMA), at its own index (ENTRY_INDEX), of the
  origin's node (ENTRY_NODE);
- the checkpoint's size is there (LOG_SHORT) and the root over it is its root (ROOT_MISMATCH); so it is for every
  checkpoint kept elsewhere;
- tiles and bundles of that size are there (TILE_MISSING) and as computed (TILE_MISMATCH);
- a log whose first segments were pruned begins where a record says so (SEGMENT_MISSING otherwise); the hashes of what
  is gone are taken from the tiles, so that the root still proves all that is left;
- a segment of another epoch of the log begins with the record that commits to the epoch before (EPOCH_BROKEN);
- what witnesses cosigned is contained in the log as any checkpoint kept elsewhere; of the witnesses asked for as many
  as the quorum did (WITNESS_QUORUM);
- documents that records name are there (DOCUMENT_MISSING) and each has its digest (DOCUMENT_MISMATCH).

A log may grow while it is verified: the checkpoint is read first, tiles only up to its size. What lies beyond it no
signature covers; it is counted (`entries_unproven`). Files are hostile: only regular ones are read, within bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aether.contract.canonical import digest_bytes
from aether.contract.limits import RECORD_BYTES_MAX, TILE_WIDTH
from aether.contract.records import Record
from aether.substrate.audit import entry as entries
from aether.substrate.audit import segments
from aether.substrate.audit.documents import DOCUMENT_BYTES_MAX, document_path
from aether.substrate.audit.note import NOTE_BYTES_MAX, Checkpoint, NoteError, Verifier, node_of, open_checkpoint
from aether.substrate.audit.pruning import SEGMENTS, list_segments
from aether.substrate.audit.quorum import NO_QUORUM, Quorum
from aether.substrate.audit.receipt_rules import check_receipt
from aether.substrate.audit.recover import CHECKPOINT, mapped
from aether.substrate.audit.report import Findings, Problem, Report
from aether.substrate.audit.segments import SegmentError
from aether.substrate.audit.tiles import BUNDLES, decode_bundle, encode_bundle, fold, tile_path, tiles_of
from aether.substrate.audit.tree import EMPTY_ROOT, HASH_BYTES, Frontier, leaf_hash
from aether.substrate.audit.tree import root as root_of
from aether.substrate.audit.witnessed import FOLDER, read_notes

__all__ = ["Problem", "Report", "verify_log", "verify_receipt"]

_TILE_BYTES_MAX = TILE_WIDTH * (2 + RECORD_BYTES_MAX)


def verify_log(
    directory: Path, public_key: str, held: Mapping[str, bytes] | None = None, quorum: Quorum = NO_QUORUM
) -> Report:
    """Checks the log in `directory` against the verifier key (the text of keys/audit.pub); never raises on damage.

    `held` are checkpoints kept elsewhere (a name for the report, the note) that the log must contain. Facts: `size`
    (entries of the log), `pruned` (how many of them are gone), `checkpoint_size`, `entries_unproven` (those beyond
    it), `origin`, `torn_bytes`, `witnesses` (of those in `quorum`, how many cosigned). Raises OSError when files cannot
    be read.
    """
    return _LogCheck(directory, public_key, held or {}, quorum).run()


def verify_receipt(receipt: bytes, public_key: str, quorum: Quorum = NO_QUORUM) -> Report:
    """Checks a receipt's bytes against the verifier key; pure. Rules: `receipt_rules`."""
    return check_receipt(receipt, public_key, quorum)


class _LogCheck:
    """One pass over a log directory."""

    def __init__(self, directory: Path, public_key: str, held: Mapping[str, bytes], quorum: Quorum) -> None:
        self._directory = directory
        self._public_key = public_key
        self._found = Findings()
        self._frontier = Frontier(self._complete)
        self._tiles: dict[int, bytearray] = {}
        self._tile_numbers: dict[int, int] = {}
        self._bundle: list[bytes] = []
        self._checkpoint: Checkpoint | None = None
        self._size = 0
        self._torn_bytes = 0
        self._documents: dict[str, int] = {}
        self._held_notes = held
        self._witnessed: dict[str, bytes] = {}
        self._quorum = quorum
        self._pruned = 0
        self._pruned_said = 0
        self._epochs: list[tuple[int, Record]] = []
        self._changes: list[tuple[int, str]] = []
        self._origin: str | None = None
        self._held: list[tuple[str, Checkpoint]] = []
        self._held_frontier = Frontier(lambda level, digest: None)

    def run(self) -> Report:
        try:
            verifier = Verifier.parse(self._public_key)
        except NoteError as error:
            self._found.add(error.code, "public key", error.reason)
            return self._report(None)
        self._checkpoint = self._read_checkpoint(verifier)
        for name, note in self._notes(verifier).items():
            if (claim := self._open(note, name, verifier)) is not None:
                self._held.append((name, claim))
        self._read_segments(verifier.name)
        for name, claim in self._held:
            if claim.size > self._held_frontier.size:
                reason = f"the log has {self._held_frontier.size} good entries, this checkpoint {claim.size}"
                self._found.add("LOG_SHORT", name, reason, self._held_frontier.size)
        self._check_partial_tiles()
        self._check_epochs(verifier.name)
        self._check_documents()
        self._quorum.check({**self._held_notes, **self._witnessed}, self._found)
        return self._report(verifier.name)

    def _notes(self, verifier: Verifier) -> dict[str, bytes]:
        """Checkpoints kept elsewhere, and those that witnesses cosigned in this epoch."""
        origin = f"{verifier.name}\n".encode()
        found = read_notes(self._directory).items()
        self._witnessed = {f"{FOLDER}/{name}": note for name, note in found if note.startswith(origin)}
        return {**self._held_notes, **self._witnessed}

    def _report(self, origin: str | None) -> Report:
        size = self._checkpoint.size if self._checkpoint else None
        facts = {
            "origin": origin,
            "size": self._size,
            "pruned": self._pruned,
            "checkpoint_size": size,
            "entries_unproven": max(0, self._size - (size or 0)),
            "torn_bytes": self._torn_bytes,
            "held_checkpoints": len(self._held_notes),
            **self._quorum.facts(),
        }
        return self._found.report(str(self._directory), facts)

    def _read_checkpoint(self, verifier: Verifier) -> Checkpoint | None:
        note = _read_file(self._directory / CHECKPOINT, NOTE_BYTES_MAX)
        if note is None:
            self._found.add("CHECKPOINT_MISSING", CHECKPOINT, "the log has no checkpoint")
            return None
        return self._open(note, CHECKPOINT, verifier)

    def _open(self, note: bytes, place: str, verifier: Verifier) -> Checkpoint | None:
        try:
            return open_checkpoint(note.decode(), verifier)
        except UnicodeDecodeError:
            self._found.add("NOTE_FORMAT", place, "the checkpoint is not UTF-8")
        except NoteError as error:
            self._found.add(error.code, place, error.reason)
        return None

    def _read_segments(self, origin: str) -> None:
        found = list_segments(self._directory)
        limit = self._checkpoint.size if self._checkpoint else 0
        if limit == 0:
            self._check_root()
        self._check_held()
        if found and int(found[0].name) and not self._skip_pruned(int(found[0].name), limit):
            return
        for path in found:
            place = f"{SEGMENTS}/{path.name}"
            if int(path.name) != self._size:
                self._found.add("SEGMENT_MISSING", place, f"the log before it ends at {self._size}", self._size)
                break
            if not self._read_segment(path, place, origin, limit, last=path is found[-1]):
                break
        if self._pruned_said < self._pruned:
            reason = f"the log begins at {self._pruned}, and no record says that what was before it was pruned"
            self._found.add("SEGMENT_MISSING", f"{SEGMENTS}/{found[0].name}", reason, 0)
        if self._frontier.size < limit:
            reason = f"the log has {self._frontier.size} good entries, the checkpoint {limit}"
            self._found.add("LOG_SHORT", SEGMENTS, reason, self._frontier.size)

    def _read_segment(self, path: Path, place: str, origin: str, limit: int, last: bool) -> bool:
        if not path.is_file():
            self._found.add("SEGMENT_HEADER", place, "it is not a regular file", self._size)
            return False
        with mapped(path) as data:
            try:
                offset = segments.check_header(data, self._size, origin)
                self._enter(segments.origin_of(data), place)
                for frame in segments.scan(data, offset, self._size):
                    for entry in frame.entries:
                        self._read_entry(entry, place, limit, node_of(origin))
            except SegmentError as error:
                torn = last and error.code == "FRAME_BAD" and self._size >= limit
                if torn and segments.is_torn(data, error.offset):
                    self._torn_bytes = len(data) - error.offset
                    return True
                self._found.add(error.code, place, f"at byte {error.offset}: {error.reason}", self._size)
                return False
        return True

    def _read_entry(self, entry: bytes, place: str, limit: int, node_id: str | None) -> None:
        index = self._size
        self._size += 1
        self._read_record(entry, place, index, node_id)
        if index < limit:
            self._bundle.append(entry)
        self._append(leaf_hash(entry), limit)
        if len(self._bundle) == 256:
            self._compare_bundle(index // 256, 256)

    def _append(self, leaf: bytes, limit: int) -> None:
        if self._held:
            self._held_frontier.append(leaf)
            self._check_held()
        if self._frontier.size < limit:
            self._frontier.append(leaf)
            if self._frontier.size == limit:
                self._check_root()

    def _read_record(self, entry: bytes, place: str, index: int, node_id: str | None) -> None:
        try:
            record = entries.read(entry)
        except NoteError as error:
            self._found.add(error.code, place, error.reason, index)
            return
        if record.log_index != index:
            self._found.add("ENTRY_INDEX", place, f"the record says it is record {record.log_index}", index)
        if record.node_id != node_id:
            self._found.add("ENTRY_NODE", place, f"the record is of node {record.node_id!r}", index)
        for digest in entries.named_documents(record):
            self._documents.setdefault(digest, index)
        if record.type == "audit.pruned":
            self._pruned_said = max(self._pruned_said, int(record.detail["end"]))
        elif record.type == "audit.epoch":
            self._epochs.append((index, record))

    # ---- what was pruned, and where the key changed

    def _skip_pruned(self, begin: int, limit: int) -> bool:
        """Takes the hashes of the entries below `begin` from the tiles, and those of them that a kept bundle holds."""
        leaves: list[bytes] = []
        for number in range(-(-begin // 256)):
            path, data = self._read_tile(0, number, 256)
            if data is None or len(data) != 256 * HASH_BYTES:
                if data is not None:
                    self._found.add("TILE_MISMATCH", path, f"it has {len(data)} bytes", number * 256)
                return False
            leaves = [data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)][: begin - number * 256]
            for leaf in leaves:
                self._append(leaf, limit)
        self._size = self._pruned = begin
        return not begin % 256 or self._keep_bundle(begin, leaves)

    def _keep_bundle(self, begin: int, leaves: list[bytes]) -> bool:
        """The bundle that `begin` lies in: its entries before that are read from it."""
        first = begin - begin % 256
        path, data = self._read_tile(BUNDLES, begin // 256, 256)
        try:
            kept = decode_bundle(data)[: len(leaves)] if data is not None else []
        except ValueError:
            kept = []
        if [leaf_hash(entry) for entry in kept] != leaves:
            self._found.add("TILE_MISMATCH", path, "its entries are not those of the hash tiles", first)
            return False
        for index, entry in enumerate(kept, first):
            self._read_record(entry, path, index, node_of(self._checkpoint.origin) if self._checkpoint else None)
        self._bundle += kept
        return True

    def _enter(self, origin: str | None, place: str) -> None:
        """A segment of `origin` begins; epochs rise, and each begins with its record (checked once that is read)."""
        if self._origin is not None and origin != self._origin:
            self._changes.append((self._size, place))
            if origin is None or not segments.is_epoch_of(self._origin, origin):
                self._found.add("SEGMENT_HEADER", place, f"it is of {origin}, behind one of {self._origin}", self._size)
        self._origin = origin

    def _check_epochs(self, origin: str) -> None:
        begun = {index for index, _ in self._epochs}
        for index, place in self._changes:
            if index not in begun:
                self._found.add("EPOCH_BROKEN", place, "it does not begin with the record of its epoch", index)
        for index, record in self._epochs:
            if (why := self._broken_epoch(index, record, origin)) is not None:
                self._found.add("EPOCH_BROKEN", document_path(record.detail["digest"]), why, index)

    def _broken_epoch(self, index: int, record: Record, origin: str) -> str | None:
        """Why the last checkpoint of the epoch before is not that of this log, or None."""
        detail = record.detail
        note = _read_file(self._directory / document_path(detail["digest"]), NOTE_BYTES_MAX)
        if note is None:
            return None  # DOCUMENT_MISSING says so
        try:
            claim = open_checkpoint(note.decode(), Verifier.parse(detail["previous_key"]))
        except (NoteError, UnicodeDecodeError) as error:
            return f"its note does not hold: {error}"
        if not segments.is_epoch_of(claim.origin, origin) or claim.origin == origin:
            return f"{claim.origin} is no earlier epoch of {origin}"
        known = self._checkpoint.size if self._checkpoint else 0
        if claim.size > index or index >= known:
            return f"the checkpoint of {claim.size} entries cannot be compared"
        if root_of(claim.size, self._node) != claim.root:
            return f"the root over {claim.size} entries is not the one that the epoch before signed"
        return None

    def _node(self, level: int, index: int) -> bytes:
        """The hash of a complete subtree from the tiles; empty where they cannot be read."""
        assert self._checkpoint is not None
        tile_level, rest = divmod(level, 8)
        number, start = divmod(index << rest, 256)
        width = min(256, (self._checkpoint.size >> 8 * tile_level) - number * 256)
        _, data = self._read_tile(tile_level, number, width)
        hashes = (data or b"")[start * HASH_BYTES : start * HASH_BYTES + (HASH_BYTES << rest)]
        return fold(hashes) if len(hashes) == HASH_BYTES << rest else b""

    def _check_root(self) -> None:
        if self._checkpoint is None:
            return
        root = self._frontier.root() if self._checkpoint.size else EMPTY_ROOT
        if root != self._checkpoint.root:
            reason = f"the root over {self._checkpoint.size} entries is not the one that was signed"
            self._found.add("ROOT_MISMATCH", CHECKPOINT, reason)

    def _check_held(self) -> None:
        """Whether the log up to here is what a kept checkpoint of this size signed for."""
        for name, claim in self._held:
            if claim.size == self._held_frontier.size and claim.root != self._held_frontier.root():
                reason = f"the root over {claim.size} entries is not the one that this checkpoint signed"
                self._found.add("ROOT_MISMATCH", name, reason)

    # ---- tiles: compared as they fill, so that only the right edge is held

    def _complete(self, level: int, digest: bytes) -> None:
        tile_level = level // 8
        tile = self._tiles.setdefault(tile_level, bytearray())
        tile += digest
        if len(tile) == 256 * HASH_BYTES:
            number = self._tile_numbers.get(tile_level, 0)
            self._compare_tile(tile_level, number, 256)
            self._tile_numbers[tile_level] = number + 1
            tile.clear()

    def _check_partial_tiles(self) -> None:
        if self._checkpoint is None or self._frontier.size != self._checkpoint.size:
            return
        for level, number, width in tiles_of(self._checkpoint.size):
            if not width:
                continue
            if level == BUNDLES:
                self._compare_bundle(number, width)
            else:
                self._compare_tile(level, number, width)

    def _compare_tile(self, level: int, number: int, width: int) -> None:
        expected = bytes(self._tiles[level])
        path, data = self._read_tile(level, number, width)
        if data is None or data == expected:
            return
        span = 256**level
        at = next((i for i in range(width) if data[32 * i : 32 * i + 32] != expected[32 * i : 32 * i + 32]), width)
        reason = f"its hash {at} is not that of the segments" if at < width else f"it has {len(data)} bytes"
        self._found.add("TILE_MISMATCH", path, reason, (number * 256 + at) * span)

    def _compare_bundle(self, number: int, width: int) -> None:
        expected, self._bundle = self._bundle, []
        path, data = self._read_tile(BUNDLES, number, width)
        if data is None or data == encode_bundle(expected):
            return
        at, end = 0, 0
        for entry in expected:
            start, end = end, end + 2 + len(entry)
            if data[start:end] != encode_bundle([entry]):
                break
            at += 1
        self._found.add("TILE_MISMATCH", path, "it is not the entries of the segments", number * 256 + at)

    def _read_tile(self, level: int, number: int, width: int) -> tuple[str, bytes | None]:
        """The file, or the beginning of a wider one where a log that grows has replaced it."""
        path, full = tile_path(level, number, width), tile_path(level, number)
        wider = (f"{full}.p/{w}" for w in self._widths(f"{full}.p") if w > width)
        for candidate in (path, full, *wider):
            if (data := _read_file(self._directory / candidate, _TILE_BYTES_MAX)) is not None:
                return candidate, data if candidate == path else _prefix(level, data, width)
        self._found.add("TILE_MISSING", path, "the checkpoint needs it", number * 256 * 256 ** max(level, 0))
        return path, None

    def _widths(self, partials: str) -> list[int]:
        names = (path.name for path in (self._directory / partials).glob("*"))
        return sorted(int(name) for name in names if name.isascii() and name.isdecimal())

    # ---- documents

    def _check_documents(self) -> None:
        for digest, index in self._documents.items():
            if not (self._directory / document_path(digest)).is_file():
                self._found.add("DOCUMENT_MISSING", document_path(digest), "a record names it", index)
        for path in sorted((self._directory / "documents").rglob("*")):
            if path.is_dir() or path.name.endswith(".tmp"):
                continue
            place, digest = str(path.relative_to(self._directory)), f"sha256:{path.name}"
            text = _read_file(path, DOCUMENT_BYTES_MAX)
            if text is None or len(text) > DOCUMENT_BYTES_MAX:
                self._found.add("DOCUMENT_MISMATCH", place, f"it is no file of at most {DOCUMENT_BYTES_MAX} bytes")
            elif digest_bytes(text) != digest or place != document_path(digest):
                self._found.add("DOCUMENT_MISMATCH", place, "its bytes are not those it is named by")


def _read_file(path: Path, limit: int) -> bytes | None:
    """At most `limit` + 1 bytes; None where no regular file is (a fifo would block, a device never end)."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(limit + 1)


def _prefix(level: int, data: bytes, width: int) -> bytes:
    if level != BUNDLES:
        return data[: width * HASH_BYTES]
    end = 0
    for _ in range(width):
        end += 2 + int.from_bytes(data[end : end + 2], "big")
    return data[:end]
