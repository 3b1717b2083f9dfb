"""`aether run`: a command in a cell as if it ran here: live output, its exit code, its files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aether.cli import approvals, bounds, images, network
from aether.cli.session import Session, command

if TYPE_CHECKING:
    from aether.cli.follow import Follower
    from aether.client import Client
    from aether.contract.cells import Interpreter
    from aether.contract.jobs import JobView

_Files = Annotated[list[str] | None, typer.Option("--file", metavar="FILE", help="Put a file into /work: SRC[:DEST].")]
_Outputs = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Fetch files matching this glob afterwards.")]
_Python = Annotated[
    bool, typer.Option("--python", help="CMD is a script, -c CODE or -m MODULE for a Python started ahead.")
]
_Imports = Annotated[
    list[str] | None, typer.Option("--import", metavar="MODULE", help="With --python: has this module loaded.")
]
_Require = Annotated[list[str] | None, typer.Option(metavar="LEVEL", help="Refuse to start without this level.")]
_HELP = """Run a command in a cell.

Its stdout and stderr come live; the exit code is the command's own (128+n after signal n, 124 after --timeout).
Options end at the first word of the command. An instance is started when none is up.

\b
Examples:
  aether run -- echo hello
  aether run --file main.py --output 'out/*.csv' --timeout 1m -- python3 main.py
  aether run --dir . --memory 1G --cpu 2 -- make test
  aether run --cpu-weight 20 --sched idle --io-class idle -- python3 crunch.py
  aether run --python --import numpy --file main.py -- main.py --steps 10
  aether run --allow pypi.org:443 --allow files.pythonhosted.org:443 -- pip install rich
  aether run --secret API_KEY=file:/etc/aether/key -- ./agent
  aether run --image tools --writable-root --keep-diff -- make install
  aether run --require cell --require netns --detach -- sleep 60
"""


def register(app: typer.Typer) -> None:
    """Adds `run`."""
    settings = {"allow_interspersed_args": False}
    command(app, "run", help=_HELP, context_settings=settings)(_run)


def _run(
    session: Session,
    argv: Annotated[list[str], typer.Argument(metavar="-- CMD", help="The command and its arguments.")],
    file: _Files = None,
    directory: Annotated[Path | None, typer.Option("--dir", metavar="DIR", help="Copy a directory into /work.")] = None,
    output: _Outputs = None,
    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where to put them.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    memory: bounds.Memory = None,
    memory_high: bounds.MemoryHigh = None,
    disk: bounds.Disk = None,
    cpu: bounds.Cpu = None,
    cpu_weight: bounds.CpuWeight = None,
    cpus_allowed: bounds.CpusAllowed = None,
    io_weight: bounds.IoWeight = None,
    nice: bounds.Nice = None,
    sched: bounds.SchedText = None,
    io_class: bounds.IoClassText = None,
    limit: bounds.Limit = None,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Wall time: 10s, 5m.")] = None,
    pids: Annotated[int | None, typer.Option(metavar="N", help="Processes and threads.")] = None,
    python: _Python = False,
    imports: _Imports = None,
    env: Annotated[list[str] | None, typer.Option(metavar="K=V", help="K=V, for the command.")] = None,
    require: _Require = None,
    driver: bounds.Driver = None,
    label: Annotated[list[str] | None, typer.Option(metavar="LABEL", help="A data-flow label.")] = None,
    image: images.Image = None,
    writable_root: images.WritableRoot = False,
    workspace: images.Workspace = None,
    keep_diff: images.KeepDiff = False,
    allow: network.Allow = None,
    credential: network.Credentials = None,
    intercept: network.Intercept = False,
    secret: network.Secrets = None,
    learn: network.Learn = False,
    approval: approvals.Wait = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job id and leave.")] = False,
) -> int:
    from aether.cli.instance import ensure_instance
    from aether.cli.output import progress

    asked = bounds.to_limits(
        memory=memory, memory_high=memory_high, disk=disk, cpu=cpu, cpu_weight=cpu_weight, cpus_allowed=cpus_allowed,
        io_weight=io_weight, timeout=timeout, pids=pids, nice=nice, sched=sched, io_class=io_class, more=limit,
    )  # fmt: skip
    with session.client() as client:
        ensure_instance(session, client)
        with progress("submitting the job"):
            choice = images.Choice(image, writable_root, workspace, keep_diff)
            asks = images.prepare(client, argv, _environment(env or []), choice)
            job: JobView = client.run(
                asks.argv,
                files=_files(file or []),
                directory=directory,
                outputs=output or [],
                env=asks.env,
                cwd=asks.cwd,
                images=asks.images,
                limits=asked,
                require=bounds.required(require, driver),
                labels=label or [],
                network=network.network_of(allow, credential, intercept, learn),
                secrets=network.secrets_of(secret),
                python=_interpreter(python, imports),
                approval_ms=approvals.wait_ms(approval),
                wait=False,
            )
        return _left(session, job) if detach else _finish(session, client, job, output_dir, force)


def _left(session: Session, job: JobView) -> int:
    from aether.cli.output import show_json

    show_json(job) if session.as_json else print(job.job_id)
    return 0


def _interpreter(python: bool, imports: list[str] | None) -> Interpreter | None:
    from aether.contract.cells import Interpreter

    if imports and not python:
        raise typer.BadParameter("it goes with --python", param_hint="--import")
    return Interpreter(imports=tuple(imports or ())) if python else None


def _finish(session: Session, client: Client, job: JobView, output_dir: Path, force: bool) -> int:
    """Attends the job to its end, fetches what it wrote; the exit code of the command."""
    from aether.cli.download import save_outputs
    from aether.cli.follow import ended_by_itself, exit_code
    from aether.cli.output import note, show_error, show_json
    from aether.client.client import job_error

    job = _attend(client, job, quiet=session.as_json)
    if session.as_json:
        show_json(job)
    elif not ended_by_itself(job):
        show_error(job_error(job))
    if outputs := images.outputs_of(job):
        names = save_outputs(client, outputs, output_dir, force=force)
        if sys.stderr.isatty() and not session.as_json:
            note(f"wrote {', '.join(names)}")
    return exit_code(job)


def _attend(client: Client, job: JobView, *, quiet: bool) -> JobView:
    """The terminal job, with its output shown meanwhile. The first Ctrl-C stops the job, a second one leaves."""
    from aether.cli.follow import Follower

    if not quiet:
        approvals.tell(job)
    follower: Follower | None = None if quiet else Follower(client, job.job_id)
    try:
        job = client.wait(job.job_id)
    except KeyboardInterrupt:
        client.stop(job.job_id)
        job = client.wait(job.job_id)
    if follower is not None:
        follower.finish(timeout_s=30.0)
    return job


def _files(specs: list[str]) -> dict[str, str]:
    from aether.cli.parse import file_spec

    found = {}
    for spec in specs:
        source, dest = file_spec(spec, Path(spec).exists())
        found[dest] = source
    return found


def _environment(entries: list[str]) -> dict[str, str]:
    from aether.cli.parse import environment

    return environment(entries)
