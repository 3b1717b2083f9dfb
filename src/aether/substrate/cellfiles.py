"""Files in the work directory of an allocated cell: put, get, list.

Bytes travel by descriptor: the body of a put is an unlinked file that the spawner copies, a get is a descriptor of
the file itself. A put is recorded before it is done, with the digest of what is put; reads are reads.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import Final

from msgspec.structs import replace

from aether.contract.allocations import FileKept, FileListing
from aether.contract.calls import Caller, FileReply
from aether.contract.cellcalls import FileCall, PutCall
from aether.contract.errors import AetherError
from aether.contract.jobs import check_labels, check_relative_path
from aether.contract.labels import union
from aether.substrate import cellentries as entries
from aether.substrate.book import Book
from aether.substrate.cellhouse import CellHouse
from aether.substrate.cells.supervisor import CellSupervisor

_INLINE_HASH_BYTES_MAX: Final = 1 << 20
_MEDIA_TYPE: Final = "application/octet-stream"


class CellFileDesk:
    """Handlers of `cell.put`, `cell.get`, `cell.files`."""

    def __init__(self, house: CellHouse, book: Book, cells: CellSupervisor) -> None:
        self._house = house
        self._book = book
        self._cells = cells

    async def put(self, caller: Caller, call: PutCall) -> FileKept:
        """`cell.put`; `call.fd` is ours to close."""
        try:
            check_relative_path(call.path, "file")
            check_labels(call.labels)
            admission, cell = self._house.live(caller, "cell.put", call.cell)
            labels = self._house.admit_labels(caller, "cell.put", cell, union(call.labels, admission.labels))
            bound = self._house.request_of(cell).limits.file_bytes
            if call.size_bytes > bound:
                raise AetherError("TOO_LARGE", f"cannot put {call.size_bytes} bytes: the cell's file_bytes is {bound}")
            digest = await _digest(call.fd, call.size_bytes)
            order = self._house.order(caller, admission, "cell.put")
            detail = {"path": call.path, "digest": digest, "size_bytes": str(call.size_bytes)}
            record = self._house.write(
                order,
                lambda index, now: replace(
                    entries.changed("cell.put", cell, order, detail, index, now), labels=union(cell.labels, labels)
                ),
            )
            await self._book.durable(record)
            await self._cells.put(cell.cell_id, call.path, call.fd, call.executable)
            self._house.touch(cell)
        finally:
            os.close(call.fd)
        return FileKept(cell_id=cell.cell_id, path=call.path, size_bytes=call.size_bytes, digest=digest)

    async def get(self, caller: Caller, call: FileCall) -> FileReply:
        check_relative_path(call.path, "file")
        _, cell = self._house.live(caller, "cell.get", call.cell)
        self._house.touch(cell)
        fd = await self._cells.open(cell.cell_id, call.path)
        return FileReply(fd, 0, os.fstat(fd).st_size, _MEDIA_TYPE)

    async def files(self, caller: Caller, call: FileCall) -> FileListing:
        if call.path:
            check_relative_path(call.path, "directory")
        _, cell = self._house.live(caller, "cell.files", call.cell)
        self._house.touch(cell)
        return await self._cells.files(cell.cell_id, call.path)


async def _digest(fd: int, size_bytes: int) -> str:
    """The digest of the whole file; its offset is where it was."""

    def hashed() -> str:
        with open(fd, "rb", closefd=False) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        os.lseek(fd, 0, os.SEEK_SET)
        return f"sha256:{found}"

    return hashed() if size_bytes <= _INLINE_HASH_BYTES_MAX else await asyncio.to_thread(hashed)
