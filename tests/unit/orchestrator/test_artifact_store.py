"""Artifacts: the address is the content, what has an address is complete, readers cannot change it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from aether.backends.memory.store import MemoryStore
from aether.contract.errors import AetherError
from aether.contract.limits import RESULT_INLINE_BYTES_MAX
from aether.orchestrator.artifacts.store import ArtifactStore


def _with_store(tmp_path: Path, body: Callable[[ArtifactStore, MemoryStore], Awaitable[None]]) -> None:
    async def main() -> None:
        index = MemoryStore()
        store = ArtifactStore(tmp_path / "artifacts", index)
        store.open()
        try:
            await body(store, index)
        finally:
            store.close()

    asyncio.run(main())


def _file(tmp_path: Path, data: bytes) -> int:
    path = tmp_path / "source"
    path.write_bytes(data)
    return os.open(path, os.O_RDONLY)


@pytest.mark.parametrize("size", [0, 1, RESULT_INLINE_BYTES_MAX, RESULT_INLINE_BYTES_MAX + 1, 3 * 1024 * 1024 + 17])
def test_bytes_come_back_under_their_digest(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)

    async def body(store: ArtifactStore, index: MemoryStore) -> None:
        fd = _file(tmp_path, data)
        os.lseek(fd, size // 2, os.SEEK_SET)
        kept = await store.ingest(fd)
        os.close(fd)
        assert kept.digest == "sha256:" + hashlib.sha256(data).hexdigest() and kept.size_bytes == size
        assert await store.size(kept.digest) == size
        out, out_size = await store.open_fd(kept.digest)
        assert out_size == size and os.read(out, size + 1) == data
        with pytest.raises(OSError):
            os.write(out, b"x")
        os.close(out)
        assert (await index.get_blob(kept.digest) is not None) == (size <= RESULT_INLINE_BYTES_MAX)
        assert list((tmp_path / "artifacts/tmp").iterdir()) == []

    _with_store(tmp_path, body)


def test_the_same_bytes_twice_and_kept_directly(tmp_path: Path) -> None:
    data = os.urandom(200_000)

    async def body(store: ArtifactStore, index: MemoryStore) -> None:
        fd = _file(tmp_path, data)
        first, second = await asyncio.gather(store.ingest(fd), store.ingest(fd))
        os.close(fd)
        assert first == second == await store.keep(data)
        path = tmp_path / "artifacts/sha256" / first.digest[7:9] / first.digest
        assert stat.S_IMODE(path.stat().st_mode) == 0o440

    _with_store(tmp_path, body)


@pytest.mark.parametrize("size", [101, 300_000])
def test_a_bound_leaves_nothing_behind(tmp_path: Path, size: int) -> None:
    async def body(store: ArtifactStore, index: MemoryStore) -> None:
        fd = _file(tmp_path, b"x" * size)
        with pytest.raises(AetherError, match="TOO_LARGE"):
            await store.ingest(fd, size - 1)
        os.close(fd)
        left = [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
        assert left == []

    _with_store(tmp_path, body)


def test_a_descriptor_that_cannot_be_read(tmp_path: Path) -> None:
    async def body(store: ArtifactStore, index: MemoryStore) -> None:
        fd = os.open(tmp_path / "w", os.O_WRONLY | os.O_CREAT)
        directory = os.open(tmp_path, os.O_RDONLY)
        pipe, other = os.pipe()
        for bad in (fd, directory, pipe):
            with pytest.raises(AetherError, match="BAD_FIELD"):
                await store.ingest(bad)
        for open_fd in (fd, directory, pipe, other):
            os.close(open_fd)

    _with_store(tmp_path, body)


def test_unknown_and_malformed_digests(tmp_path: Path) -> None:
    async def body(store: ArtifactStore, index: MemoryStore) -> None:
        with pytest.raises(AetherError, match="NOT_FOUND"):
            await store.open_fd("sha256:" + "0" * 64)
        for bad in ("sha256:../../etc/passwd", "../x", "", "sha256:" + "0" * 63, "sha256:" + "G" * 64):
            with pytest.raises(AetherError, match="BAD_ID"):
                await store.open_fd(bad)
        assert await store.size("sha256:" + "0" * 64) is None

    _with_store(tmp_path, body)


def test_leftovers_are_removed_at_the_start(tmp_path: Path) -> None:
    left = tmp_path / "artifacts/tmp/1-1"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")

    async def body(store: ArtifactStore, index: MemoryStore) -> None:
        assert not left.exists()

    _with_store(tmp_path, body)


def test_a_full_index_refuses_small_artifacts(tmp_path: Path) -> None:
    async def body(store: ArtifactStore, index: MemoryStore) -> None:
        index.full = True
        with pytest.raises(AetherError, match="DISK_FULL"):
            await store.keep(b"x")

    _with_store(tmp_path, body)
