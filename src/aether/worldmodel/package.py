"""Builds and signs model packages; the format is `packages/README.md`, its rules `aether.runtime.modelpackage`.

    python -m aether.worldmodel.package keygen --key my.key --public my.pub
    python -m aether.worldmodel.package sign --key my.key packages/pendulum/1.0.0
    python -m aether.worldmodel.package verify --public my.pub packages/pendulum/1.0.0

A private key is PKCS#8 PEM without a passphrase, mode 0600, never inside a package. `openssl genpkey -algorithm
ed25519` makes the same. Signing replaces a former signature; nothing else in the package changes.
"""

import argparse
import base64
import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from aether.contract.canonical import canonical, digest_bytes
from aether.contract.errors import EXIT_USAGE, AetherError
from aether.contract.modelwire import (
    MANIFEST_PAYLOAD_TYPE,
    PACKAGE_SCHEMA_VERSION,
    DsseEnvelope,
    DsseSignature,
    FileEntry,
    Manifest,
    Provenance,
    RuntimeLimits,
    dsse_message,
)
from aether.runtime.graphs import GRAPH_INPUTS, GRAPH_NAMES, GRAPH_OUTPUTS, Graphs, open_session
from aether.runtime.modelpackage import MANIFEST, REQUIRED_FILES, SIGNATURE, load_package, load_public_key

Float = npt.NDArray[np.float32]

LIMITS: Final = RuntimeLimits(history_max=1024, sequence_max=2048, horizons_max=64, encode_rows_max=1024)


def write_document(path: Path, document: msgspec.Struct | Mapping[str, object]) -> None:
    """Canonical JSON (RFC 8785)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(canonical(msgspec.to_builtins(document)))


def open_graphs(directory: Path, state_size: int) -> Graphs:
    """The graphs that were just written, before there is a package to verify."""
    sessions = {name: open_session((directory / f"{name}.onnx").read_bytes()) for name in GRAPH_NAMES}
    return Graphs(**sessions, state_size=state_size)


def write_golden(path: Path, graphs: Graphs, inputs: Mapping[str, Mapping[str, Float]]) -> None:
    """Inputs of every graph and what the graphs answer, as ``<graph>.in.<name>`` and ``<graph>.out.<name>``."""
    arrays: dict[str, Float] = {}
    for name in GRAPH_NAMES:
        for port in GRAPH_INPUTS[name]:
            arrays[f"{name}.in.{port}"] = inputs[name][port]
        for port, value in zip(GRAPH_OUTPUTS[name], graphs.run(name, inputs[name]), strict=True):
            arrays[f"{name}.out.{port}"] = value
    np.savez(path, allow_pickle=False, **arrays)


def golden_difference(golden: Path, graphs: Graphs) -> float:
    """Largest absolute difference between ``graphs`` and another package's golden outputs."""
    worst = 0.0
    with np.load(golden, allow_pickle=False) as arrays:
        for name in GRAPH_NAMES:
            inputs = {port: arrays[f"{name}.in.{port}"] for port in GRAPH_INPUTS[name]}
            for port, got in zip(GRAPH_OUTPUTS[name], graphs.run(name, inputs), strict=True):
                wanted = arrays[f"{name}.out.{port}"]
                worst = max(worst, float(np.abs(got - wanted).max()) if got.shape == wanted.shape else np.inf)
    return worst


def write_manifest(
    directory: Path, *, model_id: str, version: str, created: str, opset: int, provenance: Provenance
) -> Manifest:
    """Hashes the package's files and writes `manifest.json`; the package is complete then, but unsigned."""
    files = {}
    for name in REQUIRED_FILES:
        data = (directory / name).read_bytes()
        files[name] = FileEntry(sha256="sha256:" + hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    manifest = Manifest(
        id=model_id,
        version=version,
        schema_version=PACKAGE_SCHEMA_VERSION,
        created=created,
        files=files,
        limits=LIMITS,
        opset=opset,
        provenance=provenance,
    )
    write_document(directory / MANIFEST, manifest)
    return manifest


def key_id(public: Ed25519PublicKey) -> str:
    """`sha256:` of the DER SubjectPublicKeyInfo."""
    return digest_bytes(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def sign(directory: Path, key: Ed25519PrivateKey) -> None:
    """Writes `signature.dsse.json` over the manifest as it is."""
    manifest = (directory / MANIFEST).read_bytes()
    signature = key.sign(dsse_message(MANIFEST_PAYLOAD_TYPE, manifest))
    envelope = DsseEnvelope(
        payload=base64.b64encode(manifest).decode(),
        payloadType=MANIFEST_PAYLOAD_TYPE,
        signatures=(DsseSignature(keyid=key_id(key.public_key()), sig=base64.b64encode(signature).decode()),),
    )
    write_document(directory / SIGNATURE, envelope)


def generate_key(private: Path, public: Path) -> None:
    """A new key pair; refuses to overwrite either file."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(pem)
    with public.open("xb") as file:
        file.write(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def load_private_key(path: Path) -> Ed25519PrivateKey:
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path.name} is not an Ed25519 key")
    return key


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="aether.worldmodel.package", description="Sign and verify model packages.")
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("keygen", help="make a key pair")
    made.add_argument("--key", type=Path, required=True)
    made.add_argument("--public", type=Path, required=True)
    signing = commands.add_parser("sign", help="sign a package's manifest")
    signing.add_argument("--key", type=Path, required=True)
    signing.add_argument("package", type=Path)
    verifying = commands.add_parser("verify", help="load a package as the runtime does")
    verifying.add_argument("--public", type=Path, required=True)
    verifying.add_argument("package", type=Path)
    given = parser.parse_args(argv)
    try:
        if given.command == "keygen":
            generate_key(given.key, given.public)
        elif given.command == "sign":
            sign(given.package, load_private_key(given.key))
        else:
            loaded = load_package(given.package, [load_public_key(given.public)])
            print(f"{loaded.manifest.id}@{loaded.manifest.version} {loaded.digest}")
    except AetherError as error:
        print(error, file=sys.stderr)
        return error.kind.exit
    except (OSError, ValueError) as error:
        print(f"cannot {given.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
