"""Published vectors: the tree of RFC 6962 (the vectors of certificate-transparency), the strings of RFC 8785."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conformance.second_verifier import independent_writer as writer
from tools import aether_verify as verifier

LEAVES = [bytes.fromhex(each) for each in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657")]
LEAVES.append(bytes(range(0x60, 0x70)))
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


@pytest.mark.parametrize("size", range(9))
def test_roots(size: int) -> None:
    leaves = [verifier.leaf_hash(each) for each in LEAVES[:size]]
    assert verifier.root_of(leaves).hex() == ROOTS[size] == writer.mth(LEAVES[:size]).hex()


@given(size=st.integers(1, 70), data=st.data())
def test_inclusion_proofs(size: int, data: st.DataObject) -> None:
    entries = [bytes([at]) for at in range(size)]
    index, other = data.draw(st.integers(0, size - 1)), data.draw(st.integers(-1, size))
    path = writer.path(index, entries)
    claim = verifier.Checkpoint("o", size, writer.mth(entries))
    leaf = verifier.leaf_hash(entries[index])
    assert verifier.included(leaf, index, claim, path)
    assert verifier.included(leaf, other, claim, path) == (other == index)
    assert not verifier.included(verifier.leaf_hash(b"other"), index, claim, path)
    assert not verifier.included(leaf, index, claim, [*path, bytes(32)])
    assert not verifier.included(leaf, index, claim._replace(size=2 * size + 1), path), "the size is proven too"
    if path:
        at = data.draw(st.integers(0, len(path) - 1))
        assert not verifier.included(leaf, index, claim, path[:at] + path[at + 1 :])
        assert not verifier.included(leaf, index, claim, [*path[:at], bytes(32), *path[at + 1 :]])
    if len(path) > 1:
        assert not verifier.included(leaf, index, claim, path[::-1])


def test_rfc_8785_strings() -> None:
    given = (
        rb'{"string": "\u20ac$\u000F\u000aA' + rb"'" + rb'\u0042\u0022\u005c\\\"\/", "literals": [null, true, false]}'
    )
    expected = '{"literals":[null,true,false],"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    assert verifier.write_json(verifier.read_json(given)) == expected.encode()


REFUSED = [
    (b"", 0),
    (b'{"a":1.0}', None),
    (b'{"a":1e2}', None),
    (b'{"a":NaN}', None),
    (b'{"a":-0}', 5),
    (b'{"a":9007199254740992}', None),
    (b'{"a":' + b"9" * 5000 + b"}", None),
    (b'{"a":1,"a":1}', None),
    (b'{"b":1,"a":1}', 2),
    (b'{"a": 1}', 5),
    (b'{"a":1}\n', 7),
    (b'\xef\xbb\xbf{"a":1}', 0),
    (b'{"a":"\xff"}', 6),
    (b'{"a":"\\ud800"}', None),
    (b'{"a":"\\u00e9"}', 6),
    (b'{"a":"\x01"}', 6),
    (b'{"a":"\\u001F"}', 11),
    ('{"é":1}'.encode(), None),
    (b"[" * 60_000, None),
    (b'{"a":"' + b"x" * 70_000 + b'"}', 0),
]


@pytest.mark.parametrize(("text", "offset"), REFUSED, ids=range(len(REFUSED)))
def test_not_canonical(text: bytes, offset: int | None) -> None:
    with pytest.raises(verifier.VerifyError) as caught:
        verifier.read_record(text)
    assert caught.value.failure["name"] == "ENTRY_NOT_CANONICAL"
    assert offset is None or caught.value.failure["offset"] == offset


@pytest.mark.parametrize("depth", range(880, 1020, 3))
def test_nesting_is_refused_in_order(depth: int) -> None:
    with pytest.raises(verifier.VerifyError):
        verifier.read_record(b"[" * depth + b"]" * depth)


@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_any_bytes_are_refused_in_order(data: bytes) -> None:
    with pytest.raises(verifier.VerifyError):
        verifier.read_record(data)


@given(
    st.recursive(st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(), st.lists, max_leaves=9)
)
def test_canonical_is_a_fixed_point(value: object) -> None:
    text = verifier.write_json(value)
    assert verifier.read_json(text) == value
    assert verifier.write_json(verifier.read_json(text)) == text
