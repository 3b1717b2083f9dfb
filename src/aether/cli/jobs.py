"""`aether ps` and `aether job ...`: what runs, what ran, and how it went."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

from aether.cli import activity, replay
from aether.cli.session import Session, command

if TYPE_CHECKING:
    from aether.contract.jobs import JobView
    from aether.contract.wire import JobPage

Job = Annotated[str, typer.Argument(metavar="JOB", help="A job id.")]

_LOGS: Final = """Print a job's output, as bytes.

On a terminal, control sequences other than colours are shown escaped (^[ is ESC), not obeyed.

\b
Example:
  aether job logs -f JOB
"""


def register(app: typer.Typer) -> None:
    """Adds `ps` and the `job` group."""
    command(app, "ps", help="List open jobs; with --all the finished ones too.")(_ps)
    group = typer.Typer(help="Look at jobs and stop them.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="job")
    command(group, "list", help="List jobs, newest first.\n\n\b\nExample:\n  aether job list --only failed --limit 10")(
        _list
    )
    command(group, "show", help="Show one job.")(_show)
    command(group, "logs", help=_LOGS)(_logs)
    command(group, "stop", help="Stop a job: SIGTERM, the grace, then its whole cell.")(_stop)
    command(group, "activity", help=activity.ACTIVITY_HELP)(activity.of_job)
    command(group, "trace", help=activity.TRACE_HELP)(activity.trace_job)
    command(group, "replay", help=replay.HELP)(replay.replay)
    command(group, "story", help="Tell what happened to a job.")(_story)
    command(group, "result", help="Print a job's result (JSON).")(_result)


def _ps(
    session: Session, everything: Annotated[bool, typer.Option("--all", "-a", help="Finished jobs too.")] = False
) -> None:
    from aether.contract.jobs import TERMINAL, JobState

    states = () if everything else tuple(state for state in JobState if state not in TERMINAL)
    with session.client() as client:
        _show_page(session, client.list(states=states))


def _list(
    session: Session,
    only: Annotated[
        list[str] | None, typer.Option(metavar="STATE", help="Only jobs in this state; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="How many.")] = 50,
    cursor: Annotated[str | None, typer.Option(metavar="JOB", help="Continue after this job.")] = None,
) -> None:
    from aether.contract.errors import AetherError
    from aether.contract.jobs import JobState

    try:
        states = tuple(JobState(text) for text in only or ())
    except ValueError as error:
        names = ", ".join(known.value for known in JobState)
        raise AetherError("BAD_FIELD", f"cannot list jobs: {error}", f"use one of {names}") from error
    with session.client() as client:
        _show_page(session, client.list(states=states, limit=limit, cursor=cursor))


def _show_page(session: Session, page: JobPage) -> None:
    from aether.cli.output import note, show_json, show_table

    if session.as_json:
        show_json(page)
        return
    columns = ("JOB", "STATE", "EXIT", "CREATED", "WHAT")
    show_table(columns, [(j.job_id, j.state.value, _exit(j), j.created_at, _what(j)) for j in page.jobs])
    if page.next_cursor and sys.stderr.isatty():
        note(f"more: --cursor {page.next_cursor}")


def _exit(job: JobView) -> str | None:
    if job.signal is not None:
        return f"signal {job.signal}"
    return None if job.exit_code is None else str(job.exit_code)


def _what(job: JobView) -> str:
    import shlex

    text = shlex.join(job.argv) if job.argv else f"{job.op} {job.model_id or ''}".strip()
    return text if len(text) <= 60 else text[:59] + "…"


def _show(session: Session, job_id: Job) -> None:
    import shlex

    from aether.cli.output import human_bytes, show_fields, show_json

    with session.client() as client:
        job = client.get(job_id)
    if session.as_json:
        show_json(job)
        return
    usage = job.usage
    cpu_us = (usage.cpu_user_us or 0) + (usage.cpu_system_us or 0) if usage else None
    show_fields(
        [
            ("job", job.job_id),
            ("state", job.state.value),
            ("what", shlex.join(job.argv) if job.argv else f"{job.kind} {job.op}"),
            ("model", f"{job.model_id}@{job.model_version}" if job.model_id else None),
            ("exit", _exit(job)),
            ("error", f"{job.error.message} [{job.error.code}]" if job.error else None),
            ("remedy", job.error.remedy if job.error else None),
            ("principal", job.principal),
            ("labels", ", ".join(job.labels)),
            ("created", job.created_at),
            ("started", job.started_at),
            ("finished", job.finished_at),
            ("cpu", f"{cpu_us / 1e6:.3f} s" if cpu_us is not None else None),
            ("memory", human_bytes(usage.memory_peak_bytes) if usage else None),
            ("cell", job.cell_id),
            ("records", " ".join(str(i) for i in (job.intent_index, job.outcome_index) if i is not None)),
            ("result", job.result_digest),
            *(("output", f"{a.name} {human_bytes(a.size_bytes)} {a.digest}") for a in job.artifacts),
        ]
    )


def _logs(
    session: Session,
    job_id: Job,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
    stream: Annotated[str, typer.Option(metavar="STREAM", help="stdout, stderr or all.")] = "all",
) -> None:
    from aether.cli.follow import copy_stream

    with session.client() as client:
        if session.as_json:
            from aether.cli.output import show_json

            text = b"".join(client.logs(job_id, stream=stream, follow=follow))
            show_json({"job_id": job_id, "stream": stream, "text": text.decode("utf-8", "replace")})
            return
        copy_stream(client, job_id, stream, sys.stdout.buffer, follow=follow)


def _stop(
    session: Session,
    job_id: Job,
    grace: Annotated[str, typer.Option(metavar="TIME", help="Between SIGTERM and SIGKILL.")] = "2s",
) -> None:
    from aether.cli.output import progress, show_json
    from aether.cli.parse import duration_ms

    with session.client() as client, progress("stopping the job"):
        job = client.stop(job_id, grace_ms=duration_ms(grace))
    show_json(job) if session.as_json else print(job.state.value)


def _story(session: Session, job_id: Job) -> None:
    from aether.cli.output import show_json
    from aether.cli.terminal import printable

    with session.client() as client:
        story = client.story(job_id)
    if session.as_json:
        show_json(story)
        return
    for line in story.lines:
        print(f"{line.time}  {line.event:<16}  {printable(line.text)}")


def _result(session: Session, job_id: Job) -> None:
    from aether.cli.output import show_json

    with session.client() as client:
        show_json(client.result_bytes(job_id))
