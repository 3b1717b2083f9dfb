"""Loads a model package only when everything about it verifies; the first doubt ends the load.

On disk::

    <id>/<version>/
      manifest.json             canonical JSON; names every other file by digest and size
      signature.dsse.json       DSSE envelope over manifest.json, Ed25519
      encode.onnx step.onnx sequence.onnx
      schema.json stats.json golden.npz
      MODEL_CARD.md validation/report.json

Rules, in order; a failure is AetherError BAD_PACKAGE "cannot load model X: why" with ``details.reason``:

- `layout`: a directory of regular files, nothing beside what the manifest names; links are never followed
- `size`: manifest, signature and every file within their bounds; the total within MODEL_PACKAGE_BYTES_MAX
- `signature`: the envelope's payload is manifest.json byte for byte and verifies under one of the given keys; the
  envelope's keyid is a hint and not read
- `manifest`: strict types, canonical form, a known schema version, the required files
- `hash`: every file's digest; each file is read once, and the bytes that were hashed are the bytes that are used
- `document`: schema and stats of strict types that agree with each other
- `graph`: `onnxfile.check_graph`, and the inputs and outputs that `graphs` names, with the schema's widths
- `golden`: the graphs reproduce the package's own vectors on this machine
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import numpy as np
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from aether.contract import modelwire
from aether.contract.canonical import canonical, digest_bytes
from aether.contract.errors import AetherError
from aether.contract.limits import KIB, MIB, MODEL_PACKAGE_BYTES_MAX
from aether.contract.modelwire import DsseEnvelope, Manifest, ModelInfo, ModelSchema, ModelStats
from aether.runtime.calibration import Tables
from aether.runtime.graphs import GRAPH_INPUTS, GRAPH_NAMES, GRAPH_OUTPUTS, Float, Graphs, open_session
from aether.runtime.onnxfile import GraphError, check_graph

MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "signature.dsse.json"
REQUIRED_FILES: Final = (
    "MODEL_CARD.md",
    "encode.onnx",
    "golden.npz",
    "schema.json",
    "sequence.onnx",
    "stats.json",
    "step.onnx",
    "validation/report.json",
)
GOLDEN_RTOL: Final = 1e-4
GOLDEN_ATOL: Final = 2e-5
_MANIFEST_BYTES_MAX: Final = 64 * KIB
_SIGNATURE_BYTES_MAX: Final = 128 * KIB
_KEY_BYTES_MAX: Final = 8 * KIB
_FILES_MAX: Final = 64
_GOLDEN_ENTRIES_MAX: Final = 32
_GOLDEN_BYTES_MAX: Final = 4 * MIB
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
T = TypeVar("T")


class PackageError(Exception):
    """Why a package is not loaded: `reason` is one of the rules of this module, the text a clause."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class VerifiedFiles:
    """A package whose signature and hashes hold: the manifest, its digest, and the bytes that were hashed."""

    manifest: Manifest
    digest: str
    files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class LoadedPackage:
    """A package that passed every rule, ready to run."""

    manifest: Manifest
    digest: str
    schema: ModelSchema
    stats: ModelStats
    tables: Tables
    graphs: Graphs

    @property
    def info(self) -> ModelInfo:
        manifest = self.manifest
        return ModelInfo(
            id=manifest.id, version=manifest.version, digest=self.digest, schema=self.schema, limits=manifest.limits
        )


def load_public_key(path: Path) -> Ed25519PublicKey:
    """An Ed25519 public key in PEM; raises AetherError BAD_PACKAGE."""
    try:
        key = load_pem_public_key(_read(path, _KEY_BYTES_MAX))
    except (PackageError, OSError, ValueError, UnsupportedAlgorithm) as error:
        raise _refused(path.name, PackageError("signature", f"its public key cannot be read: {error}")) from error
    if not isinstance(key, Ed25519PublicKey):
        raise _refused(path.name, PackageError("signature", "the public key is not Ed25519"))
    return key


def load_package(directory: Path, keys: Sequence[Ed25519PublicKey]) -> LoadedPackage:
    """The package in ``directory``, verified under one of ``keys``; raises AetherError BAD_PACKAGE."""
    try:
        return _load(verify_files(directory, keys))
    except PackageError as refusal:
        raise _refused("/".join(directory.parts[-2:]), refusal) from refusal


def load_unsigned(directory: Path) -> LoadedPackage:
    """Every rule but the signature, for a package that its maker has not signed yet. Never used to serve."""
    try:
        return _load(_check_files(directory, _read_named(directory, MANIFEST, _MANIFEST_BYTES_MAX)))
    except PackageError as refusal:
        raise _refused("/".join(directory.parts[-2:]), refusal) from refusal


