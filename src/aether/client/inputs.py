"""Which files of this machine become inputs of a job, decided before any is sent.

Only regular files are taken. A symbolic link inside a directory is followed when it stays inside; anything
else that is not a plain file is refused by name, so that nothing is left out silently.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from aether.contract import limits
from aether.contract.errors import AetherError
from aether.contract.jobs import check_relative_path


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to upload: `path` in the job's work directory, `source` here."""

    path: str
    source: Path
    executable: bool


def gather(files: Mapping[str, str | os.PathLike[str]], directory: str | os.PathLike[str] | None) -> list[LocalFile]:
    """Everything named, in order of path; raises BAD_FIELD. A file named singly wins over the directory's."""
    found: dict[str, LocalFile] = {}
    if directory is not None:
        for local in _walk(Path(directory)):
            found[local.path] = local
            _check_count(len(found))
    for path, source in files.items():
        found[path] = _local(path, Path(source))
    _check_count(len(found))
    return [found[path] for path in sorted(found)]


def _check_count(count: int) -> None:
    if count > limits.INPUT_FILES_MAX:
        raise AetherError(
            "BAD_FIELD",
            f"cannot send more than {limits.INPUT_FILES_MAX} input files",
            "send one archive and unpack it in the job",
        )


def _walk(root: Path) -> Iterator[LocalFile]:
    if not root.is_dir():
        raise AetherError("BAD_FIELD", f"cannot send {str(root)!r}: not a directory", "name a directory")
    inside = root.resolve()
    for base, directories, names in os.walk(root):
        directories.sort()
        for name in directories:
            if (Path(base) / name).is_symlink():
                _refuse(Path(base) / name, "a symbolic link to a directory")
        for name in sorted(names):
            source = Path(base) / name
            if source.is_symlink() and not source.resolve().is_relative_to(inside):
                _refuse(source, "a symbolic link that leaves the directory")
            yield _local(source.relative_to(root).as_posix(), source)


def _local(path: str, source: Path) -> LocalFile:
    check_relative_path(path, "input file")
    try:
        found = source.stat()
    except OSError as error:
        raise AetherError("BAD_FIELD", f"cannot send {str(source)!r}: {error.strerror}", "name a file") from error
    if not stat.S_ISREG(found.st_mode):
        _refuse(source, "not a regular file")
    if found.st_size > limits.UPLOAD_BYTES_MAX:
        _refuse(source, f"larger than {limits.UPLOAD_BYTES_MAX} bytes")
    return LocalFile(path, source, bool(found.st_mode & stat.S_IXUSR))


def _refuse(source: Path, why: str) -> None:
    raise AetherError("BAD_FIELD", f"cannot send {str(source)!r}: {why}", "leave it out or copy what it names")
