"""What a user can meet is documented, and nothing else is: operations, codes, environment, commands, states, paths."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from aether.api.operations import OPERATIONS
from aether.cli import main
from aether.contract import errors
from aether.contract.jobs import JobState
from aether.contract.paths import Layout
from tests.docs import docpages

VARIABLE = re.compile(r"\b(?:AETHER|SPIFFE)_[A-Z][A-Z0-9_]*\b")
# Set by the tests and the build, and no setting of the product.
NOT_SETTINGS = {"AETHER_LIBFUZZER"}
OPERATIONS_PAGE = "docs/operations.md"


def sources() -> Iterator[Path]:
    yield from sorted(docpages.SRC.rglob("*.py"))


def variables(files: Iterable[Path]) -> set[str]:
    return {name for path in files for name in VARIABLE.findall(path.read_text())} - NOT_SETTINGS


def commands() -> dict[str, Any]:
    """Every leaf command by its words, from the application itself."""
    application = main.build()
    found: dict[str, Any] = {}

    def walk(words: tuple[str, ...], command: Any) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            found[" ".join(words)] = command
            return
        for name, child in children.items():
            walk((*words, name), child)

    walk(("aether",), typer.main.get_command(application))
    return found


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_operation_is_documented(operation: Any) -> None:
    text = docpages.page("docs/api.md")
    assert f"## {operation.name}\n" in text
    assert f"`{operation.method} {operation.path}`" in text
    for alias in operation.aliases:
        assert f"`{alias}`" in text
    for param in operation.query:
        assert f"`?{param.name}=`" in text


def test_error_codes_are_documented_and_no_others() -> None:
    rows = docpages.table_with(docpages.page("docs/errors.md"), "code", "HTTP", "exit")
    assert {row[0].strip("`") for row in rows} == set(errors.KINDS)


def test_exit_codes_are_documented() -> None:
    rows = docpages.table_with(docpages.page(OPERATIONS_PAGE), "exit code")
    named = {row[0] for row in rows}
    for name, value in vars(errors).items():
        if name.startswith("EXIT_"):
            assert str(value) in named, f"{name} = {value}"


def test_environment_variables_are_documented_and_no_others() -> None:
    read = variables(sources())
    rows = docpages.table_with(docpages.page(OPERATIONS_PAGE), "variable")
    assert {row[0].strip("`") for row in rows} == read
    known = read | {
        name for path in (docpages.ROOT / "tests").rglob("*.py") for name in VARIABLE.findall(path.read_text())
    }
    for path in docpages.pages():
        for name in VARIABLE.findall(path.read_text()):
            assert name in known, f"{path.name} names {name}, which nothing reads"


def test_commands_are_documented_and_no_others() -> None:
    rows = docpages.table_with(docpages.page(OPERATIONS_PAGE), "command")
    assert {row[0].strip("`") for row in rows} == set(commands())


def mentioned(text: str) -> Iterator[str]:
    """Calls of `aether` in code, up to a pipe or a redirection."""
    for piece in docpages.code(text):
        line = re.sub(r"^(\$ |sudo )+", "", piece.strip())
        if line.startswith("aether "):
            yield re.split(r" [|>&#]|;", line)[0]


@pytest.mark.parametrize("path", docpages.pages(), ids=lambda p: str(p.relative_to(docpages.ROOT)))
def test_mentioned_commands_and_options_exist(path: Path) -> None:
    known = commands()
    groups = {" ".join(name.split()[:n]) for name in known for n in range(1, len(name.split()))}
    for line in mentioned(path.read_text()):
        before = line.partition(" -- ")[0].replace("...", " ").replace("[", " ").replace("]", " ")
        words = shlex.split(before.replace("'", " "))
        # the longest run of words that is a command
        for length in (3, 2):
            command = known.get(" ".join(words[:length]))
            if command is not None:
                break
        else:
            assert len(words) > 1 and (words[1] == "--help" or " ".join(words) in groups), f"{path.name}: {line}"
            continue
        options = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
        used = {word.partition("=")[0] for word in words[length:] if word.startswith("-") and word != "-"}
        assert used <= options, f"{path.name}: {line}: {used - options}"


def test_states_are_documented() -> None:
    text = docpages.page("docs/operations.md") + docpages.page("docs/api.md")
    for state in JobState:
        assert f"`{state}`" in text, state


def test_every_path_of_the_layout_is_documented() -> None:
    rows = docpages.table_with(docpages.page(OPERATIONS_PAGE), "path", "owner")
    named = {row[0].strip("`").rstrip("/") for row in rows}
    layout = Layout(Path("/"))
    for name, value in vars(Layout).items():
        if isinstance(value, property):
            path = str(value.fget(layout))[1:]  # type: ignore[misc]
            assert path in named, f"Layout.{name}: {path}"


def test_owners_and_modes_are_as_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of the state directory against `prepare`, which makes it."""
    from aether.daemons import accounts

    owners: dict[str, int] = {}
    monkeypatch.setattr(accounts.os, "chown", lambda path, uid, gid: owners.__setitem__(str(path), uid))
    who = accounts.Accounts(spawner=0, aetherd=1, aurorad=2, keeper=3, egressd=4, spired=5, gid=9, split=True)
    names = {0: "root", 1: "aetherd", 2: "aurorad", 3: "keeper", 4: "egressd", 5: "spired"}
    layout = Layout(tmp_path / "state")
    accounts.prepare(layout, who)
    rows = docpages.table_with(docpages.page(OPERATIONS_PAGE), "path", "owner", "mode")
    documented = {row[0].strip("`").rstrip("/"): (row[1], row[2]) for row in rows}
    for path, uid in owners.items():
        relative = str(Path(path).relative_to(layout.root))
        mode = f"{Path(path).stat().st_mode & 0o7777:04o}"
        assert documented.get(relative) == (names[uid], mode), f"{relative}: {names[uid]} {mode}"