def verify_files(directory: Path, keys: Sequence[Ed25519PublicKey]) -> VerifiedFiles:
    """Signature, manifest and hashes; raises PackageError. Nothing of the package is parsed before its signature."""
    raw = _read_named(directory, MANIFEST, _MANIFEST_BYTES_MAX)
    _check_signature(raw, _read_named(directory, SIGNATURE, _SIGNATURE_BYTES_MAX), keys)
    return _check_files(directory, raw)


def _refused(name: str, refusal: PackageError) -> AetherError:
    return AetherError("BAD_PACKAGE", f"cannot load model {name}: {refusal}", details={"reason": refusal.reason})


# ---- bytes


def _read(path: Path, bytes_max: int) -> bytes:
    """The whole of a regular file; the last component is never followed as a link, and a FIFO does not block."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise PackageError("layout", f"{path.name} is not a regular file")
        data = file.read(bytes_max + 1)
    if len(data) > bytes_max:
        raise PackageError("size", f"{path.name} is larger than {bytes_max} bytes")
    return data


def _read_named(directory: Path, name: str, bytes_max: int) -> bytes:
    try:
        return _read(directory / name, bytes_max)
    except OSError as error:
        raise PackageError("layout", f"{name} cannot be read: {error.strerror}") from error


def _listed(directory: Path, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Relative names of everything that is not a directory, at most two levels deep."""
    if depth > 2:
        raise PackageError("layout", "its directories are nested too deeply")
    try:
        entries = sorted(os.scandir(directory), key=lambda one: one.name)
    except OSError as error:
        raise PackageError("layout", f"it cannot be listed: {error.strerror}") from error
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _listed(Path(entry.path), f"{prefix}{entry.name}/", depth + 1)
        else:
            yield prefix + entry.name


# ---- signature, manifest, hashes


def _check_signature(manifest: bytes, envelope_bytes: bytes, keys: Sequence[Ed25519PublicKey]) -> None:
    try:
        envelope = msgspec.json.decode(envelope_bytes, type=DsseEnvelope)
        payload = base64.b64decode(envelope.payload, validate=True)
        signatures = [base64.b64decode(one.sig, validate=True) for one in envelope.signatures]
    except (msgspec.DecodeError, binascii.Error, ValueError) as error:
        raise PackageError("signature", f"its signature file is malformed: {error}") from error
    if payload != manifest:
        raise PackageError("signature", "its signature is over another manifest")
    message = modelwire.dsse_message(envelope.payloadType, payload)
    if not any(_verifies(key, signature, message) for key in keys for signature in signatures):
        raise PackageError("signature", "no given key verifies its signature")


def _verifies(key: Ed25519PublicKey, signature: bytes, message: bytes) -> bool:
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _check_files(directory: Path, raw: bytes) -> VerifiedFiles:
    manifest = _parse_manifest(raw)
    present = set(_listed(directory)) - {MANIFEST, SIGNATURE}
    if present != set(manifest.files):
        odd = sorted(present ^ set(manifest.files))[0]
        raise PackageError("layout", f"{odd!r} is in the manifest or in the directory, but not in both")
    files: dict[str, bytes] = {}
    for name, entry in manifest.files.items():
        data = _read_named(directory, name, entry.size_bytes)
        if len(data) != entry.size_bytes or "sha256:" + hashlib.sha256(data).hexdigest() != entry.sha256:
            raise PackageError("hash", f"{name} is not the file that the manifest names")
        files[name] = data
    return VerifiedFiles(manifest, digest_bytes(raw), files)


def _parse_manifest(raw: bytes) -> Manifest:
    manifest = _decode(raw, Manifest, "manifest", MANIFEST)
    # also refuses duplicate keys and anything else that two readers could read differently
    if canonical(msgspec.json.decode(raw)) != raw:
        raise PackageError("manifest", "its manifest is not canonical JSON")
    # the types' patterns end in "$", which also matches before a final newline
    if any(text.endswith("\n") for text in (manifest.id, manifest.version, manifest.created)):
        raise PackageError("manifest", "its id, version or time is malformed")
    if manifest.schema_version != modelwire.PACKAGE_SCHEMA_VERSION:
        raise PackageError("manifest", f"its schema version {manifest.schema_version} is unknown")
    if not set(REQUIRED_FILES) <= set(manifest.files) or len(manifest.files) > _FILES_MAX:
        raise PackageError("manifest", "a required file is missing or there are too many files")
    for name in manifest.files:
        if name in (MANIFEST, SIGNATURE) or any(_PART.fullmatch(part) is None for part in name.split("/")):
            raise PackageError("manifest", f"the file name {name[:80]!r} is not allowed")
    if sum(entry.size_bytes for entry in manifest.files.values()) > MODEL_PACKAGE_BYTES_MAX:
        raise PackageError("size", f"its files are larger than {MODEL_PACKAGE_BYTES_MAX} bytes")
    return manifest


