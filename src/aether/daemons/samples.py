"""The sample model package that comes with AetherOS: copied into a new state directory once.

In a checkout it lies in `packages/`, in an installed wheel in `aether/samples/`. Its public key becomes a
trusted key; a state directory that already has models is left alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import aether
from aether.contract.paths import Layout
from aether.daemons.accounts import Accounts, directory


def source() -> Path | None:
    """Where the samples are; None when this installation has none."""
    package = Path(aether.__file__).parent
    for candidate in (package / "samples", package.parents[1] / "packages"):
        if (candidate / "keys").is_dir():
            return candidate
    return None


def install(layout: Layout, who: Accounts) -> None:
    """Copies packages and keys; every copy is complete or absent (rename)."""
    found = source()
    if found is None or any(layout.models.iterdir()):
        return
    with directory(layout.root, layout.trusted_keys.relative_to(layout.root)) as trusted:
        for key in sorted((found / "keys").glob("*.pub")):
            _write_file(trusted, key.name, key.read_bytes(), who)
    for manifest in sorted(found.glob("*/*/manifest.json")):
        version = manifest.parent
        target = layout.models / version.parent.name / version.name
        target.parent.mkdir(exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(version, partial)
        for path in (target.parent, partial, *partial.rglob("*")):
            os.chown(path, who.spawner, who.gid)
            path.chmod(_mode(path.is_dir()))
        partial.rename(target)


def _write_file(directory_fd: int, name: str, data: bytes, who: Accounts) -> None:
    """In a directory whose parent is aetherd's: never through a link, whole or not at all."""
    partial = f".{name}.partial"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(partial, dir_fd=directory_fd)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(partial, flags, 0o600, dir_fd=directory_fd), "wb") as file:
        file.write(data)
        os.fchown(file.fileno(), who.spawner, who.gid)
        os.fchmod(file.fileno(), _mode(False))
    os.rename(partial, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)


def _mode(directory: bool) -> int:
    """A cell, whose uids are nobody's, reads its package through a bind; above it `models/` is 0750."""
    return 0o755 if directory else 0o644
