"""The Merkle tree of RFC 6962 (section 2.1; proofs as in RFC 9162), pure.

`Frontier` appends in O(1) amortised and knows the root. Proofs are computed from hashes of complete subtrees
that somebody stored: `node(level, index)` is the hash of the leaves `index * 2^level .. (index + 1) * 2^level - 1`.
The verify functions need no storage and never raise on hostile proofs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Final

EMPTY_ROOT: Final = hashlib.sha256(b"").digest()
HASH_BYTES: Final = 32
NodeSource = Callable[[int, int], bytes]
"""`(level, index)` -> hash of a complete subtree."""

_sha256 = hashlib.sha256


def leaf_hash(entry: bytes) -> bytes:
    """SHA-256(0x00 || entry)."""
    return _sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right)."""
    return _sha256(b"\x01" + left + right).digest()


class Frontier:
    """The right edge of a growing tree: one hash per set bit of the size, largest subtree first.

    `on_complete(level, hash)` is told of every complete subtree whose level is a multiple of 8, leaves
    included: those are what hash tiles store.
    """

    __slots__ = ("_on_complete", "_stack", "size")

    def __init__(self, on_complete: Callable[[int, bytes], None]) -> None:
        self.size = 0
        self._stack: list[bytes] = []
        self._on_complete = on_complete

    def resume(self, size: int, node: NodeSource) -> None:
        """Continues a tree of `size` leaves whose complete subtrees `node` knows."""
        self.size = size
        self._stack = [node(level, index) for level, index in complete_subtrees(size)]

    def append(self, leaf: bytes) -> None:
        """Adds the next leaf hash."""
        on_complete, stack = self._on_complete, self._stack
        on_complete(0, leaf)
        rest, level, merged = self.size, 0, leaf
        while rest & 1:
            merged = _sha256(b"\x01" + stack.pop() + merged).digest()
            rest >>= 1
            level += 1
            if not level & 7:
                on_complete(level, merged)
        stack.append(merged)
        self.size += 1

    def root(self) -> bytes:
        """The root of the tree so far."""
        if not self._stack:
            return EMPTY_ROOT
        merged = self._stack[-1]
        for left in reversed(self._stack[:-1]):
            merged = node_hash(left, merged)
        return merged


def complete_subtrees(size: int) -> list[tuple[int, int]]:
    """The `(level, index)` of the maximal complete subtrees of a tree of `size` leaves, from the left."""
    found: list[tuple[int, int]] = []
    start = 0
    for level in range(size.bit_length() - 1, -1, -1):
        if size >> level & 1:
            found.append((level, start >> level))
            start += 1 << level
    return found


def root(size: int, node: NodeSource) -> bytes:
    """The root over the first `size` leaves."""
    return _subtree(0, size, node) if size else EMPTY_ROOT


def inclusion_proof(index: int, size: int, node: NodeSource) -> list[bytes]:
    """The audit path of leaf `index` in the tree of `size` leaves, from the leaf's sibling upwards."""
    if not 0 <= index < size:
        raise ValueError(f"no leaf {index} in a tree of {size}")
    path: list[bytes] = []
    low, high = 0, size
    while high - low > 1:
        split = low + _split(high - low)
        if index < split:
            path.append(_subtree(split, high, node))
            high = split
        else:
            path.append(_subtree(low, split, node))
            low = split
    path.reverse()
    return path


def consistency_proof(old: int, new: int, node: NodeSource) -> list[bytes]:
    """That the tree of `old` leaves is a prefix of the tree of `new` leaves (RFC 9162 section 2.1.4.1)."""
    if not 0 < old <= new:
        raise ValueError(f"no consistency proof from {old} to {new}")
    path: list[bytes] = []
    low, high, whole = 0, new, True
    while old != high:
        split = low + _split(high - low)
        if old <= split:
            path.append(_subtree(split, high, node))
            high = split
        else:
            path.append(_subtree(low, split, node))
            low, whole = split, False
    if not whole:
        path.append(_subtree(low, high, node))
    path.reverse()
    return path


def verify_inclusion(index: int, size: int, leaf: bytes, path: Sequence[bytes], expected_root: bytes) -> bool:
    """RFC 9162 section 2.1.3.2."""
    if not 0 <= index < size:
        return False
    low, last, merged = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            return False
        if low & 1 or low == last:
            merged = node_hash(sibling, merged)
            while low and not low & 1:
                low >>= 1
                last >>= 1
        else:
            merged = node_hash(merged, sibling)
        low >>= 1
        last >>= 1
    return last == 0 and merged == expected_root


def verify_consistency(old: int, new: int, old_root: bytes, new_root: bytes, path: Sequence[bytes]) -> bool:
    """RFC 9162 section 2.1.4.2; a tree is consistent with itself by the empty proof."""
    if not 0 < old <= new:
        return False
    if old == new:
        return not path and old_root == new_root
    hashes = list(path)
    if old & (old - 1) == 0:
        hashes.insert(0, old_root)
    if not hashes:
        return False
    low, last = old - 1, new - 1
    while low & 1:
        low >>= 1
        last >>= 1
    from_old = from_new = hashes[0]
    for sibling in hashes[1:]:
        if last == 0:
            return False
        if low & 1 or low == last:
            from_old = node_hash(sibling, from_old)
            from_new = node_hash(sibling, from_new)
            while low and not low & 1:
                low >>= 1
                last >>= 1
        else:
            from_new = node_hash(from_new, sibling)
        low >>= 1
        last >>= 1
    return last == 0 and from_old == old_root and from_new == new_root


def _split(count: int) -> int:
    """The largest power of two smaller than `count` (> 1)."""
    return 1 << (count - 1).bit_length() - 1


def _subtree(low: int, high: int, node: NodeSource) -> bytes:
    count = high - low
    if count & (count - 1) == 0 and low % count == 0:
        level = count.bit_length() - 1
        return node(level, low >> level)
    split = low + _split(count)
    return node_hash(_subtree(low, split, node), _subtree(split, high, node))
