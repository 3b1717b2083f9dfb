"""`aether up | down | health | metrics | doctor | cell explain | completion`: the node itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from aether.cli import bounds, cells, images
from aether.cli.session import Session, command

if TYPE_CHECKING:
    from collections.abc import Sequence

_EXPLAIN = """Show the plan that a command would get, and what this host cannot enforce. Starts nothing.

\b
Example:
  aether cell explain -- python3 main.py
"""


def register(app: typer.Typer) -> None:
    """Adds the node's commands."""
    command(app, "up", help="Start an instance.\n\n\b\nExamples:\n  aether up\n  aether up --foreground")(_up)
    command(app, "down", help="Stop the instance: jobs end, everything is written.")(_down)
    command(app, "health", help="Whether the node works; exits 120 when it is degraded.")(_health)
    command(app, "metrics", help="Print metrics in the Prometheus text format.")(_metrics)
    command(app, "doctor", help="What this machine can enforce, with remedies; works without an instance.")(_doctor)
    group = typer.Typer(help="Cells: make, use and free them.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="cell")
    settings = {"allow_interspersed_args": False}
    command(group, "explain", help=_EXPLAIN, context_settings=settings)(_explain)
    images.register_cell(group)
    cells.register(group)
    example = '\n\n\b\nExample:\n  eval "$(aether completion bash)"'
    app.command("completion", help="Print a shell completion script." + example)(_completion)


def _up(
    session: Session,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, and log to stderr.")] = False,
) -> int:
    from aether.cli.output import progress
    from aether.daemons.control import up

    if foreground:
        return up(session.state_dir, True)
    with progress("starting an instance") as update:
        return up(session.state_dir, False, update)


def _down(session: Session) -> int:
    from aether.cli.output import progress
    from aether.daemons.control import down

    with progress("stopping the instance"):
        return down(session.state_dir)


def _health(session: Session) -> int:
    from aether.cli.output import show_fields, show_json, show_table
    from aether.contract.errors import EXIT_FAILED

    with session.client() as client:
        health = client.health()
    if session.as_json:
        show_json(health)
    else:
        shown = ("status", "version", "api_version", "node_id", "tenant_id", "principal", "uptime_s")
        show_fields([(name, getattr(health, name)) for name in shown])
        show_table(("ROLE", "OK", "VERSION", "REASON"), [(r.role, r.ok, r.version, r.reason) for r in health.roles])
    return 0 if health.status == "ok" else EXIT_FAILED


def _metrics(session: Session) -> None:
    from aether.cli.output import show_json

    with session.client() as client:
        text = client.metrics()
    show_json({"text": text}) if session.as_json else print(text, end="")


def _doctor(session: Session) -> int:
    from aether.cli.output import show_json, show_table
    from aether.contract.errors import EXIT_FAILED

    with session.client() as client:
        checks: Sequence[dict[str, Any]] = client.doctor().checks if client.reachable() else _probe_here()
    if session.as_json:
        show_json({"checks": checks})
    else:
        columns = ("CHECK", "OK", "VALUE", "REASON", "REMEDY")
        keys = ("name", "ok", "value", "reason", "remedy")
        show_table(columns, [[_cell(check.get(key)) for key in keys] for check in checks])
    return 0 if all(check.get("ok") for check in checks) else EXIT_FAILED


def _cell(value: Any) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return None if value is None else str(value)


def _probe_here() -> Sequence[dict[str, Any]]:
    """The same checks as the spawner's own, by this process with this user's privilege."""
    from aether.spawner.linux.probe import checks

    return checks()


def _explain(
    session: Session,
    argv: Annotated[list[str], typer.Argument(metavar="-- CMD", help="The command.")],
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory bound: 256M.")] = None,
    require: Annotated[list[str] | None, typer.Option(metavar="LEVEL", help="A level it must have.")] = None,
    driver: bounds.Driver = None,
) -> None:
    import json

    from aether.cli.instance import ensure_instance
    from aether.cli.output import show_json
    from aether.cli.parse import size_bytes
    from aether.cli.terminal import printable
    from aether.contract.cells import Limits
    from aether.contract.jobs import CommandParams

    limits = Limits(memory_bytes=size_bytes(memory)) if memory else Limits()
    params = CommandParams(argv=tuple(argv), limits=limits, require=tuple(bounds.required(require, driver)))
    with session.client() as client:
        ensure_instance(session, client)
        explanation = client.explain(params)
    if session.as_json:
        show_json(explanation)
        return
    for line in explanation.lines:
        print(printable(line))
    for mechanism, reason in explanation.missing.items():
        print(f"missing: {printable(mechanism)}: {printable(reason)}")
    if explanation.bundle is not None:
        print("config.json:")
        print(json.dumps(explanation.bundle, indent=2))


def _completion(shell: Annotated[str, typer.Argument(help="bash, zsh or fish.")] = "bash") -> None:
    from typer._completion_shared import get_completion_script

    if shell not in ("bash", "zsh", "fish"):
        raise typer.BadParameter("one of bash, zsh, fish")
    print(get_completion_script(prog_name="aether", complete_var="_AETHER_COMPLETE", shell=shell))
