"""Images on this node: unpacked trees that many cells show read-only, and who may use them under which name.

```
<root>/<hex>/root/        the tree; its files belong to this role and are never changed
<root>/<hex>/image.json   manifest and configuration as imported, what is honoured, counts
<root>/references.json    {tenant: {digest: {"names": [...], "created_at": ...}}}
<root>/tmp/               trees on their way in or out; emptied at start
```
Invariants
- A directory under its digest is complete: it is unpacked beside and renamed.
- Bytes of clients are read by a process of their own (`unpack`), never by this one.
- The digest is that of the OCI manifest, which names every layer by digest; all were checked.
- A tree goes when its last reference goes. Cells that still show it lose files they have not opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from aether.contract import ids, limits
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.images import LAYER_TYPE, ImageConfig, ImageInfo, check_name
from aether.contract.labels import union

_libc: Final = ctypes.CDLL(None, use_errno=True)
_ANSWER_BYTES_MAX: Final = 8 * limits.MIB
_UNPACKING_MAX: Final = 2
_MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
_CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"


class Reference(msgspec.Struct, frozen=True):
    names: tuple[str, ...]
    created_at: str
    labels: tuple[str, ...] = ()


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """`image.json`."""

    digest: str
    manifest: str
    config: str
    layers: tuple[str, ...]
    run: ImageConfig
    entries: int
    size_bytes: int
    skipped: int


References = dict[str, dict[str, Reference]]


class ImageStore:
    """See the module head. All methods raise AetherError."""

    def __init__(self, root: Path, clock_ns: Callable[[], int]) -> None:
        self._root = root
        self._tmp = root / "tmp"
        self._clock_ns = clock_ns
        self._references: References = {}
        self._turns = asyncio.Semaphore(_UNPACKING_MAX)
        self._serial = 0

    def open(self) -> None:
        """Makes the directories, removes what an earlier process left half-made, reads the references."""
        for directory in (self._root, self._tmp):
            directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        for left in self._tmp.iterdir():
            shutil.rmtree(left, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self._references = msgspec.json.decode(self._references_file.read_bytes(), type=References)

    # ---- operations

    async def add(self, archive: int, tenant_id: str, name: str | None, labels: tuple[str, ...] = ()) -> ImageInfo:
        """The image in the archive behind descriptor `archive`, unpacked unless it is here. Raises BAD_IMAGE."""
        self._check_room(tenant_id, name)
        async with self._turns:
            work = self._new_directory()
            try:
                with _opened(work / "root") as target:
                    answer = await self._unpack({"archive": archive, "target": target}, (archive, target))
                counts = answer.pop("counts")
                document = msgspec.convert(answer | counts, Document)
                await asyncio.to_thread(self._publish, work, document)
            finally:
                await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)
        return self._refer(document.digest, tenant_id, name, labels)

    async def commit(
        self, base: str, layer: int, tenant_id: str, name: str | None, labels: tuple[str, ...] = ()
    ) -> ImageInfo:
        """The image `base` with the uncompressed tar behind descriptor `layer` on top, and the labels of both.

        Raises NOT_FOUND, BAD_IMAGE.
        """
        self._check_room(tenant_id, name)
        known = self.find(base, tenant_id)
        below = self._document(known.digest)
        async with self._turns:
            work = self._new_directory()
            try:
                with _opened(work / "root") as target, _opened(self.tree(below.digest)) as source:
                    request = {"base": source, "layer": layer, "target": target}
                    answer = await self._unpack(request, (source, layer, target))
                document = stacked(below, answer)
                await asyncio.to_thread(self._publish, work, document)
            finally:
                await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)
        return self._refer(document.digest, tenant_id, name, (*labels, *known.labels))

    def find(self, ref: str, tenant_id: str) -> ImageInfo:
        """By name or digest, as far as the tenant has it; raises NOT_FOUND."""
        known = self._references.get(tenant_id, {})
        for digest, reference in known.items():
            if ref == digest or ref in reference.names:
                return self._info(digest, tenant_id, reference)
        raise AetherError("NOT_FOUND", f"cannot find image {ref[:100]!r}", "list them with `aether image list`")

    def list(self, tenant_id: str) -> tuple[ImageInfo, ...]:
        known = self._references.get(tenant_id, {})
        found = [self._info(digest, tenant_id, reference) for digest, reference in known.items()]
        return tuple(sorted(found, key=lambda info: (info.created_at, info.digest)))

    async def remove(self, ref: str, tenant_id: str) -> ImageInfo:
        """A name loses its image; a digest goes with all its names, and its tree with the last tenant's."""
        info = self.find(ref, tenant_id)
        known = dict(self._references[tenant_id])
        reference = known.pop(info.digest)
        if ref in reference.names and len(reference.names) > 1:
            names = tuple(name for name in reference.names if name != ref)
            known[info.digest] = Reference(names, reference.created_at)
        self._write(tenant_id, known)
        if not any(info.digest in others for others in self._references.values()):
            await asyncio.to_thread(self._discard, info.digest)
        return info

    def tree(self, digest: str) -> Path:
        """Where the tree of an image is; raises BAD_ID."""
        return self._root / ids.parse_digest(digest).removeprefix("sha256:") / "root"

    # ---- inside

    @property
    def _references_file(self) -> Path:
        return self._root / "references.json"

    def _check_room(self, tenant_id: str, name: str | None) -> None:
        if name is not None:
            check_name(name)
        if len(self._references.get(tenant_id, {})) >= limits.IMAGES_MAX:
            raise AetherError("BUSY", f"cannot keep more than {limits.IMAGES_MAX} images", "remove some")

    def _new_directory(self) -> Path:
        self._serial += 1
        work = self._tmp / f"{os.getpid()}-{self._serial}"
        (work / "root").mkdir(mode=0o755, parents=True)
        (work / "root").chmod(0o755)
        return work

    async def _unpack(self, request: dict[str, int], fds: tuple[int, ...]) -> dict[str, Any]:
        command = [sys.executable, "-m", "aether.orchestrator.images.unpack", json.dumps(request)]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, pass_fds=fds, close_fds=True
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(limits.IMAGE_UNPACK_S_MAX):
                text = await process.stdout.read(_ANSWER_BYTES_MAX)
                while more := await process.stdout.read(_ANSWER_BYTES_MAX):
                    text += more
                    if len(text) > _ANSWER_BYTES_MAX:
                        raise AetherError("BAD_IMAGE", "cannot import the image: its documents are too large")
                await process.wait()
        except TimeoutError:
            raise AetherError(
                "BAD_IMAGE", f"cannot import the image: it took more than {limits.IMAGE_UNPACK_S_MAX} s"
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        answer: dict[str, Any] = json.loads(text) if text else {"error": f"its process ended with {process.returncode}"}
        if "error" in answer:
            raise AetherError("BAD_IMAGE", f"cannot import the image: {answer['error']}")
        found: dict[str, Any] = answer["ok"]
        return found

    def _publish(self, work: Path, document: Document) -> None:
        final = self.tree(document.digest).parent
        with (work / "image.json").open("xb") as file:
            file.write(msgspec.json.encode(document))
            file.flush()
            os.fsync(file.fileno())
            _libc.syncfs(file.fileno())  # the tree is as durable as its document
        if not final.exists():
            with contextlib.suppress(FileExistsError):
                work.rename(final)

    def _discard(self, digest: str) -> None:
        gone = self._tmp / f"gone-{digest.removeprefix('sha256:')}"
        with contextlib.suppress(FileNotFoundError):
            self.tree(digest).parent.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _refer(self, digest: str, tenant_id: str, name: str | None, labels: tuple[str, ...]) -> ImageInfo:
        """The tenant has the image now; a name moves to it from whatever had it. Labels only add up."""
        known = {
            other: replace(reference, names=tuple(each for each in reference.names if each != name))
            for other, reference in self._references.get(tenant_id, {}).items()
        }
        before = known.get(digest, Reference((), rfc3339(self._clock_ns())))
        names = (*before.names, name) if name is not None else before.names
        known[digest] = replace(before, names=names, labels=union(before.labels, labels))
        self._write(tenant_id, known)
        return self._info(digest, tenant_id, known[digest])

    def _write(self, tenant_id: str, known: dict[str, Reference]) -> None:
        references = {**self._references, tenant_id: known}
        temporary = self._tmp / "references.json"
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(references))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._references_file)
        self._references = references

    def _document(self, digest: str) -> Document:
        try:
            return msgspec.json.decode((self.tree(digest).parent / "image.json").read_bytes(), type=Document)
        except FileNotFoundError:
            raise AetherError(
                "GONE", f"cannot use image {digest}: it is not unpacked here", "import it again"
            ) from None

    def _info(self, digest: str, tenant_id: str, reference: Reference) -> ImageInfo:
        document = self._document(digest)
        return ImageInfo(
            digest=digest,
            names=reference.names,
            tenant_id=tenant_id,
            created_at=reference.created_at,
            size_bytes=document.size_bytes,
            entries=document.entries,
            skipped=document.skipped,
            layers=document.layers,
            config=document.run,
            labels=reference.labels,
        )


