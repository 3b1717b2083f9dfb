"""The root of a cell in Python: the operations of a program against a new tmpfs that then becomes "/".

The twin of native/mounts.c, where the reasons are. Runs in the process that becomes PID 1.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
import struct
from collections.abc import Sequence
from typing import Final

from aether.spawner.linux import kernel
from aether.spawner.linux import program as pg
from aether.spawner.linux.initwire import phase_number
from aether.spawner.linux.program import NODEV, NOEXEC, NOSUID, RDONLY

_MS_PRIVATE, _MS_SLAVE, _MS_REC = 1 << 18, 1 << 19, 1 << 14
_AT_EMPTY_PATH, _AT_RECURSIVE, _OPEN_TREE_CLONE, _CLOEXEC = 0x1000, 0x8000, 1, os.O_CLOEXEC
_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x02, 0x04, 0x08
_SET_FLAG, _SET_STRING, _CMD_CREATE = 0, 1, 6
_IDMAP: Final = 0x0010_0000
_SEALED: Final = NOSUID | NODEV | NOEXEC | RDONLY


def open_beneath(directory: int, path: str, flags: int, resolve: int = 0) -> int:
    how = struct.pack("<3Q", flags | os.O_CLOEXEC, 0, resolve | _BENEATH | _NO_MAGICLINKS)
    return kernel.syscall("openat2", directory, os.fsencode(path or ".") + b"\0", how, len(how))


def _open_inside(root: int, path: str) -> int:
    return open_beneath(root, path.lstrip("/"), os.O_PATH, _NO_SYMLINKS)


def _open_parent(root: int, path: str) -> tuple[int, str]:
    above, leaf = posixpath.split(path)
    if above == "/":
        return os.dup(root), leaf
    with contextlib.suppress(FileNotFoundError):
        return _open_inside(root, above), leaf
    parent, name = _open_parent(root, above)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=parent)
        return open_beneath(parent, name, os.O_PATH | os.O_DIRECTORY, _NO_SYMLINKS), leaf
    finally:
        os.close(parent)


def _make_dir(root: int, path: str, mode: int) -> None:
    if path == "/":
        return
    parent, leaf = _open_parent(root, path)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(leaf, mode, dir_fd=parent)
    finally:
        os.close(parent)


def _make_file(root: int, path: str, content: str | None, mode: int) -> None:
    """Without content a mount point: what is there stays as it is."""
    parent, leaf = _open_parent(root, path)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (0 if content is None else os.O_TRUNC)
        fd = os.open(leaf, flags, mode, dir_fd=parent)
        with open(fd, "wb") as f:
            f.write(os.fsencode(content or ""))
    except OSError as error:
        if error.errno not in (30, 13):  # EROFS, EACCES: an existing mount point, the mount decides
            raise
    finally:
        os.close(parent)


def _make_symlink(root: int, path: str, target: str) -> None:
    parent, leaf = _open_parent(root, path)
    try:
        os.symlink(target, leaf, dir_fd=parent)
    finally:
        os.close(parent)


def _attach(tree: int, root: int, path: str) -> None:
    try:
        at = _open_inside(root, path)
        try:
            kernel.syscall("move_mount", tree, b"\0", at, b"\0", 0x04 | 0x40)
        finally:
            os.close(at)
    finally:
        os.close(tree)


def _set_attributes(
    mount: int, attributes: int, flags: int = 0, propagation: int = 0, userns: int | None = None
) -> None:
    if userns is not None:
        attributes |= _IDMAP
    attr = struct.pack("<4Q", attributes, 0, propagation, userns or 0)
    kernel.syscall("mount_setattr", mount, b"\0", _AT_EMPTY_PATH | flags, attr, len(attr))


def _clone_tree(source: int, attributes: int, userns: int | None = None) -> int:
    flags = _OPEN_TREE_CLONE | _CLOEXEC | _AT_EMPTY_PATH | _AT_RECURSIVE
    tree = kernel.syscall("open_tree", source, b"\0", flags)
    try:
        _set_attributes(tree, attributes, _AT_RECURSIVE, _MS_PRIVATE, userns)
    except OSError:
        os.close(tree)
        raise
    return tree


class Layers:
    """Directories that the next overlay is made of; those that are mounts of their own have `mapped` set."""

    def __init__(self, userns: int | None) -> None:
        self.userns = userns
        self.opened: list[tuple[int, bool]] = []

    def add(self, root: int, op: pg.Op) -> None:
        fd = self._open(root, op)
        mapped = bool(op.flags & pg.LAYER_MAPPED)
        if mapped:
            try:
                tree = _clone_tree(fd, NOSUID | NODEV | RDONLY, self.userns)
            finally:
                os.close(fd)
            fd = tree
            _make_dir(root, op.path, 0o755)
            _attach(os.dup(tree), root, op.path)
        self.opened.append((fd, mapped))

    @staticmethod
    def _open(root: int, op: pg.Op) -> int:
        if op.flags & pg.LAYER_NEW:
            _make_dir(root, op.path, 0o755)
            return _open_inside(root, op.path)
        allowed = os.open(op.text, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return open_beneath(allowed, op.text2, os.O_PATH | os.O_DIRECTORY, _NO_SYMLINKS)
        finally:
            os.close(allowed)

    def name(self, number: str) -> bytes:
        return b"/proc/self/fd/%d" % self.opened[int(number)][0]

    def release(self) -> None:
        while self.opened:
            fd, mapped = self.opened.pop()
            if mapped:
                kernel.umount_detach(b"/proc/self/fd/%d" % fd)
            os.close(fd)


def new_mount(kind: str, options: str, attributes: int, layers: Layers | None = None) -> int:
    context = kernel.syscall("fsopen", kind.encode(), 1)
    try:
        for line in options.split("\n") if options else ():
            name, _, value = os.fsencode(line).partition(b"=")
            if value == b"@":
                kernel.syscall("fsconfig", context, _SET_FLAG, name, None, 0)
                continue
            if layers is not None and value.startswith(b"@"):
                value = layers.name(value[1:].decode())
            kernel.syscall("fsconfig", context, _SET_STRING, name, value, 0)
        kernel.syscall("fsconfig", context, _CMD_CREATE, None, None, 0)
        return kernel.syscall("fsmount", context, 1, attributes)
    finally:
        os.close(context)


def _bind(root: int, op: pg.Op) -> None:
    device = bool(op.flags & pg.BIND_DEVICE)
    attributes = NOSUID | (NOEXEC if device else NODEV)
    if not op.flags:
        attributes |= RDONLY
    allowed = os.open(op.text, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        source = open_beneath(allowed, op.text2, os.O_PATH, _NO_SYMLINKS if op.flags else 0)
    finally:
        os.close(allowed)
    try:
        mode = os.fstat(source).st_mode
        if device and not stat.S_ISCHR(mode):
            raise OSError(19, "not a character device")
        if stat.S_ISDIR(mode):
            _make_dir(root, op.path, 0o755)
        else:
            _make_file(root, op.path, None, 0o444)
        tree = _clone_tree(source, attributes)
    finally:
        os.close(source)
    _attach(tree, root, op.path)


def _make_device(root: int, op: pg.Op) -> None:
    parent, leaf = _open_parent(root, op.path)
    try:
        os.mknod(leaf, stat.S_IFCHR | 0o666, os.makedev(1, op.mode), dir_fd=parent)
    except PermissionError:
        _bind(root, pg.Op(pg.OP_BIND, op.step, op.path, flags=pg.BIND_DEVICE, text="/dev", text2=leaf))
    finally:
        os.close(parent)


def _seal(root: int, path: str) -> None:
    at = _open_inside(root, path)
    try:
        _set_attributes(at, RDONLY)
    finally:
        os.close(at)


def _mask(root: int, path: str) -> None:
    try:
        target = _open_inside(root, path)
    except FileNotFoundError:
        return
    is_dir = stat.S_ISDIR(os.fstat(target).st_mode)
    os.close(target)
    if is_dir:
        tree = new_mount("tmpfs", "nr_inodes=2\nmode=0555", _SEALED)
    else:
        null = _open_inside(root, "/dev/null")
        tree = _clone_tree(null, NOSUID | NOEXEC)
        os.close(null)
    _attach(tree, root, path)


def _add_mount(root: int, op: pg.Op, layers: Layers) -> None:
    _make_dir(root, op.path, 0o755)
    mount = new_mount(op.text2, op.text, op.flags, layers)
    layers.release()
    if op.path != "/":
        _attach(mount, root, op.path)
        return
    kernel.umount_detach(b"/proc/self/fd/%d" % root)
    kernel.syscall("move_mount", mount, b"\0", -100, b"/\0", 0x04)
    os.dup2(mount, root, inheritable=False)
    os.close(mount)


def perform(root: int, op: pg.Op, layers: Layers) -> None:
    match op.kind:
        case pg.OP_DIR:
            _make_dir(root, op.path, op.mode)
        case pg.OP_SYMLINK:
            _make_symlink(root, op.path, op.text)
        case pg.OP_FILE:
            _make_file(root, op.path, op.text, op.mode)
        case pg.OP_BIND:
            _bind(root, op)
        case pg.OP_MOUNT:
            _add_mount(root, op, layers)
        case pg.OP_LAYER:
            layers.add(root, op)
        case pg.OP_DEVICE:
            _make_device(root, op)
        case pg.OP_SEAL:
            _seal(root, op.path)
        case _:
            _mask(root, op.path)


def build_root(ops: Sequence[pg.Op], userns: int | None, phase: list[int]) -> None:
    """Keeps `phase[0]` at the plan's step, or at the number of a fixed phase. `userns` maps layers; it is closed."""
    phase[0] = phase_number("new root")
    os.umask(0)
    kernel.mount(b"/", _MS_REC | _MS_SLAVE)
    root = new_mount("tmpfs", "size=1m\nnr_inodes=2048\nmode=0755", NOSUID | NODEV)
    kernel.syscall("move_mount", root, b"\0", -100, b"/\0", 0x04)
    layers = Layers(userns)
    for op in ops:
        phase[0] = op.step
        perform(root, op, layers)
    if userns is not None:
        os.close(userns)
    phase[0] = phase_number("pivot")
    os.fchdir(root)
    kernel.syscall("pivot_root", b".\0", b".\0")
    kernel.umount_detach(b".")
    os.chdir("/")
    os.close(root)
    os.umask(0o22)
