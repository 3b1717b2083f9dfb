"""What every command shares: `--json`, `--ticket`, `--identity`, `--state`, `--socket`, `--idempotency-key`; the
client; errors.

`@command(app, name)` adds these options to a function whose first parameter is a Session.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, get_type_hints

import typer

if TYPE_CHECKING:
    from aether.client import Client

_OPTIONS: Final[dict[str, tuple[Any, Any]]] = {
    "as_json": (Annotated[bool, typer.Option("--json", help="Print JSON.")], False),
    "ticket": (
        Annotated[
            str | None,
            typer.Option(envvar="AETHER_TICKET", metavar="TICKET", help="A ticket, an API key or a token."),
        ],
        None,
    ),
    "identity": (
        Annotated[
            Path | None, typer.Option(envvar="AETHER_IDENTITY", metavar="DIR", help="A certificate, from pki issue.")
        ],
        None,
    ),
    "state": (
        Annotated[Path | None, typer.Option(envvar="AETHER_STATE", metavar="DIR", help="The instance's directory.")],
        None,
    ),
    "idempotency_key": (
        Annotated[
            str | None,
            typer.Option(
                "--idempotency-key", metavar="KEY", help="Repeated with the same KEY within minutes, it is done once."
            ),
        ],
        None,
    ),
    "socket": (
        Annotated[Path | None, typer.Option(metavar="PATH", help="The instance's socket, instead of --state.")],
        None,
    ),
}


@dataclass(frozen=True, slots=True)
class Session:
    """The shared options as given."""

    as_json: bool
    ticket: str | None
    state: Path | None
    socket: Path | None
    idempotency_key: str | None = None
    identity: Path | None = None

    @property
    def state_dir(self) -> Path:
        from aether.contract.paths import state_dir

        return self.state.absolute() if self.state else state_dir(os.environ, os.geteuid(), Path.home())

    def client(self) -> Client:
        """A client of the chosen instance; nothing is connected yet."""
        from aether.client import Client

        return Client(
            self.socket,
            state=self.state_dir,
            ticket=self.ticket,
            identity=self.identity,
            idempotency_key=self.idempotency_key,
        )


def command(app: typer.Typer, name: str, **settings: Any) -> Callable[[Callable[..., int | None]], Callable[..., None]]:
    """Registers a command. Its function may return an exit code; an AetherError becomes message, remedy, code."""

    def register(function: Callable[..., int | None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            session = Session(**{option: given.pop(option) for option in _OPTIONS})
            raise typer.Exit(_outcome(function, session, given))

        hints = get_type_hints(function, include_extras=True)
        own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(function).parameters.values()][1:]
        shared = [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for option, (annotation, default) in _OPTIONS.items()
        ]
        parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *shared]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name, **settings)(run)
        return run

    return register


def _outcome(function: Callable[..., int | None], session: Session, given: dict[str, Any]) -> int:
    from aether.contract.errors import AetherError

    try:
        code = function(session, **given)
        sys.stdout.flush()
        return code or 0
    except AetherError as error:
        from aether.cli.output import show_error

        show_error(error, as_json=session.as_json)
        return error.kind.exit
    except BrokenPipeError:
        # The reader of a pipe left (`| head`): what is still buffered has nowhere to go (signal(3) in python's docs).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
