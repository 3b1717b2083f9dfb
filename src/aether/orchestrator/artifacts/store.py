"""Content-addressed artifacts: small ones in the blob table, larger ones as files; an index of who made what.

```
<root>/sha256/ab/sha256:<hex>   a file, 0440, never changed after its rename
<root>/tmp/                     files on their way in; emptied at start
```
Invariants
- The digest is taken over the very bytes that are kept: they are read once, hashed and written in one pass, so
  a file that changes meanwhile yields the digest of what was kept.
- A file under its digest is complete and durable: temporary file, fsync, rename, fsync of the directory
  (rename(2) orders nothing by itself; https://lwn.net/Articles/322823/).
- An index row is written after its bytes are durable.
- Readers get descriptors. A small artifact comes as a memfd sealed against any change (memfd_create(2)).
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from aether.contract import ids
from aether.contract.canonical import digest_bytes
from aether.contract.errors import AetherError
from aether.contract.limits import MIB, RESULT_INLINE_BYTES_MAX, UPLOAD_BYTES_MAX
from aether.contract.store import Blob, Store
from aether.contract.wire import ArtifactInfo

T = TypeVar("T")
_CHUNK_BYTES: Final = MIB
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that are durable under `digest`."""

    digest: str
    size_bytes: int


class ArtifactStore:
    """Files below `root` and blobs in `store`. Bulk copying runs in two threads of its own."""

    def __init__(self, root: Path, store: Store) -> None:
        self._root = root
        self._tmp = root / "tmp"
        self._store = store
        self._threads = ThreadPoolExecutor(2, "artifacts")
        self._serial = 0

    def open(self) -> None:
        """Makes the directories and removes what an earlier process left half-written."""
        shutil.rmtree(self._tmp, ignore_errors=True)
        for directory in (self._root, self._tmp, self._root / "sha256"):
            directory.mkdir(mode=0o750, parents=True, exist_ok=True)

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    async def ingest(self, fd: int, bytes_max: int = UPLOAD_BYTES_MAX) -> Kept:
        """Keeps the bytes of `fd` from its start on. The caller keeps `fd`.

        Raises TOO_LARGE above `bytes_max`, BAD_FIELD when `fd` cannot be read, DISK_FULL.
        """
        self._serial += 1
        kept = await self._run(lambda: self._copy_in(fd, bytes_max, self._tmp / f"{os.getpid()}-{self._serial}"))
        if isinstance(kept, Kept):
            return kept
        return await self.keep(kept)

    async def keep(self, data: bytes) -> Kept:
        """Keeps `data`; raises DISK_FULL."""
        digest = digest_bytes(data)
        if len(data) <= RESULT_INLINE_BYTES_MAX:
            await self._store.put_blob(Blob(digest=digest, data=data))
        else:
            self._serial += 1
            await self._run(lambda: self._write_whole(data, digest, self._tmp / f"{os.getpid()}-{self._serial}"))
        return Kept(digest, len(data))

    async def open_fd(self, digest: str) -> tuple[int, int]:
        """A read-only descriptor at offset 0, which the caller owns, and the size; raises NOT_FOUND, BAD_ID."""
        path = self._path(ids.parse_digest(digest))
        data = await self._store.get_blob(digest)
        if data is not None:
            return _sealed(data), len(data)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise AetherError("NOT_FOUND", f"cannot open artifact {digest}: its bytes are not here") from None
        return fd, os.fstat(fd).st_size

    async def size(self, digest: str) -> int | None:
        """The size of the bytes under `digest`; None when they are not here."""
        data = await self._store.get_blob(digest)
        if data is not None:
            return len(data)
        try:
            return self._path(ids.parse_digest(digest)).stat().st_size
        except FileNotFoundError:
            return None

    async def index(self, info: ArtifactInfo) -> None:
        """Makes kept bytes findable; idempotent."""
        await self._store.add_artifact(info)

    # ---- inside

    async def _run(self, what: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, what)

    def _path(self, digest: str) -> Path:
        return self._root / "sha256" / digest[7:9] / digest

    def _copy_in(self, fd: int, bytes_max: int, temporary: Path) -> Kept | bytes:
        """The small bytes themselves, or a file kept. Reads by offset, so a shared descriptor's position is left."""
        try:
            head = _read_up_to(fd, RESULT_INLINE_BYTES_MAX + 1)
        except OSError as error:
            raise AetherError("BAD_FIELD", f"cannot read the artifact's descriptor: {error}") from error
        if len(head) > bytes_max:
            raise _too_large(bytes_max)
        if len(head) <= RESULT_INLINE_BYTES_MAX:
            return head
        try:
            with temporary.open("xb", buffering=0) as out:
                digest, size = _hash_and_copy(fd, out.fileno(), bytes_max)
                self._publish(out.fileno(), temporary, digest)
        except OSError as error:
            raise _disk_error(error) from error
        finally:
            temporary.unlink(missing_ok=True)
        return Kept(digest, size)

    def _write_whole(self, data: bytes, digest: str, temporary: Path) -> None:
        try:
            with temporary.open("xb", buffering=0) as out:
                _write_all(out.fileno(), memoryview(data))
                self._publish(out.fileno(), temporary, digest)
        except OSError as error:
            raise _disk_error(error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _publish(self, fd: int, temporary: Path, digest: str) -> None:
        os.fchmod(fd, 0o440)
        os.fsync(fd)
        final = self._path(digest)
        if not final.parent.is_dir():
            final.parent.mkdir(mode=0o750, exist_ok=True)
            _fsync_dir(final.parent.parent)
        temporary.rename(final)
        _fsync_dir(final.parent)


def _read_up_to(fd: int, count: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while size < count and (part := os.pread(fd, count - size, size)):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def _hash_and_copy(source: int, target: int, bytes_max: int) -> tuple[str, int]:
    sha = hashlib.sha256()
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    size = 0
    while count := os.preadv(source, [buffer], size):
        size += count
        if size > bytes_max:
            raise _too_large(bytes_max)
        sha.update(view[:count])
        _write_all(target, view[:count])
    return "sha256:" + sha.hexdigest(), size


def _write_all(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]


def _fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sealed(data: bytes) -> int:
    fd = os.memfd_create("artifact", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        _write_all(fd, memoryview(data))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _too_large(bytes_max: int) -> AetherError:
    return AetherError("TOO_LARGE", f"cannot keep the artifact: it is larger than {bytes_max} bytes")


def _disk_error(error: OSError) -> AetherError:
    return AetherError("DISK_FULL", f"cannot keep the artifact: {error}")
