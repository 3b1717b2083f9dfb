"""Documents named by digest: policy sets, plans, sandbox reports (docs/formats.md "Documents").

`put` writes at once, so that a full disk is the caller's error and not the writer's; `sync` - on the writer
thread, before the frame whose records name the document - makes it durable.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from aether.contract.canonical import digest_bytes
from aether.contract.errors import AetherError
from aether.contract.ids import Digest, is_digest
from aether.substrate.audit.files import fsync_dir, write_file

DOCUMENT_BYTES_MAX: Final = 1 << 20
_KNOWN_MAX: Final = 4_096


def document_path(digest: str) -> str:
    """`documents/sha256/<hh>/<hex>`."""
    return f"documents/sha256/{digest[7:9]}/{digest[7:]}"


class Documents:
    """The documents of one log directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: OrderedDict[str, None] = OrderedDict()

    def put(self, text: bytes) -> tuple[Digest, Path | None]:
        """The digest of `text`, and the file that `sync` must make durable; None when it is already kept.

        Raises AetherError TOO_LARGE or DISK_FULL.
        """
        if len(text) > DOCUMENT_BYTES_MAX:
            raise AetherError("TOO_LARGE", f"cannot keep a document of {len(text)} bytes: the bound is 1 MiB")
        digest = digest_bytes(text)
        if digest in self._known:
            self._known.move_to_end(digest)
            return digest, None
        path = self._directory / document_path(digest)
        try:
            path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            write_file(path, text)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise AetherError("DISK_FULL", "cannot keep a document: the disk is full") from error
            raise
        self._known[digest] = None
        if len(self._known) > _KNOWN_MAX:
            self._known.popitem(last=False)
        return digest, path

    def get(self, digest: str) -> bytes:
        """The text of `digest`; raises AetherError BAD_ID, NOT_FOUND or LOG_CORRUPT."""
        if not is_digest(digest):
            raise AetherError("BAD_ID", f"cannot read document {digest[:80]!r}: not a digest")
        try:
            text = (self._directory / document_path(digest)).read_bytes()
        except FileNotFoundError as error:
            raise AetherError("NOT_FOUND", f"cannot read document {digest}: it is not kept here") from error
        if digest_bytes(text) != digest:
            raise AetherError("LOG_CORRUPT", f"cannot read document {digest}: its file was changed")
        return text

    @staticmethod
    def sync(paths: Iterable[Path]) -> None:
        """Makes documents and their names durable."""
        directories: set[Path] = set()
        for path in paths:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            # both levels: the subdirectory may be new
            directories |= {path.parent, path.parent.parent}
        for directory in directories:
            fsync_dir(directory)
