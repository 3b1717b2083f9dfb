"""What an upload sends: bytes, a file by its path, or an open file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from aether.contract.errors import AetherError


@contextmanager
def opened(source: str | os.PathLike[str] | bytes | BinaryIO) -> Iterator[tuple[bytes | BinaryIO, int]]:
    """The body to send and its size from the current position."""
    if isinstance(source, bytes):
        yield source, len(source)
    elif isinstance(source, str | os.PathLike):
        try:
            with Path(source).open("rb") as file:
                yield file, os.fstat(file.fileno()).st_size
        except OSError as error:
            raise AetherError("BAD_FIELD", f"cannot send {str(source)!r}: {error.strerror}", "name a file") from error
    else:
        at = source.tell()
        size = source.seek(0, os.SEEK_END) - at
        source.seek(at)
        yield source, size
