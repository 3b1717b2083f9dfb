"""Work directories of cells: make, fill, list and open outputs, remove.

Layout: `<state>/cells/<instance>/<cell>`, mode 0700, owned by the uid under which the cell's executables run; the
directories above belong to the spawner alone and may only be walked through. What lies inside was shaped by the job:
every path is opened with `open_beneath`, only regular files with one name and the cell's owner leave, counts and
bytes are bounded.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aether.spawner.beneath import open_beneath, safe_path
from aether.spawner.globs import Glob

ENTRIES_MAX = 200_000
"""Directory entries looked at by one collection, so that a tree of empty directories ends too."""
DEPTH_MAX = 64
REFUSED_MAX = 256
FLAT_ENTRIES_MAX = 32
COPY_CHUNK_BYTES = 1 << 20
_FICLONE = 0x40049409
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


class WorkError(Exception):
    """Why something about a work directory was refused; the text follows "cannot X: "."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who owns a work directory: new files get `uid`/`gid`; outputs may belong to `uids`."""

    uid: int
    gid: int
    uids: range

    @property
    def changes(self) -> bool:
        return os.geteuid() == 0


class WorkRoot:
    """The directory that holds this instance's work directories."""

    def __init__(self, path: str) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path).chmod(0o711)
        self.path = path
        self._fd = os.open(path, _DIRECTORY | os.O_CLOEXEC)

    def prepare(self, cell_id: str, owner: Owner) -> str:
        """Make the directory if it is not there yet; its host path."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(cell_id, 0o700, dir_fd=self._fd)
            if owner.changes:
                os.chown(cell_id, owner.uid, owner.gid, dir_fd=self._fd, follow_symlinks=False)
        return f"{self.path}/{cell_id}"

    def open(self, cell_id: str) -> int:
        """A descriptor of a cell's directory, the caller's to close; raises WorkError when there is none."""
        try:
            return open_beneath(self._fd, cell_id, _DIRECTORY)
        except OSError as error:
            raise WorkError(f"the cell has no work directory: {error.strerror}") from error

    def fileno(self) -> int:
        return self._fd

    def remove_flat(self, cell_id: str) -> bool:
        """Remove a directory with at most FLAT_ENTRIES_MAX files and no directory; False when it is not so."""
        try:
            directory = open_beneath(self._fd, cell_id, _DIRECTORY)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        try:
            with os.scandir(directory) as entries:
                names = [entry.name for entry in itertools.islice(entries, FLAT_ENTRIES_MAX + 1)]
            if len(names) > FLAT_ENTRIES_MAX:
                return False
            for name in names:
                os.unlink(name, dir_fd=directory)
            os.rmdir(cell_id, dir_fd=self._fd)
        except OSError:
            return False
        finally:
            os.close(directory)
        return True

    def remove(self, cell_id: str) -> None:
        """Remove a cell's directory however deep it is; a missing one is a removed one."""
        remove_tree(self._fd, cell_id)

    def close(self) -> None:
        os.close(self._fd)
        with contextlib.suppress(OSError):
            Path(self.path).rmdir()


def place(directory: int, path: str, source: int, *, mode: int, owner: Owner, bytes_max: int) -> int:
    """Copy the regular file `source` to `path` below `directory`; bytes copied. Raises WorkError, OSError."""
    if not safe_path(path):
        raise WorkError(f"{path[:80]!r} is not a plain relative path")
    about = os.fstat(source)
    if not stat.S_ISREG(about.st_mode):
        raise WorkError(f"the source of {path!r} is not a regular file")
    if about.st_size > bytes_max:
        raise WorkError(f"{path!r} has {about.st_size} bytes, more than the {bytes_max} left")
    parent, name = make_parents(directory, path, owner)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        target = open_beneath(parent, name, flags, mode)
        try:
            copied = _copy(source, target, about.st_size)
            if owner.changes:
                os.fchown(target, owner.uid, owner.gid)
            os.fchmod(target, mode)
        finally:
            os.close(target)
    finally:
        os.close(parent)
    return copied


def make_parents(directory: int, path: str, owner: Owner) -> tuple[int, str]:
    """A descriptor of the directory that `path` lies in, made where missing, and the name in it; raises OSError."""
    *parents, name = path.split("/")
    here = os.dup(directory)
    for part in parents:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=here)
                if owner.changes:
                    os.chown(part, owner.uid, owner.gid, dir_fd=here, follow_symlinks=False)
            below = open_beneath(here, part, _DIRECTORY)
        finally:
            os.close(here)
        here = below
    return here, name


def _copy(source: int, target: int, size: int) -> int:
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return size
    except OSError:
        pass  # no reflinks here, or two file systems
    offset = 0
    while offset < size:
        try:
            count = os.copy_file_range(source, target, min(size - offset, COPY_CHUNK_BYTES), offset, offset)
        except OSError:  # across file systems before Linux 5.19, or a memfd
            count = os.pwrite(target, os.pread(source, min(size - offset, COPY_CHUNK_BYTES), offset), offset)
        if count == 0:
            raise WorkError("the source became shorter while it was copied")
        offset += count
    return offset


@dataclass(slots=True)
class Collected:
    """What matched: `files` are `{path, size_bytes}`, `refused` maps a path to the reason."""

    files: list[dict[str, Any]]
    refused: dict[str, str]

    def refuse(self, path: str, reason: str) -> None:
        if len(self.refused) < REFUSED_MAX:
            self.refused[path] = reason


