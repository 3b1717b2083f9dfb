"""`aether cell ...`: cells that live until they are freed, and what runs in them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from aether.cli import activity, bounds, images, network
from aether.cli.session import Session, command

if TYPE_CHECKING:
    from aether.contract.allocations import CellEvent, CellStats, CellView

Name = Annotated[str, typer.Argument(metavar="NAME", help="A cell's name or id.")]
Grace = Annotated[str, typer.Option(metavar="TIME", help="Between SIGTERM and SIGKILL.")]

_ALLOCATE: Final = """Make a cell that lives until it is freed.

A name is labels joined by /, outermost first; the cell around it must be there.

\b
Examples:
  aether cell allocate agent --memory 1G --idle-timeout 30m
  aether cell allocate agent/worker-1 --memory 256M
  aether cell allocate web --allow pypi.org:443
"""
_EXEC: Final = """Run a command in a cell as if it ran here: live output, its exit code.

With -i its standard input is ours, with -t it has a terminal; Ctrl-C goes to the command then.

\b
Examples:
  aether cell exec agent -- python3 -c 'print(1)'
  aether cell exec -it agent -- bash
  tar c . | aether cell exec -i agent -- tar x
"""
_START: Final = """Start a command in the background of a cell, under a name.

\b
Example:
  aether cell start agent server -- python3 -m http.server
"""
_STATS: Final = """Show what a cell uses, as the kernel counts it; --watch again and again.

\b
Example:
  aether cell stats agent --watch
"""
_PUT: Final = """Copy a file into a cell's work directory.

\b
Example:
  aether cell put agent main.py src/main.py
"""
_GET: Final = """Copy a file out of a cell's work directory, to a file or stdout.

\b
Example:
  aether cell get agent out.csv -o out.csv
