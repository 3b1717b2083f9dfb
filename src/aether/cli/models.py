"""`aether predict | score | encode` and `aether model list`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aether.cli.session import Session, command

if TYPE_CHECKING:
    from aether.client import Client

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model id, or id@version.")]
Input = Annotated[Path, typer.Option("--input", metavar="FILE", help="A JSON file; - is stdin.")]

_PREDICT = """Predict the state at one or more horizons (seconds).

The input holds {t, obs, action}: n times, n observations, n-1 or n actions, the last of which is held; or
{history: {t, obs, action}, action}.

\b
Example:
  aether predict pendulum --input traj.json --horizon 0.1 0.5
"""


def register(app: typer.Typer) -> None:
    """Adds the model commands."""
    command(app, "predict", help=_PREDICT)(_predict)
    example = "\n\n\b\nExample:\n  aether score pendulum --input traj.json"
    command(app, "score", help="Score a sequence {t, obs, action}: energy, surprise, p-value." + example)(_score)
    command(app, "encode", help="Encode observations {obs} into latent states.")(_encode)
    group = typer.Typer(help="The installed models.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="model")
    command(group, "list", help="List the installed models.")(_list)


def _predict(
    session: Session,
    model: Model,
    source: Input,
    horizon: Annotated[
        list[str], typer.Option(metavar="SECONDS", help="Seconds ahead; more may follow, or repeat it.")
    ],
    more: Annotated[list[str] | None, typer.Argument(metavar="SECONDS", help="More horizons.")] = None,
) -> None:
    from aether.cli.parse import horizons_s
    from aether.cli.trajectory import prediction

    wanted = horizons_s([*horizon, *(more or [])])
    history, held = prediction(_read(source))
    _infer(session, lambda client: client.predict(model, history, wanted, action=held))


def _score(session: Session, model: Model, source: Input) -> None:
    from aether.cli.trajectory import sequence

    inputs = sequence(_read(source))
    _infer(session, lambda client: client.score(model, inputs))


def _encode(session: Session, model: Model, source: Input) -> None:
    inputs = _read(source)
    _infer(session, lambda client: client.encode(model, inputs))


def _infer(session: Session, ask: Callable[[Client], Any]) -> None:
    """A result is data: it is JSON with and without `--json`."""
    from aether.cli.instance import ensure_instance
    from aether.cli.output import progress, show_json

    with session.client() as client:
        ensure_instance(session, client)
        with progress("waiting for the model"):
            result = ask(client)
    show_json(result)


def _read(source: Path) -> dict[str, Any]:
    import msgspec

    from aether.contract.errors import AetherError

    try:
        data = sys.stdin.buffer.read() if str(source) == "-" else source.read_bytes()
        value = msgspec.json.decode(data, type=dict[str, Any])
    except OSError as error:
        raise AetherError("BAD_FIELD", f"cannot read {source}: {error.strerror}", "name a JSON file") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AetherError("BAD_JSON", f"cannot read {source}: {error}") from error
    return value


def _list(session: Session) -> None:
    from aether.cli.output import show_json, show_table

    with session.client() as client:
        found = client.models()
    if session.as_json:
        show_json(found)
        return
    rows = [(m.model_id, m.version, m.state, ", ".join(m.ops), m.digest[:19]) for m in found.models]
    show_table(("MODEL", "VERSION", "STATE", "OPERATIONS", "DIGEST"), rows)