def stacked(below: Document, answer: dict[str, Any]) -> Document:
    """Pure: the documents of an image with one uncompressed layer more. Fields that are not ours stay as they are."""
    layer = {"mediaType": LAYER_TYPE, "digest": answer["layer"], "size": answer["layer_bytes"]}
    config = json.loads(below.config)
    config["rootfs"]["diff_ids"].append(answer["layer"])
    config.pop("history", None)  # it would have to name every layer
    config_text = _text(config)
    manifest = json.loads(below.manifest)
    kept = {name: value for name, value in manifest.items() if name not in ("layers", "config", "annotations")}
    kept |= {"schemaVersion": 2, "layers": [*manifest["layers"], layer]}
    kept["config"] = {"mediaType": _CONFIG_TYPE, "digest": _digest(config_text), "size": len(config_text.encode())}
    kept["mediaType"] = manifest.get("mediaType", _MANIFEST_TYPE)
    manifest_text = _text(kept)
    counts = answer["counts"]
    return Document(
        digest=_digest(manifest_text),
        manifest=manifest_text,
        config=config_text,
        layers=(*below.layers, answer["layer"]),
        run=below.run,
        entries=counts["entries"],
        size_bytes=counts["size_bytes"],
        skipped=below.skipped + counts["skipped"],
    )


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a directory of the store; raises GONE."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise AetherError("GONE", "cannot use the image: it is not unpacked here", "import it again") from None
    try:
        yield fd
    finally:
        os.close(fd)
