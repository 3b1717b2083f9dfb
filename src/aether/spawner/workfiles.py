"""Single files of a work directory while its cell lives: replace one, list a directory. The job shapes what is
there meanwhile, so nothing is opened but below a descriptor and never through a symbolic link (`beneath`)."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from typing import Any

from aether.contract.limits import FILES_LISTED_MAX
from aether.spawner import workdir
from aether.spawner.beneath import open_beneath, safe_path
from aether.spawner.workdir import Owner, WorkError

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def replace_file(directory: int, path: str, source: int, *, mode: int, owner: Owner, bytes_max: int) -> int:
    """Copy the regular file `source` to `path` below `directory`; bytes copied. Raises WorkError, OSError.

    It is copied beside its place and renamed over it (rename(2) replaces a symbolic link itself and follows none),
    so whoever reads sees the old file or the new one, whole.
    """
    if not safe_path(path):
        raise WorkError(f"{path[:80]!r} is not a plain relative path")
    parent, name = workdir.make_parents(directory, path, owner)
    beside = f".aether-{os.urandom(8).hex()}"
    try:
        copied = workdir.place(parent, beside, source, mode=mode, owner=owner, bytes_max=bytes_max)
        os.rename(beside, name, src_dir_fd=parent, dst_dir_fd=parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside, dir_fd=parent)
        raise
    finally:
        os.close(parent)
    return copied


def list_directory(directory: int, path: str) -> dict[str, Any]:
    """`{path, entries: [{name, kind, size_bytes, mode, modified_us}], truncated}` in the order of names.

    A name that is no UTF-8 is shown with its bytes escaped, and cannot be read. Raises WorkError.
    """
    if path and not safe_path(path):
        raise WorkError(f"{path[:80]!r} is not a plain relative path")
    try:
        here = open_beneath(directory, path, _DIRECTORY) if path else os.dup(directory)
    except OSError as error:
        raise WorkError(f"{path!r} cannot be listed: {error.strerror}") from error
    try:
        with os.scandir(here) as found:
            entries = list(itertools.islice(found, FILES_LISTED_MAX + 1))
            shown = [_entry(entry) for entry in entries[:FILES_LISTED_MAX]]
    finally:
        os.close(here)
    rows = sorted((row for row in shown if row is not None), key=lambda row: str(row["name"]))
    return {"path": path, "entries": rows, "truncated": len(entries) > FILES_LISTED_MAX}


def _entry(entry: os.DirEntry[str]) -> dict[str, Any] | None:
    try:
        about = entry.stat(follow_symlinks=False)
    except OSError:
        return None  # removed meanwhile
    kind = "file" if stat.S_ISREG(about.st_mode) else "directory" if stat.S_ISDIR(about.st_mode) else "other"
    return {
        "name": os.fsencode(entry.name).decode("utf-8", "backslashreplace"),
        "kind": kind,
        "size_bytes": about.st_size,
        "mode": stat.S_IMODE(about.st_mode),
        "modified_us": about.st_mtime_ns // 1000,
    }