"""


def register(group: typer.Typer) -> None:
    """Adds the commands to the `cell` group."""
    settings = {"allow_interspersed_args": False}
    command(group, "allocate", help=_ALLOCATE)(_allocate)
    command(group, "free", help="End a cell: its executables get the grace, then all of it is gone.")(_free)
    command(group, "list", help="List live cells, or those within one.")(_list)
    command(group, "show", help="Show one cell and the executables that live in it.")(_show)
    command(group, "start", help=_START, context_settings=settings)(_start)
    command(group, "exec", help=_EXEC, context_settings=settings)(_exec)
    command(group, "stop", help="Stop an executable by name or job id, with all that is its own.")(_stop)
    signal_example = "\n\n\b\nExample:\n  aether cell signal agent server HUP"
    command(group, "signal", help="Send a signal to an executable's process group." + signal_example)(_signal)
    command(group, "freeze", help="Pause every process of a cell.")(_freeze)
    command(group, "thaw", help="Let a frozen cell go on.")(_thaw)
    resize_example = "\n\n\b\nExample:\n  aether cell resize agent --memory 2G --pids 512"
    command(group, "resize", help="Change limits of a live cell; others stay as they are." + resize_example)(_resize)
    command(group, "stats", help=_STATS)(_stats)
    command(group, "put", help=_PUT)(_put)
    command(group, "get", help=_GET)(_get)
    command(group, "ls", help="List a directory of a cell's work directory.")(_ls)
    command(group, "activity", help=activity.CELL_ACTIVITY_HELP)(activity.of_cell)
    command(group, "trace", help=activity.CELL_TRACE_HELP)(activity.trace_cell)
    command(group, "events", help="Tell what happened to a cell; with --follow until it ended.")(_events)


def _allocate(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name: agent, agent/worker-1.")],
    memory: bounds.Memory = None,
    disk: bounds.Disk = None,
    cpu: bounds.Cpu = None,
    pids: Annotated[int | None, typer.Option(metavar="N", help="Processes and threads.")] = None,
    limit: bounds.Limit = None,
    require: Annotated[list[str] | None, typer.Option(metavar="LEVEL", help="Refuse without this level.")] = None,
    driver: bounds.Driver = None,
    label: Annotated[list[str] | None, typer.Option(metavar="LABEL", help="A data-flow label.")] = None,
    idle_timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="Free it after so long without use: 30m.")
    ] = None,
    image: images.Image = None,
    writable_root: images.WritableRoot = False,
    workspace: images.Workspace = None,
    allow: network.Allow = None,
    credential: network.Credentials = None,
    intercept: network.Intercept = False,
    learn: network.Learn = False,
    no_isolate_network: Annotated[
        bool, typer.Option("--no-isolate-network", help="Share the host's network; needs a permission.")
    ] = False,
    no_isolate_process: Annotated[
        bool, typer.Option("--no-isolate-process", help="Share the host's processes; needs a permission.")
    ] = False,
) -> None:
    from aether.cli.instance import ensure_instance
    from aether.cli.output import progress, show_json
    from aether.cli.parse import duration_ms

    with session.client() as client:
        ensure_instance(session, client)
        with progress("making the cell"):
            cell = client.cells.allocate(
                name,
                limits=bounds.to_limits(memory=memory, disk=disk, cpu=cpu, pids=pids, more=limit),
                require=bounds.required(require, driver),
                labels=label or (),
                idle_timeout_ms=duration_ms(idle_timeout) if idle_timeout else None,
                isolate_network=not no_isolate_network,
                isolate_process=not no_isolate_process,
                images=images.found(client, images.Choice(image, writable_root, workspace)),
                network=network.network_of(allow, credential, intercept, learn),
            )
    show_json(cell) if session.as_json else print(cell.cell_id)


def _free(session: Session, name: Name, grace: Grace = "2s") -> None:
    from aether.cli.output import progress, show_json
    from aether.cli.parse import duration_ms

    with session.client() as client, progress("freeing the cell"):
        cell = client.cells.free(name, grace_ms=duration_ms(grace))
    show_json(cell) if session.as_json else print(cell.state.value)


def _list(
    session: Session,
    within: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this cell and those in it.")] = None,
) -> None:
    from aether.cli.output import human_bytes, show_json, show_table

    with session.client() as client:
        cells = client.cells.list(within)
    if session.as_json:
        show_json({"cells": cells})
        return
    columns = ("NAME", "STATE", "RUNNING", "MEMORY", "CREATED", "CELL")
    rows = [(c.name, c.state.value, len(c.executables), human_bytes(c.limits.memory_bytes), c.created_at, c.cell_id)
            for c in cells]  # fmt: skip
    show_table(columns, rows)


def _show(session: Session, name: Name) -> None:
    import shlex

    from aether.cli.output import human_bytes, show_fields, show_json, show_table

    with session.client() as client:
        cell = client.cells.show(name)
    if session.as_json:
        show_json(cell)
        return
    limits = cell.limits
    shared = [what for what, own in (("network", cell.isolate_network), ("process", cell.isolate_process)) if not own]
    show_fields(
        [
            ("cell", cell.cell_id),
            ("name", cell.name),
            ("state", cell.state.value),
            ("reason", cell.reason),
            ("level", cell.level),
            ("shares", ", ".join(shared)),
            ("network", ", ".join(cell.network.hosts()) if cell.network else None),
            ("memory", human_bytes(limits.memory_bytes)),
            ("cpu", f"{limits.cpu_millis / 1000:g}"),
            ("pids", limits.pids),
            ("idle timeout", f"{cell.idle_timeout_ms / 1000:g} s" if cell.idle_timeout_ms else None),
            ("labels", ", ".join(cell.labels)),
            ("principal", cell.principal),
            ("created", cell.created_at),
            ("ended", cell.ended_at),
            ("spec", cell.spec_digest),
        ]
    )
    if cell.executables:
        rows = [(e.name, e.state, e.started_at, e.job_id, shlex.join(e.argv or ())) for e in cell.executables]
        show_table(("EXECUTABLE", "STATE", "STARTED", "JOB", "COMMAND"), rows)


def _limits_of_guest(timeout: str | None) -> Any:
    """Of a guest's limits only its time counts; without one it has as long as there is."""
    from aether.cli.parse import duration_ms
    from aether.contract.cells import Limits

    return Limits(timeout_ms=duration_ms(timeout)) if timeout is not None else None


def _command(argv: list[str]) -> list[str]:
    """What follows `--`: options end at the cell's name, so the two dashes arrive as a word of the command."""
    words = argv[1:] if argv[0] == "--" else argv
    if not words:
        raise typer.BadParameter("it is empty", param_hint="-- CMD")
    return words


def _start(
    session: Session,
    name: Name,
    executable: Annotated[str, typer.Argument(metavar="EXEC", help="The executable's name: one label.")],
    argv: Annotated[list[str], typer.Argument(metavar="-- CMD", help="The command and its arguments.")],
    env: Annotated[list[str] | None, typer.Option(metavar="K=V", help="K=V, for the command.")] = None,
    cwd: Annotated[str, typer.Option(metavar="DIR", help="Where it starts, below /work.")] = "/work",
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Wall time: 10s, 5m.")] = None,
) -> None:
    from aether.cli.output import show_json
    from aether.cli.parse import environment

    with session.client() as client:
        job = client.cells.start(
            name, _command(argv), name=executable, env=environment(env or []), cwd=cwd, limits=_limits_of_guest(timeout)
        )
    show_json(job) if session.as_json else print(job.job_id)


