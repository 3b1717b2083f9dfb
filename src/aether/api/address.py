"""Addresses of Unix sockets whose paths are longer than sun_path (108 bytes with the NUL; unix(7)).

A long path is reached through its directory: /proc/self/fd/<n>/<name> is short and names the same socket.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

SUN_PATH_BYTES_MAX: Final = 107


@contextmanager
def bind_address(path: Path) -> Iterator[str]:
    """The text to bind or connect to, valid inside the block; raises OSError when the directory is missing."""
    text = str(path)
    if len(os.fsencode(text)) <= SUN_PATH_BYTES_MAX:
        yield text
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
