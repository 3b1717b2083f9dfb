"""Options of `aether run` about images; `aether image import|list|show|remove`; `aether cell diff|commit`."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from aether.cli.session import Session, command

if TYPE_CHECKING:
    from aether.client import Client
    from aether.contract.cells import Images
    from aether.contract.images import ImageInfo
    from aether.contract.jobs import ArtifactRef, JobView

Image = Annotated[
    str | None, typer.Option("--image", metavar="NAME|DIR", help="The root: an image, an OCI layout, a directory.")
]
WritableRoot = Annotated[bool, typer.Option("--writable-root", help="Let the command change the image's files.")]
Workspace = Annotated[
    str | None, typer.Option("--workspace", metavar="NAME|DIR", help="What lies in /work; changes go on top.")
]
KeepDiff = Annotated[bool, typer.Option("--keep-diff", help="Keep what was changed, for `aether cell diff|commit`.")]
Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="The image's name: tools or tools:1.")]
Ref = Annotated[str, typer.Argument(metavar="IMAGE", help="A name or sha256:...")]
Job = Annotated[str, typer.Argument(metavar="JOB|CELL", help="A job that ran with --keep-diff, or a cell.")]
_MARKS: Final = {"added": "A", "modified": "M", "replaced": "R", "deleted": "D"}

IMPORT_HELP: Final = """Unpack an image for cells: an OCI image layout, its tar, or any directory.

\b
Examples:
  skopeo copy docker://debian:12 oci-archive:debian.tar && aether image import debian.tar --name debian:12
  aether image import ./rootfs --name tools
"""
DIFF_HELP: Final = """Show what a job or a cell changed in its image: A added, M modified, R replaced, D deleted.

\b
Example:
  aether run --image tools --writable-root --keep-diff --detach -- sh -c 'echo hi > /etc/motd'
  aether cell diff JOB
"""
COMMIT_HELP: Final = """Make what a job or a cell changed one more layer of its image.

\b
Example:
  aether cell commit JOB --name tools:2
"""


@dataclass(frozen=True, slots=True)
class Choice:
    """The options of `aether run` about images, as given."""

    image: str | None
    writable_root: bool
    workspace: str | None
    keep_diff: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the options make of a command: its words and environment with the image's own, and where it starts."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    images: Images | None


def register(app: typer.Typer) -> None:
    """Adds `image`."""
    group = typer.Typer(help="Images: roots of cells.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="image")
    command(group, "import", help=IMPORT_HELP)(_import)
    command(group, "list", help="List images, newest first.")(_list)
    command(group, "show", help="Show an image.")(_show)
    command(group, "remove", help="Take a name away, or by digest the image.")(_remove)


def register_cell(group: typer.Typer) -> None:
    """Adds `diff` and `commit` to `aether cell`."""
    command(group, "diff", help=DIFF_HELP)(_diff)
    command(group, "commit", help=COMMIT_HELP)(_commit)


def prepare(client: Client, argv: Sequence[str], env: Mapping[str, str], choice: Choice) -> Prepared:
    """Imports directories, finds names, and honours the image's Entrypoint, Env and WorkingDir."""
    from aether.contract.cells import Images
    from aether.contract.errors import AetherError

    if choice.image is None and choice.workspace is None:
        if choice.writable_root or choice.keep_diff:
            raise AetherError("BAD_FIELD", "cannot keep changes of this host's root", "add --image or --workspace")
        return Prepared(list(argv), dict(env), "/work", None)
    root = _resolve(client, choice.image) if choice.image is not None else None
    work = _resolve(client, choice.workspace) if choice.workspace is not None else None
    images = Images(
        root=root.digest if root else None,
        writable=choice.writable_root,
        work=work.digest if work else None,
        keep_diff=choice.keep_diff,
    )
    if root is None:
        return Prepared(list(argv), dict(env), "/work", images)
    own = dict(entry.partition("=")[::2] for entry in root.config.env if "=" in entry)
    cwd = posixpath.normpath("/" + root.config.working_dir.lstrip("/"))
    return Prepared([*root.config.entrypoint, *argv], own | dict(env), "/work" if cwd == "/" else cwd, images)


def found(client: Client, choice: Choice) -> Images | None:
    """The images that the options name, imported where they are directories."""
    return prepare(client, (), {}, choice).images


def outputs_of(job: JobView) -> list[ArtifactRef]:
    """What the job itself wrote: not the diff of its image."""
    from aether.contract.images import DIFF_NAMES

    return [ref for ref in job.artifacts if ref.media_type not in DIFF_NAMES]


def _resolve(client: Client, text: str) -> ImageInfo:
    return client.image_import(text) if "/" in text or Path(text).exists() else client.image_show(text)


def _import(
    session: Session,
    source: Annotated[Path, typer.Argument(metavar="PATH", help="A tar, an OCI layout, or a directory.")],
    name: Name = None,
) -> None:
    from aether.cli.instance import ensure_instance
    from aether.cli.output import progress

    with session.client() as client:
        ensure_instance(session, client)
        with progress("importing the image"):
            info = client.image_import(source, name=name)
    _tell(session, info)


def _list(session: Session) -> None:
    from aether.cli.output import human_bytes, show_json, show_table

    with session.client() as client:
        found = client.images()
    if session.as_json:
        show_json(found)
        return
    rows = [
        (", ".join(i.names), i.digest, human_bytes(i.size_bytes), str(i.entries), i.created_at) for i in found.images
    ]
    show_table(("NAME", "DIGEST", "SIZE", "ENTRIES", "CREATED"), rows)


def _show(session: Session, image: Ref) -> None:
    from aether.cli.output import human_bytes, show_fields, show_json

    with session.client() as client:
        info = client.image_show(image)
    if session.as_json:
        show_json(info)
        return
    config = info.config
    fields = [
        ("digest", info.digest), ("names", ", ".join(info.names)), ("size", human_bytes(info.size_bytes)),
        ("entries", info.entries), ("skipped", info.skipped), ("layers", len(info.layers)),
        ("entrypoint", " ".join(config.entrypoint)), ("cmd", " ".join(config.cmd)), ("cwd", config.working_dir),
        ("user", config.user), ("env", " ".join(config.env)), ("created", info.created_at),
    ]  # fmt: skip
    show_fields(fields)


def _remove(session: Session, image: Ref) -> None:
    with session.client() as client:
        info = client.image_remove(image)
    _tell(session, info)


def _diff(session: Session, job: Job) -> None:
    from aether.cli.output import note, show_json
    from aether.cli.terminal import printable

    with session.client() as client:
        listing = client.image_diff(job)
    if session.as_json:
        show_json(listing)
        return
    for change in listing.changes:
        print(_MARKS.get(change.change, "?"), printable("/" + change.path))
    for path, why in listing.refused.items():
        note(f"no part of an image: {printable(path)}: {why}")


def _commit(session: Session, job: Job, name: Name = None) -> None:
    from aether.cli.output import progress

    with session.client() as client, progress("committing"):
        info = client.image_commit(job, name=name)
    _tell(session, info)


def _tell(session: Session, info: ImageInfo) -> None:
    from aether.cli.output import show_json

    show_json(info) if session.as_json else print(info.digest)