def _exec(
    session: Session,
    name: Name,
    argv: Annotated[list[str], typer.Argument(metavar="-- CMD", help="The command and its arguments.")],
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Its standard input is ours.")] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="It has a terminal.")] = False,
    env: Annotated[list[str] | None, typer.Option(metavar="K=V", help="K=V, for the command.")] = None,
    cwd: Annotated[str, typer.Option(metavar="DIR", help="Where it starts, below /work.")] = "/work",
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Wall time: 10s, 5m.")] = None,
) -> int:
    import os

    from aether.cli.follow import ended_by_itself, exit_code
    from aether.cli.interactive import attend
    from aether.cli.output import show_error, show_json
    from aether.cli.parse import environment
    from aether.client.client import job_error

    variables = environment(env or [])
    if tty and "TERM" in os.environ:
        variables.setdefault("TERM", os.environ["TERM"])
    with session.client() as client:
        job = client.cells.start(
            name,
            _command(argv),
            env=variables,
            cwd=cwd,
            limits=_limits_of_guest(timeout),
            stdio="tty" if tty else "pipe" if interactive else "logs",
        )
        job = attend(client, job, tty=tty, interactive=interactive, quiet=session.as_json)
        if session.as_json:
            show_json(job)
        elif not ended_by_itself(job) and not (tty and job.signal is not None):
            show_error(job_error(job))
        return exit_code(job)


def _stop(
    session: Session,
    name: Name,
    executable: Annotated[str, typer.Argument(metavar="EXEC", help="Its name, or its job id.")],
    grace: Grace = "2s",
) -> None:
    from aether.cli.output import progress, show_json
    from aether.cli.parse import duration_ms

    with session.client() as client, progress("stopping the executable"):
        job_id = client.cells.executable(name, executable)
        client.stop(job_id, grace_ms=duration_ms(grace))
        job = client.wait(job_id)
    show_json(job) if session.as_json else print(job.state.value)


def _signal(
    session: Session,
    name: Name,
    executable: Annotated[str, typer.Argument(metavar="EXEC", help="Its name, or its job id.")],
    signal: Annotated[str, typer.Argument(metavar="SIG", help="HUP, SIGHUP or 1.")],
) -> None:
    from aether.cli.output import show_json
    from aether.cli.parse import signal_number

    with session.client() as client:
        job = client.signal(client.cells.executable(name, executable), signal_number(signal))
    if session.as_json:
        show_json(job)


def _freeze(session: Session, name: Name) -> None:
    with session.client() as client:
        _told(session, client.cells.freeze(name))


def _thaw(session: Session, name: Name) -> None:
    with session.client() as client:
        _told(session, client.cells.thaw(name))


def _told(session: Session, cell: CellView) -> None:
    from aether.cli.output import show_json

    show_json(cell) if session.as_json else print(cell.state.value)


def _resize(
    session: Session,
    name: Name,
    memory: bounds.Memory = None,
    disk: bounds.Disk = None,
    cpu: bounds.Cpu = None,
    pids: Annotated[int | None, typer.Option(metavar="N", help="Processes and threads.")] = None,
    limit: bounds.Limit = None,
    idle_timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Free it after so long: 30m.")] = None,
) -> None:
    from msgspec.structs import replace

    from aether.cli.output import show_json
    from aether.cli.parse import duration_ms
    from aether.contract.cells import Limits

    asked, untouched = bounds.to_limits(memory=memory, disk=disk, cpu=cpu, pids=pids, more=limit), Limits()
    changed = {f: v for f in Limits.__struct_fields__ if (v := getattr(asked, f)) != getattr(untouched, f)}
    named = {"memory_bytes": memory, "disk_bytes": disk, "cpu_millis": cpu, "pids": pids}
    changed |= {field: getattr(asked, field) for field, given in named.items() if given is not None}
    with session.client() as client:
        limits = replace(client.cells.show(name).limits, **changed)
        idle_ms = duration_ms(idle_timeout) if idle_timeout else None
        cell = client.cells.resize(name, limits, idle_timeout_ms=idle_ms)
    show_json(cell) if session.as_json else print(cell.spec_digest)


def _stats(
    session: Session,
    name: Name,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again and again, until Ctrl-C or its end.")] = False,
    interval: Annotated[str, typer.Option(metavar="TIME", help="Between two looks.")] = "1s",
) -> None:
    import time

    from aether.cli.output import show_json
    from aether.cli.parse import duration_ms
    from aether.contract.errors import AetherError

    pause_s, before = duration_ms(interval) / 1000, None
    with session.client() as client:
        while True:
            try:
                stats = client.cells.stats(name)
            except AetherError as error:
                if error.code == "NO_SUCH_CELL" and before is not None:
                    return
                raise
            show_json(stats) if session.as_json else _show_stats(stats, before)
            sys.stdout.flush()
            if not watch:
                return
            before = stats
            try:
                time.sleep(max(pause_s, 0.05))
            except KeyboardInterrupt:
                return


