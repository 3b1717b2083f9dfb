"""Model packages in the state directory, as far as routing needs them.

`<models>/<id>/<major.minor.patch>/manifest.json`. Only the manifest and the schema are read here, bounded; the
runtime in its cell verifies hashes and signature before it serves anything. A package's digest is the digest
of its manifest's bytes, taken at the scan: a package changed in place is another package.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from aether.contract.canonical import digest_bytes
from aether.contract.errors import AetherError
from aether.contract.jobs import MODEL_OPS
from aether.contract.limits import KIB
from aether.contract.modelwire import Manifest
from aether.contract.wire import ModelInfo

_ID: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION: Final = re.compile(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})")
_DOCUMENT_BYTES_MAX: Final = 64 * KIB
_PACKAGES_MAX: Final = 256
_MANIFEST: Final = msgspec.json.Decoder(Manifest)


@dataclass(frozen=True, slots=True)
class Package:
    """A package that can be routed to. `order` sorts versions of one id."""

    model_id: str
    version: str
    order: tuple[int, int, int]
    directory: Path
    digest: str
    schema: dict[str, Any] = field(compare=False)

    @property
    def name(self) -> str:
        return f"{self.model_id}@{self.version}"


@dataclass(frozen=True, slots=True)
class Catalog:
    """One scan: packages by `id@version`, the highest version by `id`, and what could not be read."""

    packages: dict[str, Package]
    highest: dict[str, Package]
    broken: tuple[ModelInfo, ...]

    def route(self, model: str) -> Package:
        """`id` means its highest version, `id@version` that one; raises NO_SUCH_MODEL."""
        package = self.packages.get(model) or self.highest.get(model)
        if package is None:
            raise AetherError("NO_SUCH_MODEL", f"cannot route to model {model[:140]!r}: no such package is installed")
        return package


EMPTY: Final = Catalog({}, {}, ())


def scan(models: Path) -> Catalog:
    """Reads the packages below `models`; blocking, so off the loop. A broken one hides no other."""
    packages: dict[str, Package] = {}
    highest: dict[str, Package] = {}
    broken: list[ModelInfo] = []
    for directory in _candidates(models):
        try:
            package = _read(directory)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            broken.append(_broken(directory, str(error)))
            continue
        packages[package.name] = package
        best = highest.get(package.model_id)
        if best is None or package.order > best.order:
            highest[package.model_id] = package
    return Catalog(packages, highest, tuple(broken))


def info(package: Package, state: str) -> ModelInfo:
    """The package as `model.list` shows it."""
    return ModelInfo(
        model_id=package.model_id,
        version=package.version,
        digest=package.digest,
        state=state,
        ops=MODEL_OPS,
        schema=package.schema,
    )


def _candidates(models: Path) -> list[Path]:
    found = []
    for model in sorted(_subdirectories(models)):
        if _ID.fullmatch(model.name):
            found += [path for path in sorted(_subdirectories(model)) if _VERSION.fullmatch(path.name)]
    return found[:_PACKAGES_MAX]


def _subdirectories(path: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(path) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _read(directory: Path) -> Package:
    raw = _bounded(directory / "manifest.json")
    manifest = _MANIFEST.decode(raw)
    if (manifest.id, manifest.version) != (directory.parent.name, directory.name):
        raise ValueError(f"the manifest names {manifest.id}@{manifest.version}")
    match = _VERSION.fullmatch(manifest.version)
    assert match is not None
    major, minor, patch = (int(part) for part in match.groups())
    schema = msgspec.json.decode(_bounded(directory / "schema.json"), type=dict[str, Any])
    return Package(manifest.id, manifest.version, (major, minor, patch), directory, digest_bytes(raw), schema)


def _bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        raw = file.read(_DOCUMENT_BYTES_MAX + 1)
    if len(raw) > _DOCUMENT_BYTES_MAX:
        raise ValueError(f"{path.name} is larger than {_DOCUMENT_BYTES_MAX} bytes")
    return raw


def _broken(directory: Path, why: str) -> ModelInfo:
    return ModelInfo(
        model_id=directory.parent.name,
        version=directory.name,
        digest="",
        state=f"broken: {why}"[:300],
        ops=(),
    )
