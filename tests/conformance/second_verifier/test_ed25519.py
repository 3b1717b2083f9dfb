"""The Ed25519 of the stand-alone verifier against RFC 8032 section 7.1 and against `cryptography`."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import aether_verify as verifier

# public key, message, signature: TEST 1, 2, 3 and SHA(abc).
VECTORS = [
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
    (
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("public", "message", "signature"), VECTORS)
def test_rfc_8032_vectors(public: str, message: str, signature: str) -> None:
    key, text, good = (bytes.fromhex(each) for each in (public, message, signature))
    assert verifier.ed25519_good(key, good, text)
    assert not verifier.ed25519_good(key, good, text + b"\0")
    for position in range(0, 64, 7):
        bad = bytearray(good)
        bad[position] ^= 1
        assert not verifier.ed25519_good(key, bytes(bad), text)


def test_refuses_what_rfc_8032_refuses() -> None:
    public, message, signature = (bytes.fromhex(each) for each in VECTORS[1])
    s = int.from_bytes(signature[32:], "little")
    malleable = signature[:32] + (s + verifier.L).to_bytes(32, "little")
    assert not verifier.ed25519_good(public, malleable, message), "S not below L"
    assert not verifier.ed25519_good(public[:31], signature, message)
    assert not verifier.ed25519_good(public, signature + b"\0", message)
    not_reduced = (verifier.P + 1).to_bytes(32, "little")
    with pytest.raises(ValueError, match="not a point"):
        verifier.point_decode(not_reduced)
    minus_zero = (1 | 1 << 255).to_bytes(32, "little")
    with pytest.raises(ValueError, match="not a point"):
        verifier.point_decode(minus_zero)
    assert not verifier.ed25519_good(not_reduced, signature, message)


@settings(max_examples=40, deadline=None)
@given(seed=st.binary(min_size=32, max_size=32), message=st.binary(max_size=200), other=st.binary(max_size=200))
def test_agrees_with_cryptography(seed: bytes, message: bytes, other: bytes) -> None:
    private = Ed25519PrivateKey.from_private_bytes(seed)
    public, signature = private.public_key().public_bytes_raw(), private.sign(message)
    assert verifier.ed25519_good(public, signature, message)
    assert verifier.ed25519_good(public, signature, other) == (message == other)
