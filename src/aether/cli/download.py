"""Writing a job's outputs below a directory of this machine, whatever names the job chose.

- A name is a plain relative path (`contract.jobs.check_relative_path`), and no component on the way may be a
  symbolic link (openat(2), O_NOFOLLOW), so nothing lands outside.
- An existing file is never replaced without `force`, unless it already has the very same content.
- A file appears under its name only when its digest was verified (temporary file, link(2) or rename(2)).
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from aether.client import Client
from aether.contract.errors import AetherError
from aether.contract.jobs import ArtifactRef, check_relative_path


def save_outputs(client: Client, artifacts: Sequence[ArtifactRef], directory: Path, *, force: bool) -> list[str]:
    """Writes every artifact below `directory`; returns the names written or found the same.

    Raises OUTPUT_REFUSED for a name that is taken or leads outside, VERIFY_FAILED for wrong bytes; the
    artifacts stay in the store and can be fetched by digest.
    """
    try:
        root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(str(directory), error.strerror or "unusable", "") from error
    try:
        for artifact in artifacts:
            check_relative_path(artifact.name, "output")
            _save(client, artifact, root, force=force)
    finally:
        os.close(root)
    return [artifact.name for artifact in artifacts]


@contextmanager
def written(path: Path, *, force: bool) -> Iterator[BinaryIO]:
    """A file that appears under `path` once the block ended well; raises OUTPUT_REFUSED for a name that is taken."""
    temporary = path.parent / f".aether-{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as out:
            yield out
        if force:
            temporary.rename(path)
        else:
            os.link(temporary, path)
    except FileExistsError as error:
        raise _refused(str(path), "a file of this name exists", "") from error
    except OSError as error:
        raise _refused(str(path), error.strerror or str(error), "") from error
    finally:
        temporary.unlink(missing_ok=True)


def _save(client: Client, artifact: ArtifactRef, root: int, *, force: bool) -> None:
    *parents, name = artifact.name.split("/")
    directory = _descend(root, parents, artifact)
    try:
        if not force and _same(directory, name, artifact):
            return
        temporary = f".aether-{secrets.token_hex(8)}"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=directory)
            with open(fd, "wb") as out:
                client.artifact_get(artifact.digest, out)
            if force:
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
            else:
                os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=directory)
    except FileExistsError as error:
        raise _refused(artifact.name, "a file of this name exists", artifact.digest) from error
    except OSError as error:
        raise _refused(artifact.name, error.strerror or str(error), artifact.digest) from error
    finally:
        os.close(directory)


def _descend(root: int, parents: Sequence[str], artifact: ArtifactRef) -> int:
    """A descriptor of the directory, made where missing; the caller closes it."""
    here = os.dup(root)
    for part in parents:
        try:
            with suppress(FileExistsError):
                os.mkdir(part, 0o777, dir_fd=here)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
        except OSError as error:
            why = "leads through a symbolic link" if error.errno in (errno.ELOOP, errno.ENOTDIR) else error.strerror
            raise _refused(artifact.name, why or "unusable", artifact.digest) from error
        finally:
            os.close(here)
        here = inner
    return here


def _same(directory: int, name: str, artifact: ArtifactRef) -> bool:
    """Whether the file is there with this content; raises OUTPUT_REFUSED when the name is taken otherwise."""
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if stat.S_ISREG(found.st_mode) and found.st_size == artifact.size_bytes:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        with open(fd, "rb") as file:
            if f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" == artifact.digest:
                return True
    raise _refused(artifact.name, "a file of this name exists", artifact.digest)


def _refused(name: str, why: str, digest: str) -> AetherError:
    fetch = f", or fetch it with `aether artifact get {digest} --output FILE`" if digest else ""
    return AetherError("OUTPUT_REFUSED", f"cannot write output {name!r}: {why}", f"use --output-dir or --force{fetch}")
