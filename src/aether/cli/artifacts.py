"""`aether artifact get | list | put`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from aether.cli.session import Session, command


def register(app: typer.Typer) -> None:
    """Adds the `artifact` group."""
    group = typer.Typer(help="Content-addressed inputs and outputs.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="artifact")
    example = "\n\n\b\nExample:\n  aether artifact get sha256:... --output out.csv"
    command(group, "get", help="Fetch an artifact, verified, to a file or stdout." + example)(_get)
    command(group, "list", help="List artifacts, or those of one job.")(_list)
    command(group, "put", help="Upload a file; prints its digest.")(_put)


def _get(
    session: Session,
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="sha256:...")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A file; stdout otherwise.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    from aether.cli.download import save_outputs
    from aether.cli.output import progress, show_json
    from aether.contract.jobs import ArtifactRef

    with session.client() as client, progress("fetching the artifact"):
        if output is None:
            client.artifact_get(digest, sys.stdout.buffer)
            return
        reference = ArtifactRef(name=output.name, digest=digest, size_bytes=-1)
        save_outputs(client, [reference], output.parent, force=force)
    if session.as_json:
        show_json({"digest": digest, "path": str(output), "size_bytes": output.stat().st_size})


def _list(
    session: Session,
    job: Annotated[str | None, typer.Option(metavar="JOB", help="Only this job's.")] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="How many.")] = 50,
    cursor: Annotated[str | None, typer.Option(metavar="CURSOR", help="Continue a listing.")] = None,
) -> None:
    from aether.cli.output import human_bytes, show_json, show_table

    with session.client() as client:
        page = client.artifact_list(job_id=job, limit=limit, cursor=cursor)
    if session.as_json:
        show_json(page)
        return
    rows = [
        (a.digest, human_bytes(a.size_bytes), a.name, ", ".join(a.labels), a.job_id, a.created_at)
        for a in page.artifacts
    ]
    show_table(("DIGEST", "SIZE", "NAME", "LABELS", "JOB", "CREATED"), rows)


def _put(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file.")],
    media_type: Annotated[str, typer.Option(metavar="TYPE", help="Its media type.")] = "application/octet-stream",
    label: Annotated[
        list[str] | None, typer.Option(metavar="LABEL", help="A data-flow label, such as local-only.")
    ] = None,
) -> None:
    from aether.cli.output import progress, show_json

    with session.client() as client, progress("uploading"):
        info = client.artifact_put(file, media_type=media_type, labels=label or ())
    show_json(info) if session.as_json else print(info.digest)