def collect(directory: int, globs: list[str], owner: Owner, *, files_max: int, bytes_max: int) -> Collected:
    """Regular files below `directory` that match, in path order; everything else that matches is refused."""
    patterns = [Glob(glob) for glob in globs]
    found = Collected([], {})
    total = 0
    for path, about in _walk(directory, found):
        if not any(pattern.matches(path) for pattern in patterns):
            continue
        if stat.S_ISCHR(about.st_mode) and about.st_rdev == 0:
            continue  # deleted from what lies below (overlayfs); nobody but the kernel makes one
        reason = refusal(about, owner)
        if not safe_path(path):
            found.refuse(ascii(path), "its name is not plain UTF-8 text")
        elif reason:
            found.refuse(path, reason)
        elif len(found.files) >= files_max:
            found.refuse(path, f"there are more than {files_max} outputs")
        elif total + about.st_size > bytes_max:
            found.refuse(path, f"the outputs have more than {bytes_max} bytes")
        else:
            total += about.st_size
            found.files.append({"path": path, "size_bytes": about.st_size})
    found.files.sort(key=lambda file: file["path"])
    return found


def refusal(about: os.stat_result, owner: Owner) -> str:
    """Pure: why a file with this status is no output; empty when it is one."""
    kinds = (
        (stat.S_ISLNK, "it is a symbolic link"),
        (stat.S_ISFIFO, "it is a FIFO"),
        (stat.S_ISSOCK, "it is a socket"),
        (stat.S_ISBLK, "it is a device"),
        (stat.S_ISCHR, "it is a device"),
    )
    for test, reason in kinds:
        if test(about.st_mode):
            return reason
    if not stat.S_ISREG(about.st_mode):
        return "it is not a regular file"
    if about.st_nlink != 1:
        return f"it has {about.st_nlink} names (hard links)"
    if about.st_uid not in owner.uids:
        return "it belongs to another user"
    return ""


def _walk(directory: int, found: Collected) -> Iterator[tuple[str, os.stat_result]]:
    """Every entry that is not a directory, depth first, without following anything."""
    pending = [""]
    seen = 0
    while pending:
        prefix = pending.pop()
        try:
            here = open_beneath(directory, prefix, _DIRECTORY) if prefix else os.dup(directory)
        except OSError as error:
            found.refuse(ascii(prefix) if not safe_path(prefix) else prefix, f"cannot be opened: {error.strerror}")
            continue
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    seen += 1
                    if seen > ENTRIES_MAX:
                        found.refuse(prefix or "/", f"the tree has more than {ENTRIES_MAX} entries")
                        return
                    path = f"{prefix}/{entry.name}" if prefix else entry.name
                    try:
                        about = entry.stat(follow_symlinks=False)
                    except OSError:
                        continue  # removed meanwhile
                    if not stat.S_ISDIR(about.st_mode):
                        yield path, about
                    elif path.count("/") < DEPTH_MAX:
                        pending.append(path)
                    else:
                        found.refuse(path[:256], f"it lies deeper than {DEPTH_MAX} directories")
        finally:
            os.close(here)


def open_output(directory: int, path: str, owner: Owner) -> tuple[int, int]:
    """A read-only descriptor of one output and its size; raises WorkError with the reason."""
    if not safe_path(path):
        raise WorkError(f"{path[:80]!r} is not a plain relative path")
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its writer
        fd = open_beneath(directory, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise WorkError(f"{path!r} cannot be opened below the work directory: {error.strerror}") from error
    about = os.fstat(fd)
    reason = refusal(about, owner)
    if reason:
        os.close(fd)
        raise WorkError(f"{path!r} is no output: {reason}")
    os.set_blocking(fd, True)
    return fd, about.st_size


def remove_tree(parent: int, name: str) -> None:
    """Remove `name` below `parent`, however deep or wide, with two descriptors and no recursion.

    The tree moves into `.removing-<name>`; there, a directory that is not empty moves to the top under a number
    and waits for its turn. A removal that was cut off is finished by the next call.
    """
    trash = f".removing-{name}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(trash, 0o700, dir_fd=parent)
    top = open_beneath(parent, trash, _DIRECTORY)
    try:
        pending = [entry.name for entry in os.scandir(top)]
        moved = max((int(number) for number in pending), default=0)
        if _raise_up(parent, name, top, moved + 1):
            moved += 1
            pending.append(str(moved))
        while pending:
            number = pending.pop()
            here = os.open(number, _DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
            try:
                for entry in list(os.scandir(here)):
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.name, dir_fd=here)
                    elif not _rmdir(entry.name, here) and _raise_up(here, entry.name, top, moved + 1):
                        moved += 1
                        pending.append(str(moved))
            finally:
                os.close(here)
            os.rmdir(number, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(trash, dir_fd=parent)


def _raise_up(parent: int, name: str, top: int, number: int) -> bool:
    """Move a directory to `top` as `number`; False when there is none."""
    try:
        if os.geteuid() != 0:  # moving and reading it needs its own write and read bits
            os.chmod(name, 0o700, dir_fd=parent)
        os.rename(name, str(number), src_dir_fd=parent, dst_dir_fd=top)
    except FileNotFoundError:
        return False
    return True


def _rmdir(name: str, directory: int) -> bool:
    try:
        os.rmdir(name, dir_fd=directory)
    except OSError:
        return False
    return True
