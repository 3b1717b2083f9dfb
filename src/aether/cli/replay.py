"""`aether job replay`: the same input once more, and whether the same came out."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from aether.cli import approvals
from aether.cli.session import Session

HELP: Final = """Run a finished job once more and compare what it left.

The exit code is 0 when every output has the same digest, 1 when some differ: their paths are printed.

\b
Examples:
  aether job replay JOB
  aether job replay JOB --allow-effects --json
"""


def replay(
    session: Session,
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="A finished job.")],
    allow_effects: Annotated[
        bool, typer.Option("--allow-effects", help="Also a job that had a network, or ran in an allocated cell.")
    ] = False,
    approval: approvals.Wait = None,
) -> int:
    """0 when the outputs agree, else 1."""
    from aether.cli.output import progress, show_json
    from aether.client.compare import compare

    with session.client() as client:
        first = client.get(job_id)
        again = client.replay(job_id, allow_effects=allow_effects, approval_ms=approvals.wait_ms(approval))
        if not session.as_json:
            approvals.tell(again)
        with progress("replaying the job"):
            found = compare(client, first, client.wait(again.job_id))
    if session.as_json:
        show_json(found)
    else:
        print(f"{found.job_id} {'differs' if found.differs else 'agrees'}")
        for path in found.differs:
            print(f"  {path}")
    return 1 if found.differs else 0
