"""The `aether` command. Modules here import nothing heavy at the top: `aether --help` is a promise of 200 ms."""

from __future__ import annotations

import os
from typing import Final

import typer

from aether.cli import (
    approvals,
    artifacts,
    audit,
    budgets,
    images,
    jobs,
    keys,
    models,
    network,
    node,
    pki,
    policy,
    run,
    tickets,
)

_HELP: Final = """AetherOS: run jobs in auditable, sandboxed cells.

\b
Examples:
  aether run -- echo hello
  aether run --file main.py --output out.csv --memory 256M -- python3 main.py
  aether predict pendulum --input traj.json --horizon 0.1 0.5
  aether ps
  aether verify receipt.json --key audit.pub

An instance of your own is started when none is up. Every command takes --json; exit codes are in docs/errors.md.
"""


def build() -> typer.Typer:
    """The whole command tree."""
    app = typer.Typer(
        name="aether",
        help=_HELP,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    for part in (
        run,
        jobs,
        models,
        images,
        artifacts,
        audit,
        network,
        tickets,
        keys,
        pki,
        policy,
        budgets,
        approvals,
        node,
    ):
        part.register(app)
    return app


def main() -> None:
    """Entry point of the console script."""
    if "_AETHER_COMPLETE" in os.environ:
        from typer._completion_classes import completion_init

        completion_init()
    build()(prog_name="aether")


if __name__ == "__main__":
    main()
