"""The pages of the project as the documentation tests read them: text, links, code spans, tables, named tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
SRC: Final = ROOT / "src/aether"
TOP_PAGES: Final = ("README.md", "ARCHITECTURE.md", "SPECIFICATION.md", "HACKING.md", "packages/README.md")

_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)
_TEST = re.compile(r"tests/[\w/.-]+\.py(?:::\w+)*")
_MARK_UP = re.compile(r"[^\w\- ]")


@cache
def pages() -> tuple[Path, ...]:
    """Every page that is written by hand or generated for readers."""
    top = [ROOT / name for name in TOP_PAGES if (ROOT / name).exists()]
    return (*top, *sorted((ROOT / "docs").rglob("*.md")))


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """The text without fenced blocks."""
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    return _LINK.findall(_SPAN.sub("", prose(text)))


def code_spans(text: str) -> list[str]:
    return _SPAN.findall(prose(text))


def code(text: str) -> list[str]:
    """Every piece of code: spans, and the lines of fenced blocks."""
    blocks = [line for block in _FENCE.finditer(text) for line in block[0].splitlines()[1:-1]]
    return [*code_spans(text), *blocks]


def anchors(text: str) -> set[str]:
    """Anchors as GitHub makes them: lower case, punctuation dropped, spaces as hyphens."""
    return {_MARK_UP.sub("", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(prose(text))}


def tables(text: str) -> Iterator[list[list[str]]]:
    """Each table as rows of cells, its head first, without the line of dashes."""
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                rows.append(cells)
        elif rows:
            yield rows
            rows = []


def table_with(text: str, *heads: str) -> list[list[str]]:
    """The rows below the first table whose head starts with `heads`."""
    for rows in tables(text):
        if rows[0][: len(heads)] == list(heads):
            return rows[1:]
    raise AssertionError(f"no table with the columns {', '.join(heads)}")


def named_tests(text: str) -> list[str]:
    """`tests/a/test_b.py` and `tests/a/test_b.py::test_c`, wherever they stand."""
    return _TEST.findall(text)


def missing_test(named: str) -> str | None:
    """Why a named test does not exist; None when it does."""
    file, *parts = named.split("::")
    path = ROOT / file
    if not path.is_file():
        return f"{file} does not exist"
    scope: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for part in parts:
        found = [
            node
            for node in scope
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == part
        ]
        if not found:
            return f"{file} has no {part}"
        scope = found[0].body
    return None


def decorators(named: str) -> set[str]:
    """The names of what decorates a named test function: `given`, `parametrize`."""
    file, _, function = named.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    calls = [each.func if isinstance(each, ast.Call) else each for node in found for each in node.decorator_list]
    return {
        call.attr if isinstance(call, ast.Attribute) else call.id
        for call in calls
        if isinstance(call, ast.Name | ast.Attribute)
    }
