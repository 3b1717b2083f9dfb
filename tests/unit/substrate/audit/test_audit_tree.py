"""The tree against the definitions of RFC 6962, computed naively, and against known answers."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.substrate.audit import tree


def naive_root(leaves: list[bytes]) -> bytes:
    """RFC 6962 section 2.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + naive_root(leaves[:k]) + naive_root(leaves[k:])).digest()


def source(leaves: list[bytes]) -> tree.NodeSource:
    return lambda level, index: naive_root(leaves[index << level : (index + 1) << level])


def leaves_of(count: int) -> list[bytes]:
    return [b"leaf %d" % i for i in range(count)]


# The test data of the Certificate Transparency reference implementation.
CT_LEAVES = [bytes.fromhex(text) for text in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
)]  # fmt: skip
CT_ROOT = "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


def test_known_root() -> None:
    frontier = tree.Frontier(lambda level, digest: None)
    for leaf in CT_LEAVES:
        frontier.append(tree.leaf_hash(leaf))
    assert frontier.root().hex() == CT_ROOT


@given(st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_frontier_root_is_the_definition(count: int) -> None:
    leaves = leaves_of(count)
    completed: list[int] = []
    frontier = tree.Frontier(lambda level, digest: completed.append(level))
    for leaf in leaves:
        frontier.append(tree.leaf_hash(leaf))
    assert frontier.root() == naive_root(leaves) == tree.root(count, source(leaves))
    assert completed.count(0) == count and completed.count(8) == count // 256


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_inclusion_proofs_hold_and_others_do_not(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 200))
    index = data.draw(st.integers(0, size - 1))
    leaves = leaves_of(size)
    root, leaf = naive_root(leaves), tree.leaf_hash(leaves[index])
    proof = tree.inclusion_proof(index, size, source(leaves))
    assert tree.verify_inclusion(index, size, leaf, proof, root)
    assert not tree.verify_inclusion(index, size, tree.leaf_hash(b"other"), proof, root)
    assert not tree.verify_inclusion(index, size, leaf, [*proof, root], root)
    assert not tree.verify_inclusion(size, size, leaf, proof, root)
    if proof:
        cut = data.draw(st.integers(0, len(proof) - 1))
        assert not tree.verify_inclusion(index, size, leaf, proof[:cut] + proof[cut + 1 :], root)
        changed = [*proof[:cut], bytes(32), *proof[cut + 1 :]]
        assert not tree.verify_inclusion(index, size, leaf, changed, root)
        other = data.draw(st.integers(0, size - 1).filter(lambda i: i != index))
        assert not tree.verify_inclusion(other, size, leaf, proof, root)


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_consistency_proofs_hold_and_others_do_not(data: st.DataObject) -> None:
    new = data.draw(st.integers(1, 200))
    old = data.draw(st.integers(1, new))
    leaves = leaves_of(new)
    old_root, new_root = naive_root(leaves[:old]), naive_root(leaves)
    proof = tree.consistency_proof(old, new, source(leaves))
    assert tree.verify_consistency(old, new, old_root, new_root, proof)
    assert not tree.verify_consistency(old, new, bytes(32), new_root, proof)
    assert not tree.verify_consistency(old, new, old_root, bytes(32), proof)
    assert not tree.verify_consistency(old, new, old_root, new_root, [*proof, bytes(32)])
    if proof:
        assert not tree.verify_consistency(old, new, old_root, new_root, proof[:-1])


@given(st.integers(-2, 9), st.integers(-2, 9), st.lists(st.binary(min_size=0, max_size=33), max_size=6))
def test_verifying_never_raises(index: int, size: int, proof: list[bytes]) -> None:
    assert not tree.verify_inclusion(index, size, b"", proof, b"no hash")
    assert not tree.verify_consistency(index, size, b"", b"no hash", proof)


def test_proofs_of_what_is_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="no leaf"):
        tree.inclusion_proof(3, 3, source([]))
    with pytest.raises(ValueError, match="no consistency"):
        tree.consistency_proof(4, 3, source([]))