def _decode(raw: bytes, to: type[T], reason: str, name: str) -> T:
    try:
        return msgspec.json.decode(raw, type=to)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise PackageError(reason, f"{name} is malformed: {error}") from error


# ---- documents, graphs, golden vectors


def _load(verified: VerifiedFiles) -> LoadedPackage:
    files = verified.files
    schema = _decode(files["schema.json"], ModelSchema, "document", "schema.json")
    stats = _decode(files["stats.json"], ModelStats, "document", "stats.json")
    tables = _check_documents(schema, stats)
    graphs = _open_graphs(verified, schema)
    _check_golden(files["golden.npz"], graphs)
    return LoadedPackage(verified.manifest, verified.digest, schema, stats, tables, graphs)


def _check_documents(schema: ModelSchema, stats: ModelStats) -> Tables:
    known = modelwire.PACKAGE_SCHEMA_VERSION
    if schema.schema_version != known or stats.schema_version != known:
        raise PackageError("document", "schema.json or stats.json has an unknown schema version")
    if not 0 < schema.dt_min_s < schema.dt_max_s <= schema.horizon_max_s or schema.time_unit != "s":
        raise PackageError("document", "the time range in schema.json is not usable")
    if not schema.observation or len(schema.observation) != len(stats.obs_mean):
        raise PackageError("document", "schema.json and stats.json disagree on the observation")
    try:
        return Tables.of(stats)
    except ValueError as error:
        raise PackageError("document", f"stats.json is not usable: {error}") from error


def _open_graphs(verified: VerifiedFiles, schema: ModelSchema) -> Graphs:
    sessions = {}
    for name in GRAPH_NAMES:
        data = verified.files[f"{name}.onnx"]
        try:
            check_graph(data, verified.manifest.opset)
            sessions[name] = open_session(data)
        except GraphError as refusal:
            raise PackageError("graph", f"{name}.onnx is refused: {refusal}") from refusal
        # ONNX Runtime raises a dozen unrelated types for a graph that it cannot take
        except Exception as error:
            raise PackageError("graph", f"{name}.onnx does not load: {str(error)[:200]}") from error
    graphs = Graphs(**sessions, state_size=schema.state_size)
    _check_ports(graphs, schema)
    return graphs


def _check_ports(graphs: Graphs, schema: ModelSchema) -> None:
    """Names, order, element type and the width of the last axis of every input and output."""
    observed, acted = len(schema.observation), len(schema.action)
    latent, state = schema.latent_size, schema.state_size
    widths = {"obs": observed, "obs_mean": observed, "obs_std": observed, "action": acted}
    widths |= {"z": latent, "z_hat": latent, "h": state, "h0": state, "h_next": state, "h_T": state, "gate_mean": 1}
    for name in GRAPH_NAMES:
        session = getattr(graphs, name)
        inputs, outputs = session.get_inputs(), session.get_outputs()
        names = tuple(p.name for p in inputs), tuple(p.name for p in outputs)
        if names != (GRAPH_INPUTS[name], GRAPH_OUTPUTS[name]):
            raise PackageError("graph", f"{name}.onnx has other inputs or outputs than the format")
        for port in (*inputs, *outputs):
            wanted = widths.get(port.name)
            if port.type != "tensor(float)" or (wanted is not None and port.shape[-1] != wanted):
                raise PackageError("graph", f"{name}.onnx: {port.name} does not match schema.json")


def _read_golden(raw: bytes) -> dict[str, Float]:
    """The arrays of golden.npz; sizes are bounded before anything is unpacked, and pickles are refused."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entries = archive.infolist()
        if len(entries) > _GOLDEN_ENTRIES_MAX or sum(one.file_size for one in entries) > _GOLDEN_BYTES_MAX:
            raise PackageError("golden", "golden.npz is too large")
        if any(one.compress_type != zipfile.ZIP_STORED for one in entries):
            raise PackageError("golden", "golden.npz is compressed")
    with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
        return {name: np.asarray(arrays[name], np.float32) for name in arrays.files}


def _check_golden(raw: bytes, graphs: Graphs) -> None:
    try:
        arrays = _read_golden(raw)
        for name in GRAPH_NAMES:
            inputs = {port: arrays[f"{name}.in.{port}"] for port in GRAPH_INPUTS[name]}
            for port, got in zip(GRAPH_OUTPUTS[name], graphs.run(name, inputs), strict=True):
                wanted = arrays[f"{name}.out.{port}"]
                if got.shape != wanted.shape or not np.allclose(got, wanted, rtol=GOLDEN_RTOL, atol=GOLDEN_ATOL):
                    raise PackageError("golden", f"{name}.onnx does not reproduce its golden {port}")
    except PackageError:
        raise
    # zipfile, numpy and ONNX Runtime each raise their own unrelated types for malformed bytes
    except Exception as error:
        raise PackageError("golden", f"golden.npz cannot be replayed: {str(error)[:200]}") from error
