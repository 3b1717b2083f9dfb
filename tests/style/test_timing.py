"""Tags, keys and digests of secrets are compared in constant time: `==` tells by its time how much was guessed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src/aether"
PARTS = ("substrate/access", "egress", "contract/tickets.py", "substrate/ticketdesk.py", "substrate/repeats.py")
SECRET = re.compile(r"(^|_)(tag|tags|secret|secrets|token|tokens|mac|password|api_key|private_key|secret_digest)$")
FILES = sorted(file for file in SOURCES.rglob("*.py") if str(file.relative_to(SOURCES)).startswith(PARTS))


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Call):
        return name_of(node.func)
    return node.id if isinstance(node, ast.Name) else ""


def naive(source: str) -> list[int]:
    """Lines that compare something named like a secret with == or !=, but with a constant."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Compare) or not isinstance(node.ops[0], ast.Eq | ast.NotEq):
            continue
        sides = (node.left, *node.comparators)
        if not any(isinstance(side, ast.Constant) for side in sides) and any(SECRET.search(name_of(s)) for s in sides):
            found.append(node.lineno)
    return found


def test_the_check_sees_what_it_should() -> None:
    assert naive("ok = key_tag == parts.tag\nfine = kind == 'token'\nbad = self.secret != other") == [1, 3]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_secrets_are_not_compared_byte_by_byte(file: Path) -> None:
    assert naive(file.read_text()) == [], f"use hmac.compare_digest in {file.name}"


def test_tags_of_tickets_are_compared_in_constant_time() -> None:
    assert "hmac.compare_digest(key, parts.tag)" in (SOURCES / "substrate/access/tickets.py").read_text()
