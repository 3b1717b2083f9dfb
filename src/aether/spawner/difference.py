"""What a cell changed in a tree that it saw through an overlay: a listing, and the same as one OCI layer.

The upper directory holds all that differs (Documentation/filesystems/overlayfs.rst): a deletion is a character
device 0/0 (or an empty file with the attribute `overlay.whiteout`), a directory that replaces one has the attribute
`overlay.opaque`. Names and contents are the job's: everything is opened beneath its directory without following a
link, entries and bytes are bounded. In the layer a deletion is a file `.wh.<name>`, an opaque directory holds
`.wh..wh..opq`, owners are 0, setuid bits are gone (image-spec, layer.md).
"""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from aether.contract import limits
from aether.spawner.beneath import open_beneath

DEPTH_MAX = 100
REFUSED_MAX = 256
WHITEOUT = ".wh."
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


@dataclass(slots=True)
class Difference:
    """Walks an upper directory; `changes` are `{path, change, type, size_bytes}` in path order."""

    tar: tarfile.TarFile
    bytes_max: int
    skipped: frozenset[str] = frozenset()
    changes: list[dict[str, Any]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    seen: int = 0
    size_bytes: int = 0
    first: dict[tuple[int, int], str] = field(default_factory=dict)

    def walk(self, upper: int, lower: int | None, prefix: str, depth: int) -> None:
        """One directory, after its own entry: `lower` is what it lies over, None where there is nothing."""
        for name in sorted(os.listdir(upper)):
            self.seen += 1
            if self.seen > limits.DIFF_ENTRIES_MAX:
                raise ValueError(f"more than {limits.DIFF_ENTRIES_MAX} entries were changed")
            path = f"{prefix}{name}"
            if path in self.skipped:
                continue
            about = os.stat(name, dir_fd=upper, follow_symlinks=False)
            below = _lower_status(lower, name)
            if is_whiteout(upper, name, about):
                self._note(path, "deleted", below or about)
                self._add(f"{prefix}{WHITEOUT}{name}", tarfile.REGTYPE, about)
            elif name.startswith(WHITEOUT):
                self._refuse(path, "in a layer its name would be a deletion")
            elif stat.S_ISDIR(about.st_mode):
                self._directory(upper, lower, name, path, depth)
            else:
                self._note(path, "added" if below is None else "modified", about)
                self._entry(upper, name, path, about)

    def _directory(self, upper: int, lower: int | None, name: str, path: str, depth: int) -> None:
        if depth == DEPTH_MAX:
            raise ValueError(f"changes lie deeper than {DEPTH_MAX} directories")
        here = open_beneath(upper, name, _DIRECTORY)
        try:
            about = os.fstat(here)
            below = _lower_status(lower, name)
            opaque = _attribute(here, "overlay.opaque") == b"y"
            merged = below is not None and stat.S_ISDIR(below.st_mode) and not opaque
            if not merged:
                self._note(path, "added" if below is None else "replaced", about)
            self._add(path, tarfile.DIRTYPE, about)
            if below is not None and stat.S_ISDIR(below.st_mode) and opaque:
                self._add(f"{path}/.wh..wh..opq", tarfile.REGTYPE, about)
            with contextlib.ExitStack() as stack:
                inner = None
                if merged and lower is not None:
                    inner = open_beneath(lower, name, _DIRECTORY)
                    stack.callback(os.close, inner)
                self.walk(here, inner, f"{path}/", depth + 1)
        finally:
            os.close(here)

    def _entry(self, upper: int, name: str, path: str, about: os.stat_result) -> None:
        """A file or a link as a member of the layer."""
        if stat.S_ISLNK(about.st_mode):
            self._add(path, tarfile.SYMTYPE, about, link=os.readlink(name, dir_fd=upper))
        elif not stat.S_ISREG(about.st_mode):
            self._refuse(path, f"it is a {_TYPES[stat.S_IFMT(about.st_mode)]}")
        elif (same := self.first.setdefault((about.st_dev, about.st_ino), path)) != path:
            self._add(path, tarfile.LNKTYPE, about, link=same)
        else:
            fd = open_beneath(upper, name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
            with open(fd, "rb") as file:
                self._file(path, os.fstat(fd), file)

    def _file(self, path: str, about: os.stat_result, file: BinaryIO) -> None:
        self.size_bytes += about.st_size
        if not stat.S_ISREG(about.st_mode) or self.size_bytes > self.bytes_max:
            raise ValueError(f"the changes have more than {self.bytes_max} bytes")
        member = _member(path, tarfile.REGTYPE, about)
        member.size = about.st_size
        self.tar.addfile(member, file)

    def _add(self, path: str, kind: bytes, about: os.stat_result, link: str = "") -> None:
        member = _member(path, kind, about)
        member.linkname = link
        self.tar.addfile(member)

    def _note(self, path: str, change: str, about: os.stat_result) -> None:
        kind = _TYPES[stat.S_IFMT(about.st_mode)]
        size = about.st_size if kind == "file" and change != "deleted" else 0
        self.changes.append({"path": readable(path), "change": change, "type": kind, "size_bytes": size})

    def _refuse(self, path: str, why: str) -> None:
        if len(self.refused) < REFUSED_MAX:
            self.refused[readable(path)] = why


def write_difference(
    upper: int, lower: int, layer: BinaryIO, bytes_max: int, skipped: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Writes the layer and returns `{changes, refused}`. Raises OSError, ValueError when it is out of bounds."""
    with tarfile.open(fileobj=layer, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        found = Difference(tar, bytes_max, skipped)
        found.walk(upper, lower, "", 0)
    layer.flush()
    return {"changes": found.changes, "refused": found.refused}


def readable(path: str) -> str:
    """A path that may be any bytes as text: what is not UTF-8 is escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_whiteout(directory: int, name: str, about: os.stat_result) -> bool:
    """Whether an entry of an upper directory says that what lies below it is deleted."""
    if stat.S_ISCHR(about.st_mode):
        return about.st_rdev == 0
    if not stat.S_ISREG(about.st_mode) or about.st_size != 0:
        return False
    try:
        fd = open_beneath(directory, name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return _attribute(fd, "overlay.whiteout") is not None
    finally:
        os.close(fd)


def _attribute(fd: int, name: str) -> bytes | None:
    """Of overlayfs: trusted.* when root made the mount, user.* when a user namespace did."""
    for space in ("trusted", "user"):
        with contextlib.suppress(OSError):
            return os.getxattr(fd, f"{space}.{name}")
    return None


def _lower_status(lower: int | None, name: str) -> os.stat_result | None:
    if lower is None:
        return None
    try:
        return os.stat(name, dir_fd=lower, follow_symlinks=False)
    except OSError:
        return None


def _member(path: str, kind: bytes, about: os.stat_result) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.type = kind
    member.mode = about.st_mode & 0o777
    member.mtime = int(about.st_mtime)
    return member
