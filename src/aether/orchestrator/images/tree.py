"""Applying layers to a directory tree without ever leaving it (image-spec, layer.md).

Every name of a layer is hostile. Parents are resolved by openat2 with RESOLVE_IN_ROOT: a link of the image leads
where it would lead in a cell, and nowhere else; the last component is never followed. What is kept of an entry is
its kind, its bytes, its time and whether it may be executed: no owners, no setuid bits, no extended attributes, no
devices and no FIFOs (counted as skipped). Directories are 0755, files 0644 or 0755, so that any cell may read them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from aether.contract import limits
from aether.orchestrator.images.layout import Bounded, ImageError

WHITEOUT: Final = ".wh."
OPAQUE: Final = ".wh..wh..opq"
DIRECTORIES: Final = ("proc", "sys", "dev", "tmp", "run", "mnt", "work", "etc")
FILES: Final = ("etc/hosts", "etc/hostname", "etc/resolv.conf")
_DEPTH_MAX: Final = 128
_NAME_BYTES_MAX: Final = 255
_MTIME_S_MAX: Final = 1 << 33
_CHUNK_BYTES: Final = 1 << 20
_OPENAT2: Final = 437  # the same on every architecture
_NO_MAGICLINKS, _IN_ROOT = 0x02, 0x10
_PATH_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_JOB_ID: Final = 1000
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Counts:
    """What a tree took so far, within the bounds of an image."""

    entries: int = 0
    size_bytes: int = 0
    skipped: int = 0

    def add(self, size_bytes: int = 0) -> None:
        self.entries += 1
        self.size_bytes += size_bytes
        if self.entries > limits.IMAGE_ENTRIES_MAX:
            raise ImageError(f"it has more than {limits.IMAGE_ENTRIES_MAX} entries")
        if self.size_bytes > limits.IMAGE_BYTES_MAX:
            raise ImageError(f"it is larger than {limits.IMAGE_BYTES_MAX} bytes when unpacked")


@dataclass(slots=True)
class Tree:
    """The directory `root`, which nobody else changes meanwhile."""

    root: int
    counts: Counts = field(default_factory=Counts)

    def parent(self, parts: tuple[str, ...]) -> int:
        """The directory that holds `parts`, made with its parents where missing; the caller's to close."""
        path = "/".join(parts[:-1])
        try:
            return _open_in_root(self.root, path)
        except FileNotFoundError:
            above = self.parent(parts[:-1])
        except OSError as error:
            raise ImageError(f"{_shown(parts)} lies below what is no directory: {error.strerror}") from error
        try:
            os.mkdir(parts[-2], 0o755, dir_fd=above)
            self.counts.add()
            return os.open(parts[-2], _PATH_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
        except FileExistsError as error:
            raise ImageError(f"{_shown(parts)} lies below a link that leads nowhere") from error
        finally:
            os.close(above)

    def existing(self, parts: tuple[str, ...]) -> int | None:
        """Like `parent`, but None where there is none."""
        try:
            return _open_in_root(self.root, "/".join(parts[:-1]))
        except OSError:
            return None


def apply_layer(tree: Tree, content: Bounded) -> None:
    """One uncompressed layer on top of what is there; raises ImageError, OSError."""
    made: set[tuple[str, ...]] = set()
    try:
        with tarfile.open(fileobj=content, mode="r|", errorlevel=2, encoding="utf-8") as tar:  # type: ignore[call-overload]
            for member in tar:
                parts = split_name(member.name)
                if parts:
                    _apply(tree, tar, member, parts, made)
                tar.members.clear()  # a stream needs none of them again
    except (tarfile.TarError, ValueError, OverflowError, struct.error, EOFError) as error:
        raise ImageError(f"a layer is no tar archive: {error}") from error


def split_name(name: str) -> tuple[str, ...]:
    """A relative path as its parts, empty for the root itself; raises ImageError for `..` and absolute names."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    encoded = [os.fsencode(part) for part in parts]
    if name.startswith("/") or ".." in parts:
        raise ImageError(f"the entry {name[:80]!a} leaves its root")
    if len(parts) > _DEPTH_MAX or any(len(part) > _NAME_BYTES_MAX or b"\0" in part for part in encoded):
        raise ImageError(f"the entry {name[:80]!a} is too deep or too long")
    return parts


def _apply(
    tree: Tree, tar: tarfile.TarFile, member: tarfile.TarInfo, parts: tuple[str, ...], made: set[tuple[str, ...]]
) -> None:
    name = parts[-1]
    if name.startswith(WHITEOUT):
        _whiteout(tree, parts, made)
        return
    if not (member.isdir() or member.issym() or member.islnk() or member.isreg()):
        tree.counts.skipped += 1
        return
    if member.sparse is not None:
        raise ImageError(f"the entry {member.name[:80]!a} is a sparse file")
    if member.isreg():
        tree.counts.add(member.size)
    else:
        tree.counts.add()
    parent = tree.parent(parts)
    try:
        if member.isdir():
            _directory(parent, name)
        elif member.issym():
            _replace(parent, name)
            os.symlink(_link_text(member), name, dir_fd=parent)
        elif member.islnk():
            _hard_link(tree, parent, name, member)
        else:
            _file(parent, name, tar, member)
    finally:
        os.close(parent)
    made.update(parts[:depth] for depth in range(1, len(parts) + 1))


def _whiteout(tree: Tree, parts: tuple[str, ...], made: set[tuple[str, ...]]) -> None:
    """Hides what lower layers have, and never what this layer made, in whatever order its entries stand."""
    parent = tree.existing(parts)
    if parent is None:
        return
    try:
        if parts[-1] == OPAQUE:
            with contextlib.closing(_Directory(parent)) as directory:
                names = directory.names()
            _hide(parent, parts[:-1], names, made)
        elif not parts[-1].startswith(WHITEOUT * 2):  # those are aufs's own
            name = parts[-1].removeprefix(WHITEOUT)
            if name in ("", ".", ".."):
                raise ImageError(f"the whiteout {_shown(parts)} names nothing")
            _hide(parent, parts[:-1], [name], made)
    finally:
        os.close(parent)


def _hide(parent: int, above: tuple[str, ...], names: Iterable[str], made: set[tuple[str, ...]]) -> None:
    for name in names:
        if (*above, name) not in made:
            _replace(parent, name)
        elif _is_directory(parent, name):
            below = os.open(name, _PATH_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
            try:
                with contextlib.closing(_Directory(below)) as directory:
                    inner = directory.names()
                _hide(below, (*above, name), inner, made)
            finally:
                os.close(below)


class _Directory:
    """An O_PATH descriptor cannot be listed: this one can."""

    def __init__(self, at: int) -> None:
        self.fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)

    def names(self) -> list[str]:
        return os.listdir(self.fd)  # noqa: PTH208

    def close(self) -> None:
        os.close(self.fd)


def _is_directory(parent: int, name: str) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


def _directory(parent: int, name: str) -> None:
    try:
        os.mkdir(name, 0o755, dir_fd=parent)
    except FileExistsError:
        if not _is_directory(parent, name):
            os.unlink(name, dir_fd=parent)
            os.mkdir(name, 0o755, dir_fd=parent)


def _file(parent: int, name: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    source = tar.extractfile(member)
    assert source is not None
    _replace(parent, name)
    mode = 0o755 if member.mode & 0o111 else 0o644
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=parent)
    with open(fd, "wb", buffering=0) as target:
        while data := source.read(_CHUNK_BYTES):
            view = memoryview(data)
            while view:
                view = view[target.write(view) :]
        os.fchmod(fd, mode)
        mtime_s = min(max(int(member.mtime), 0), _MTIME_S_MAX)
        os.utime(fd, (mtime_s, mtime_s))


def _link_text(member: tarfile.TarInfo) -> str:
    """Of a symbolic link: any text, for it means something only inside a cell."""
    text = member.linkname
    if not text or "\0" in text or len(os.fsencode(text)) > limits.PATH_BYTES_MAX:
        raise ImageError(f"the link {member.name[:80]!a} leads nowhere or too far")
    return text


def _hard_link(tree: Tree, parent: int, name: str, member: tarfile.TarInfo) -> None:
    """To a regular file of the tree, which later layers replace and never change."""
    target = split_name(member.linkname)
    source = tree.existing(target) if target else None
    if source is None:
        raise ImageError(f"the hard link {member.name[:80]!a} has no target")
    try:
        if not stat.S_ISREG(os.stat(target[-1], dir_fd=source, follow_symlinks=False).st_mode):
            raise ImageError(f"the hard link {member.name[:80]!a} leads to no regular file")
        if not _same(source, target[-1], parent, name):
            _replace(parent, name)
            os.link(target[-1], name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError as error:
        raise ImageError(f"the hard link {member.name[:80]!a} has no target") from error
    finally:
        os.close(source)


def _same(source: int, target: str, parent: int, name: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        a = os.stat(target, dir_fd=source, follow_symlinks=False)
        b = os.stat(name, dir_fd=parent, follow_symlinks=False)
        return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
    return False


def _replace(parent: int, name: str) -> None:
    """Nothing is there any more, however deep it was."""
    try:
        if not _is_directory(parent, name):
            os.unlink(name, dir_fd=parent)
            return
    except FileNotFoundError:
        return
    below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        for inner in os.listdir(below):  # noqa: PTH208
            _replace(below, inner)
    finally:
        os.close(below)
    os.rmdir(name, dir_fd=parent)


def finish(tree: Tree) -> None:
    """The mount points of a cell as real directories and files, and a name for the job's uid in /etc/passwd.

    A cell writes these without following links, so an image's links in their places give way.
    """
    for name in DIRECTORIES:
        _directory(tree.root, name)
    for path in FILES:
        parent = tree.parent(tuple(path.split("/")))
        name = path.rpartition("/")[2]
        try:
            if not _is_regular(parent, name):
                _replace(parent, name)
                _write(parent, name, b"")
        finally:
            os.close(parent)
    etc = tree.parent(("etc", "passwd"))
    try:
        _add_account(etc, "passwd", b"job:x:%d:%d:job:/work:/bin/sh\n" % (_JOB_ID, _JOB_ID))
        _add_account(etc, "group", b"job:x:%d:\n" % _JOB_ID)
    finally:
        os.close(etc)


def _add_account(etc: int, name: str, line: bytes) -> None:
    kept = read_small(etc, name)
    if kept is None or any(row.split(b":")[2:3] == [b"%d" % _JOB_ID] for row in kept.splitlines()):
        return
    _replace(etc, name)
    _write(etc, name, kept + (b"\n" if kept and not kept.endswith(b"\n") else b"") + line)


def read_small(parent: int, name: str) -> bytes | None:
    """A regular file of at most a document's size, empty where there is none; None for anything else."""
    if not _is_regular(parent, name):
        return None if _exists(parent, name) else b""
    with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent), "rb") as file:
        data = file.read(limits.IMAGE_DOCUMENT_BYTES_MAX + 1)
    return data if len(data) <= limits.IMAGE_DOCUMENT_BYTES_MAX else None


