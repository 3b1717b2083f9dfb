"""The process that unpacks one image: `python -m aether.orchestrator.images.unpack REQUEST`, bounded and on its own.

It reads what a client sent, so it holds nothing: an ordinary user's rights, limits on memory, time and files, a
Landlock domain that lets it change the new tree alone, run nothing and use no TCP. Its request is JSON:
    {"archive": fd, "target": fd}                        unpack an archive
    {"base": fd, "layer": fd, "target": fd}              a finished tree with one layer on top
`target` is an empty directory. Standard output gets one JSON object: `{"ok": {...}}` or `{"error": "why"}`.
"""

from __future__ import annotations

import ctypes
import gzip
import importlib
import json
import os
import resource
import signal
import struct
import sys
import zlib
from dataclasses import asdict
from typing import Any, BinaryIO, Final

from aether.contract import limits
from aether.orchestrator.images import tree as trees
from aether.orchestrator.images.layout import Archive, Bounded, Image, ImageError, Layer, Section, read_image

MEMORY_BYTES: Final = 1 << 30
_libc: Final = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_CHANGES: Final = sum(1 << bit for bit in (0, 1, *range(4, 15)))
"""Landlock: execute, write_file, remove_*, make_*, refer, truncate."""
_NEEDED: Final = sum(1 << bit for bit in (1, 4, 5, 7, 8, 12, 13, 14))
"""Of these what makes a tree of directories, files and links."""


def main() -> None:
    request = json.loads(sys.argv[1])
    bound()
    os.umask(0)
    try:
        answer: dict[str, Any] = {"ok": _derive(request) if "base" in request else _unpack(request)}
    except ImageError as error:
        answer = {"error": str(error)}
    except (OSError, MemoryError, RecursionError, EOFError, zlib.error) as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    json.dump(answer, sys.stdout)


def bound() -> None:
    """Limits on itself: no new privileges, an end with its parent."""
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    bounds = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CPU: limits.IMAGE_UNPACK_S_MAX,
        resource.RLIMIT_FSIZE: limits.IMAGE_BYTES_MAX,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 512,
    }
    for which, bound in bounds.items():
        resource.setrlimit(which, (bound, bound))


def confine(target: int) -> None:
    """From here on only what lies below `target` can be changed (landlock(7)).

    Before ABI 2 every hard link across directories would be refused: then there is no domain.
    """
    abi = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 2:
        return
    handled = _CHANGES if abi >= 3 else _CHANGES & ~(1 << 14)
    attr = struct.pack("<3Q", handled, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _libc.syscall(_CREATE_RULESET, attr, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "cannot make a Landlock ruleset")
    rule = struct.pack("<Qi", _NEEDED & handled, target)
    if _libc.syscall(_ADD_RULE, ruleset, 1, rule, 0) != 0 or _libc.syscall(_RESTRICT_SELF, ruleset, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot enter a Landlock domain")
    os.close(ruleset)


def _unpack(request: dict[str, Any]) -> dict[str, Any]:
    confine(request["target"])
    archive = Archive(request["archive"])
    image = read_image(archive)
    tree = trees.Tree(request["target"])
    for layer in image.layers:
        _apply(tree, archive.fd, layer)
    trees.finish(tree)
    return {**_document(image, tree), "counts": asdict(tree.counts)}


def _apply(tree: trees.Tree, fd: int, layer: Layer) -> None:
    packed = Section(fd, layer.offset, layer.size_bytes)
    content = Bounded(_plain(packed, layer.compression), limits.IMAGE_BYTES_MAX - tree.counts.size_bytes)
    trees.apply_layer(tree, content)
    if content.digest() != layer.diff_id:
        raise ImageError(f"the content of layer {layer.digest} is not what the configuration says")
    if packed.digest() != layer.digest:
        raise ImageError(f"layer {layer.digest} is not what its digest says")


def _plain(packed: Section, compression: str) -> BinaryIO | Section | Any:
    if compression == "none":
        return packed
    if compression == "gzip":
        return gzip.GzipFile(fileobj=packed, mode="rb")  # type: ignore[call-overload]
    try:
        zstd = importlib.import_module("compression.zstd")
    except ImportError as error:
        raise ImageError("its layers are zstd, which needs Python 3.14: save it with gzip layers") from error
    return zstd.ZstdFile(packed)


def _document(image: Image, tree: trees.Tree) -> dict[str, Any]:
    execution = image.execution
    uid, gid = _account(tree, execution.user)
    return {
        "digest": image.digest,
        "manifest": image.manifest.decode(),
        "config": image.config.decode(),
        "layers": [layer.digest for layer in image.layers],
        "run": {
            "env": list(execution.env or ()),
            "entrypoint": list(execution.entrypoint or ()),
            "cmd": list(execution.cmd or ()),
            "working_dir": execution.working_dir or "/",
            "user": execution.user,
            "uid": uid,
            "gid": gid,
        },
    }


def _account(tree: trees.Tree, user: str) -> tuple[int | None, int | None]:
    """The ids of `user[:group]`, by number or by the image's own passwd and group; None for root and for none."""
    name, _, group = user.partition(":")
    if not name:
        return None, None
    passwd, groups = _table(tree, "passwd"), _table(tree, "group")
    row = passwd.get(name)
    uid = int(name) if name.isascii() and name.isdigit() else _number(row, 2)
    gid = _number(row, 3)
    if group:
        gid = int(group) if group.isascii() and group.isdigit() else _number(groups.get(group), 2)
    if uid is None:
        raise ImageError(f"its user {name[:80]!a} is not in its /etc/passwd")
    return (
        (uid, gid or uid) if 0 < uid < limits.CELL_UID_BLOCK and (gid or uid) < limits.CELL_UID_BLOCK else (None, None)
    )


def _table(tree: trees.Tree, name: str) -> dict[str, list[str]]:
    etc = tree.existing(("etc", name))
    if etc is None:
        return {}
    try:
        text = (trees.read_small(etc, name) or b"").decode("utf-8", "replace")
    finally:
        os.close(etc)
    return {row.split(":")[0]: row.split(":") for row in text.splitlines()}


def _number(row: list[str] | None, at: int) -> int | None:
    return int(row[at]) if row is not None and len(row) > at and row[at].isascii() and row[at].isdigit() else None


def _derive(request: dict[str, Any]) -> dict[str, Any]:
    tree = trees.Tree(request["target"])
    trees.copy_linked(request["base"], tree)
    # Only now: Landlock lets no file into a hierarchy where more may be done to it than where it comes from.
    confine(request["target"])
    size = os.fstat(request["layer"]).st_size
    packed = Section(request["layer"], 0, size)
    trees.apply_layer(tree, Bounded(packed, limits.IMAGE_BYTES_MAX))
    trees.finish(tree)
    return {"layer": packed.digest(), "layer_bytes": size, "counts": asdict(tree.counts)}


if __name__ == "__main__":
    main()
