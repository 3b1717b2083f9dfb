"""The directories in which a cell's overlays keep their changes, beside its work directory.

```
<work root>/<cell>                 the work directory; the layer of an overlay at /work
<work root>/.root-<cell>           the layer of a writable root, the job's own
<work root>/.scratch-<either>      overlayfs's own ("workdir"), nobody else's
```
All lie on one file system, as overlayfs asks (Documentation/filesystems/overlayfs.rst). No cell id begins with a
dot, so none of these is another cell's.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from typing import Any

from aether.contract import limits
from aether.contract.cellplan import Mask, Overlay, Plan, scratch_of
from aether.spawner.workdir import Owner, remove_tree


def layers_of(plan: Plan) -> tuple[Overlay, ...]:
    """The overlays of a plan that keep their changes."""
    return tuple(step for step in plan.steps if isinstance(step, Overlay) and step.upper is not None)


def own_paths(plan: Plan) -> frozenset[str]:
    """What the steps of the plan make in the root themselves, relative to it: no change of the job's."""
    paths = [path for step in plan.steps for path in (step.paths if isinstance(step, Mask) else (step.path,))]
    return frozenset(path.lstrip("/") for path in paths)


def prepare(root: int, overlay: Overlay, owner: Owner) -> None:
    """Make what is missing below the work root `root`; raises OSError."""
    upper, scratch = names(overlay)
    with contextlib.suppress(FileExistsError):
        os.mkdir(upper, 0o755, dir_fd=root)
        if owner.changes:
            os.chown(upper, owner.uid, owner.gid, dir_fd=root, follow_symlinks=False)
    with contextlib.suppress(FileExistsError):
        os.mkdir(scratch, 0o700, dir_fd=root)


def remove(root: int, overlay: Overlay) -> None:
    """Remove both directories; missing ones are removed ones."""
    for name in names(overlay):
        remove_tree(root, name)


def open_for_diff(root: int, overlay: Overlay) -> tuple[int, int, int]:
    """Descriptors of the layer, of what it lies over, and of an unnamed new file; raises OSError."""
    assert overlay.upper is not None
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    upper = os.open(names(overlay)[0], flags | os.O_NOFOLLOW, dir_fd=root)
    lower = os.open(overlay.lower, flags | os.O_NOFOLLOW)
    return upper, lower, os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=root)


def difference(upper: int, lower: int, layer: int, skipped: frozenset[str]) -> dict[str, Any]:
    """What lies in the layer but at `skipped`, written to `layer` too; in a process of its own. Raises OSError,
    ValueError."""
    from aether.spawner.difference import write_difference  # tarfile is not for the spawner's start

    with open(layer, "wb", closefd=False) as file:
        return write_difference(upper, lower, file, limits.UPLOAD_BYTES_MAX, skipped)


def names(overlay: Overlay) -> tuple[str, str]:
    """The two directories of an overlay that keeps its changes, below the work root."""
    assert overlay.upper is not None
    return posixpath.basename(overlay.upper), posixpath.basename(scratch_of(overlay.upper))
