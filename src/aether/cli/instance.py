"""Starting the instance that a command needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aether.cli.session import Session

if TYPE_CHECKING:
    from aether.client import Client


def ensure_instance(session: Session, client: Client) -> None:
    """Starts the instance of the state directory when nobody listens; one named by its socket or asked for with a
    certificate is left alone."""
    if session.socket is not None or session.identity is not None or client.reachable():
        return
    from aether.cli.output import progress
    from aether.daemons.control import ensure_running

    with progress("starting an instance") as update:
        ensure_running(session.state_dir, update)
