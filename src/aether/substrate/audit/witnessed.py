"""The last checkpoint that each witness cosigned, beside the published one: `witnessed/<key id, 8 hex digits>`.

Each file is a signed note: a checkpoint of the log, the log's signature, the witness's cosignature. A reader may take
the lines of several files together where the text is the same (`best`). Files are replaced by rename; one that
is lost is brought again by the witness's next answer.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Final

from aether.contract.limits import WITNESSES_MAX
from aether.substrate.audit.files import write_file
from aether.substrate.audit.note import NOTE_BYTES_MAX, NoteError, parse_checkpoint, split_note

FOLDER: Final = "witnessed"
_FILE: Final = re.compile(r"[0-9a-f]{8}", re.ASCII)


def read_notes(directory: Path) -> dict[str, bytes]:
    """The notes in a log directory by file name, unchecked; regular files only, at most WITNESSES_MAX."""
    found: dict[str, bytes] = {}
    paths = sorted((directory / FOLDER).glob("*")) if (directory / FOLDER).is_dir() else []
    for path in [path for path in paths if _FILE.fullmatch(path.name) and path.is_file()][:WITNESSES_MAX]:
        with path.open("rb") as file:
            found[path.name] = file.read(NOTE_BYTES_MAX + 1)
    return found


class Witnessed:
    """What the witnesses of one log cosigned. Written by the event loop's thread."""

    def __init__(self, directory: Path, origin: str) -> None:
        self._directory = directory
        self.by_key: dict[str, tuple[int, str]] = {}
        """Size and note by key id."""
        for name, note in read_notes(directory).items():
            with contextlib.suppress(NoteError, UnicodeDecodeError):  # what is no note of ours is not told on
                text = note.decode()
                claim = parse_checkpoint(split_note(text)[0])
                if claim.origin == origin:
                    self.by_key[name] = (claim.size, text)

    def put(self, key_id: bytes, size: int, note: str, line: str) -> bool:
        """Keeps the cosignature `line` on `note`, of `size` records, unless that witness signed a larger tree."""
        name = key_id.hex()
        if name in self.by_key and self.by_key[name][0] > size:
            return False
        if name not in self.by_key and len(self.by_key) >= WITNESSES_MAX:
            return False
        (self._directory / FOLDER).mkdir(mode=0o750, exist_ok=True)
        write_file(self._directory / FOLDER / name, (note + line).encode(), mode=0o644, sync=True)
        self.by_key[name] = (size, note + line)
        return True

    def best(self, at_least: int) -> tuple[str, int] | None:
        """The checkpoint over `at_least` records or more that most witnesses cosigned, with all their lines."""
        by_size: dict[int, list[str]] = {}
        for size, note in self.by_key.values():
            if size >= max(at_least, 1):
                by_size.setdefault(size, []).append(note)
        if not by_size:
            return None
        size = max(by_size, key=lambda each: (len(by_size[each]), each))
        first, *others = by_size[size]
        lines = [note.rpartition("\n\n")[2].split("\n", 1)[1] for note in others]
        return first + "".join(lines), size