def _waits(stats: CellStats) -> list[tuple[str, str]]:
    """What it waits for now, where the kernel tells and there is something to tell."""
    waits = [
        (f"{name} pressure", f"{row['some_avg10_percent']:.0f}%")
        for name, row in stats.contention.pressure.items()
        if row.get("some_avg10_percent", 0.0) >= 1
    ]
    events = ", ".join(f"{name} {count}" for name, count in stats.contention.memory_events.items() if count)
    return [*waits, *([("memory limits met", events)] if events else [])]


def _show_stats(stats: CellStats, before: CellStats | None) -> None:
    """One line when it is watched, with the CPU of the time since the last; else fields."""
    from aether.cli.output import human_bytes, show_fields

    usage = stats.usage
    cpu_us = (usage.cpu_user_us or 0) + (usage.cpu_system_us or 0)
    fields = [
        ("state", stats.state.value),
        ("executables", stats.executables),
        ("cpu", f"{cpu_us / 1e6:.3f} s"),
        ("memory peak", f"{human_bytes(usage.memory_peak_bytes) or '-'} of {human_bytes(stats.limits.memory_bytes)}"),
        ("pids peak", f"{usage.pids_peak if usage.pids_peak is not None else '-'} of {stats.limits.pids}"),
        ("read", human_bytes(usage.io_read_bytes)),
        ("written", human_bytes(usage.io_write_bytes)),
        ("throttled", f"{usage.throttled_us / 1e6:.3f} s" if usage.throttled_us else None),
        ("oom kills", usage.oom_kills or None),
        *_waits(stats),
    ]
    if before is None:
        show_fields(fields)
        return
    past = before.usage
    wall_us = max((usage.wall_us or 0) - (past.wall_us or 0), 1)
    spent_us = cpu_us - (past.cpu_user_us or 0) - (past.cpu_system_us or 0)
    shown = "  ".join(f"{name} {value}" for name, value in fields if value is not None)
    print(f"{stats.time}  {100 * spent_us / wall_us:.0f}%  {shown}")


def _put(
    session: Session,
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file here, or - for stdin.")],
    path: Annotated[str | None, typer.Argument(metavar="[PATH]", help="Its place below /work; its name else.")] = None,
    executable: Annotated[bool, typer.Option("--executable", help="It may be executed.")] = False,
    label: Annotated[list[str] | None, typer.Option(metavar="LABEL", help="A data-flow label.")] = None,
) -> None:
    import io

    from aether.cli.output import progress, show_json

    source: Any = io.BytesIO(sys.stdin.buffer.read()) if str(file) == "-" else file
    with session.client() as client, progress("sending the file"):
        kept = client.cells.put(name, path or file.name, source, executable=executable, labels=label or ())
    show_json(kept) if session.as_json else print(kept.digest)


def _get(
    session: Session,
    name: Name,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file below /work.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A file; stdout otherwise.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    from aether.cli.download import written
    from aether.cli.output import progress, show_json

    with session.client() as client, progress("fetching the file"):
        if output is None:
            client.cells.get(name, path, sys.stdout.buffer)
            return
        with written(output, force=force) as out:
            size = client.cells.get(name, path, out)
    if session.as_json:
        show_json({"path": str(output), "size_bytes": size})


def _ls(
    session: Session,
    name: Name,
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="A directory below /work.")] = "",
) -> None:
    from aether.cli.output import human_bytes, note, show_json, show_table

    with session.client() as client:
        listing = client.cells.files(name, path)
    if session.as_json:
        show_json(listing)
        return
    rows = [(e.kind, f"{e.mode:04o}", human_bytes(e.size_bytes), e.modified_at, e.name) for e in listing.entries]
    show_table(("KIND", "MODE", "SIZE", "MODIFIED", "NAME"), rows)
    if listing.truncated:
        note("there is more than is shown")


def _events(
    session: Session,
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the cell ended.")] = False,
) -> None:
    import msgspec

    with session.client() as client:
        try:
            for event in client.cells.events(name, follow=follow):
                print(msgspec.json.encode(event).decode() if session.as_json else _line(event))
                sys.stdout.flush()
        except KeyboardInterrupt:
            return


def _line(event: CellEvent) -> str:
    from aether.cli.terminal import printable

    shown = [event.state, event.job_id, *(f"{name}={text}" for name, text in event.detail.items() if name != "name")]
    return printable(f"{event.time}  {event.type:<15} {'  '.join(word for word in shown if word)}".rstrip())
