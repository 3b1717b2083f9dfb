"""Who this node is, on disk: `keys/node.json` with its id and the epoch of its log.

Made once, at the first start; whoever loses it has another node. The origin of the log is derived from it.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from aether.contract import ids
from aether.contract.errors import AetherError


class NodeFile(msgspec.Struct, frozen=True, kw_only=True):
    """The node's id and the epoch of its log, counted from 1."""

    node_id: str
    epoch: int

    @property
    def origin(self) -> str:
        return f"aether/{self.node_id}/{self.epoch}"

    @property
    def next(self) -> NodeFile:
        """The same node in the epoch after this one."""
        return NodeFile(node_id=self.node_id, epoch=self.epoch + 1)


def write_node(path: Path, node: NodeFile) -> None:
    """Replaces the file; durable when this returns."""
    _write(path, msgspec.json.encode(node) + b"\n", 0o640)


def open_node(path: Path) -> NodeFile:
    """Reads or makes the file; raises AetherError STATE_UNUSABLE."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=NodeFile)
        ids.parse(ids.NODE, found.node_id)
        return found
    except FileNotFoundError:
        return _create(path)
    except (OSError, msgspec.MsgspecError, AetherError) as error:
        raise AetherError("STATE_UNUSABLE", f"cannot read the node's identity {path}: {error}") from error


def _create(path: Path) -> NodeFile:
    made = NodeFile(node_id=ids.new(ids.NODE), epoch=1)
    write_node(path, made)
    return made


def _write(path: Path, data: bytes, mode: int) -> None:
    temporary = path.with_suffix(".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
