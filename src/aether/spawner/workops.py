"""Operations on work directories; whatever may take long runs in a forked child.

`busy` names cells whose directory a child is using: they are not freed meanwhile.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from aether.contract import limits
from aether.contract.cellplan import Overlay, Plan
from aether.spawner import layers, workdir, workfiles
from aether.spawner.disk import Projects
from aether.spawner.loop import Loop
from aether.spawner.offload import json_memfd, offload
from aether.spawner.protocol import RefusedError
from aether.spawner.server import Answer
from aether.spawner.workdir import Owner, WorkError, WorkRoot

INLINE_COPY_BYTES_MAX = 1 << 20
"""Inputs up to this many bytes are copied in place: less than a fork costs."""
INPUT_BYTES_MAX = limits.OUTPUT_BYTES_MAX
ERROR_BYTES_MAX = 1000

Then = Callable[[], None]


class WorkOps:
    """Fill, list, open, remove. Directories prepared before their cell exists are remembered with their owner."""

    def __init__(self, loop: Loop, root: WorkRoot, projects: Projects | None = None) -> None:
        self._loop = loop
        self._root = root
        self._projects = projects
        self._prepared: dict[str, Owner] = {}
        self._layers: dict[str, tuple[tuple[Overlay, ...], frozenset[str]]] = {}
        self.busy: Counter[str] = Counter()
        self.children: set[int] = set()

    def note_prepared(self, cell_id: str, owner: Owner) -> None:
        """Raises RefusedError when the directory was prepared for somebody else."""
        if self._prepared.setdefault(cell_id, owner) != owner:
            raise RefusedError("BAD_PLAN", f"cannot prepare {cell_id}: it was prepared for another owner")

    def discard_prepared(self, cell_id: str, then: Then) -> None:
        if self._prepared.pop(cell_id, None) is None:
            then()
        else:
            self.remove(cell_id, then)

    def fill(
        self,
        cell_id: str,
        owner: Owner,
        sources: tuple[int, ...],
        files: list[dict[str, Any]],
        then: Then,
        failed: Callable[[RefusedError], None],
    ) -> None:
        """Make the directory, copy the inputs, go on with `then`; closes `sources`."""
        try:
            self._root.prepare(cell_id, owner)
            directory = self._root.open(cell_id)
            if self._projects is not None:
                self._projects.assign(cell_id, directory)
        except (OSError, WorkError) as error:
            close_all(sources)
            failed(RefusedError("CELL_FAILED", f"cannot make the work directory: {error}"))
            return

        def copy() -> dict[str, Any]:
            left = INPUT_BYTES_MAX
            for source, file in zip(sources, files, strict=True):
                path, mode = file["path"], file["mode"]
                left -= workdir.place(directory, path, source, mode=mode, owner=owner, bytes_max=left)
            return {}

        def done(answer_fd: int, error: str) -> None:
            os.close(answer_fd)
            if error:
                failed(RefusedError("CELL_FAILED", f"cannot place the inputs: {error}"))
            else:
                then()

        if sum(os.fstat(fd).st_size for fd in sources) > INLINE_COPY_BYTES_MAX:
            self._offload(cell_id, copy, (*sources, directory), done)
            close_all((*sources, directory))
            return
        try:
            copy()
        except (OSError, WorkError) as error:
            failed(RefusedError("CELL_FAILED", f"cannot place the inputs: {error}"))
            return
        finally:
            close_all((*sources, directory))
        then()

    def adopted(self, cell_id: str) -> None:
        """The cell exists now and is answerable for its directory."""
        self._prepared.pop(cell_id, None)

    def collect(self, cell_id: str, owner: Owner, args: dict[str, Any], answer: Answer) -> None:
        """Answers with a memfd of `{files: [{path, size_bytes}], refused: {path: reason}}`."""
        directory = self._directory(cell_id)

        def walk() -> dict[str, Any]:
            found = workdir.collect(
                directory, args["globs"], owner, files_max=args["files_max"], bytes_max=args["bytes_max"]
            )
            return {"files": found.files, "refused": found.refused}

        def done(answer_fd: int, error: str) -> None:
            if error:
                os.close(answer_fd)
                answer.refuse(RefusedError("OUTPUT_REFUSED", f"cannot collect outputs: {error}"))
            else:
                answer.ok({"fd": 0}, (answer_fd,))

        self._offload(cell_id, walk, (directory,), done)
        os.close(directory)

    def open(self, cell_id: str, owner: Owner, path: str) -> tuple[int, int]:
        """A read-only descriptor of one output and its size; raises RefusedError."""
        directory = self._directory(cell_id)
        try:
            return workdir.open_output(directory, path, owner)
        except WorkError as error:
            raise RefusedError("OUTPUT_REFUSED", f"cannot open an output: {error}") from error
        finally:
            os.close(directory)

    def put(self, place: str, owner: Owner, source: int, args: dict[str, Any], answer: Answer) -> None:
        """Replace one file by the copy of `source`, which is closed."""
        try:
            if self._projects is not None:
                self._projects.check_room(place, os.fstat(source).st_size)
            directory = self._directory(place)
        except RefusedError:
            os.close(source)
            raise

        def copy() -> dict[str, Any]:
            path, mode = args["path"], args["mode"]
            size = workfiles.replace_file(
                directory, path, source, mode=mode, owner=owner, bytes_max=limits.UPLOAD_BYTES_MAX
            )
            return {"size_bytes": size}

        def done(answer_fd: int, error: str) -> None:
            os.close(answer_fd)
            if error:
                answer.refuse(RefusedError("OUTPUT_REFUSED", f"cannot put the file: {error}"))
            else:
                answer.ok({})

        try:
            if os.fstat(source).st_size > INLINE_COPY_BYTES_MAX:
                self._offload(place, copy, (source, directory), done)
            else:
                answer.ok(copy())
        except (OSError, WorkError) as error:
            raise RefusedError("OUTPUT_REFUSED", f"cannot put the file: {error}") from error
        finally:
            close_all((source, directory))

    def list(self, place: str, path: str, answer: Answer) -> None:
        """Answers with a memfd of the listing."""
        directory = self._directory(place)
        try:
            listing = workfiles.list_directory(directory, path)
        except WorkError as error:
            raise RefusedError("NOT_FOUND", f"cannot list: {error}") from error
        finally:
            os.close(directory)
        answer.ok({"fd": 0}, (json_memfd(listing),))

    def _directory(self, cell_id: str) -> int:
        try:
            return self._root.open(cell_id)
        except WorkError as error:
            raise RefusedError("OUTPUT_REFUSED", f"cannot read outputs: {error}") from error

    def add_layers(self, place: str, owner: Owner, plan: Plan) -> None:
        """Make the directories of the cell's overlays; they go with its work directory. Raises OSError."""
        overlays = layers.layers_of(plan)
        if overlays:
            self._layers[place] = overlays, layers.own_paths(plan)
            for overlay in overlays:
                layers.prepare(self._root.fileno(), overlay, owner)

    def trees(self, place: str) -> tuple[str, ...]:
        """The directories below the work root that a cell changes."""
        overlays, _ = self._layers.get(place, ((), frozenset()))
        return tuple(dict.fromkeys((place, *(name for overlay in overlays for name in layers.names(overlay)))))

    def diff(self, place: str, answer: Answer) -> None:
        """Answers with a memfd of `{changes, refused}` and a file that holds the same as an OCI layer."""
        if place not in self._layers:
            why = "neither its root nor its work directory keeps changes apart"
            raise RefusedError("NO_LAYER", f"cannot tell what cell {place} changed: {why}")
        overlays, ours = self._layers[place]
        upper, lower, layer = layers.open_for_diff(self._root.fileno(), overlays[0])
        skipped = ours if overlays[0].path == "/" else frozenset()

        def walk() -> dict[str, Any]:
            return layers.difference(upper, lower, layer, skipped)

        def done(answer_fd: int, error: str) -> None:
            if error:
                close_all((answer_fd, layer))
                answer.refuse(RefusedError("OUTPUT_REFUSED", f"cannot tell what the cell changed: {error}"))
            else:
                shown = os.open(f"/proc/self/fd/{layer}", os.O_RDONLY | os.O_CLOEXEC)
                os.close(layer)
                answer.ok({"fd": 0}, (answer_fd, shown))

        self._offload(place, walk, (upper, lower, layer), done)
        close_all((upper, lower))

    def remove(self, cell_id: str, then: Then) -> None:
        """A small, flat directory at once, any other by a child."""
        if self._projects is not None:
            then = self._releasing(cell_id, then)
        overlays, _ = self._layers.pop(cell_id, ((), frozenset()))
        if not overlays and self._root.remove_flat(cell_id):
            then()
            return

        def work() -> None:
            for overlay in overlays:
                layers.remove(self._root.fileno(), overlay)
            self._root.remove(cell_id)

        def done(answer_fd: int, _: str) -> None:
            os.close(answer_fd)
            then()

        self._offload(cell_id, work, (self._root.fileno(),), done)

    def _releasing(self, place: str, then: Then) -> Then:
        def released() -> None:
            if self._projects is not None:
                with contextlib.suppress(OSError):  # the id is not used again as long as there are others
                    self._projects.release(place)
            then()

        return released

    def _offload(
        self, cell_id: str, work: Callable[[], Any], keep: tuple[int, ...], done: Callable[[int, str], None]
    ) -> None:
        """Run `work` in a child; `done(answer descriptor, error text)` takes over the descriptor."""
        child = offload(work, keep)
        self.busy[cell_id] += 1
        self.children.add(child.pid)

        def ended(_: int) -> None:
            self._loop.remove(child.pidfd)
            ok = child.finish()
            self.children.discard(child.pid)
            self.busy -= Counter({cell_id: 1})
            error = "" if ok else os.pread(child.answer, ERROR_BYTES_MAX, 0).decode("utf-8", "replace") or "killed"
            done(child.answer, error)

        self._loop.add(child.pidfd, ended)


def close_all(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)