def _write(parent: int, name: str, data: bytes) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=parent)
    with open(fd, "wb") as file:
        file.write(data)


def _exists(parent: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _is_regular(parent: int, name: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    return False


def copy_linked(source: int, target: Tree) -> None:
    """Fills the empty `target` with hard links to the files of a finished tree; directories are made anew."""
    pending: list[tuple[tuple[str, ...], int]] = [((), source)]
    while pending:
        above, here = pending.pop()
        there = _open_in_root(target.root, "/".join(above))
        try:
            for name in os.listdir(here):  # noqa: PTH208
                about = os.stat(name, dir_fd=here, follow_symlinks=False)
                target.counts.add(about.st_size if stat.S_ISREG(about.st_mode) else 0)
                if stat.S_ISDIR(about.st_mode):
                    os.mkdir(name, 0o755, dir_fd=there)
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                    pending.append(((*above, name), os.open(name, flags, dir_fd=here)))
                else:
                    os.link(name, name, src_dir_fd=here, dst_dir_fd=there, follow_symlinks=False)
        finally:
            os.close(there)
            if above:
                os.close(here)


def _open_in_root(root: int, path: str) -> int:
    how = struct.pack("<3Q", _PATH_DIRECTORY, 0, _IN_ROOT | _NO_MAGICLINKS)
    fd = int(_libc.syscall(_OPENAT2, root, os.fsencode(path or "."), how, ctypes.c_size_t(len(how))))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return fd


def _shown(parts: tuple[str, ...]) -> str:
    return ascii("/".join(parts)[:80])
