"""Tables that state what the project has are compared with what it has."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from aether.contract import limits
from tests.docs import docpages, limits_table

STATUSES = {"real", "protocol-mock", "untested"}
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(.*)")


def project() -> dict[str, Any]:
    return tomllib.loads(docpages.page("pyproject.toml"))


def pairs(requirements: list[str]) -> set[tuple[str, str]]:
    """(name, constraint) of each requirement."""
    found = set()
    for text in requirements:
        match = _REQUIREMENT.fullmatch(text)
        assert match is not None, text
        found.add((match[1], match[2]))
    return found


def section(text: str, heading: str) -> str:
    _, found, rest = text.partition(f"## {heading}\n")
    assert found, f"no section {heading!r}"
    return rest.partition("\n## ")[0]


def unquoted(cell: str) -> str:
    return cell.strip("`")


@pytest.mark.parametrize(
    ("heading", "of"),
    [
        ("Base", lambda p: p["project"]["dependencies"]),
        ("Extra `age`", lambda p: p["project"]["optional-dependencies"]["age"]),
        ("Extra `spire`", lambda p: p["project"]["optional-dependencies"]["spire"]),
        ("Extra `train`", lambda p: p["project"]["optional-dependencies"]["train"]),
        ("Extra `dev`", lambda p: p["project"]["optional-dependencies"]["dev"]),
    ],
)
def test_every_dependency_is_explained(heading: str, of: Any) -> None:
    rows = docpages.table_with(section(docpages.page("docs/dependencies.md"), heading), "package", "constraint")
    assert {(unquoted(row[0]), unquoted(row[1])) for row in rows} == pairs(of(project()))
    for row in rows:
        assert row[2], f"{row[0]} has no licence"


def test_build_requirements_are_explained() -> None:
    text = section(docpages.page("docs/dependencies.md"), "Build and native tool chain")
    named = {unquoted(row[0]): unquoted(row[1]) for row in docpages.table_with(text, "tool", "constraint")}
    for name, constraint in pairs(project()["build-system"]["requires"]):
        assert named.get(name) == constraint


def test_no_extra_is_unknown() -> None:
    assert set(project()["project"]["optional-dependencies"]) == {"age", "spire", "train", "dev"}


def test_limits_are_as_in_the_code() -> None:
    text = docpages.page("SPECIFICATION.md")
    written = text.partition(limits_table.BEGIN + "\n")[2].partition(limits_table.END)[0]
    assert written == limits_table.render(), "run `python tests/docs/limits_table.py`"


def test_the_limits_table_is_whole() -> None:
    names = {name for name in vars(limits) if name.isupper()} - {"KIB", "MIB", "GIB"}
    assert {name for _, name, _, _ in limits_table.rows()} == names


def test_capabilities_name_tests_that_exist() -> None:
    rows = docpages.table_with(docpages.page("docs/capabilities.md"), "row", "how a user does it")
    assert rows
    for row in rows:
        status, named = unquoted(row[3]), docpages.named_tests(row[2])
        assert status in STATUSES, f"{row[0]}: {status!r}"
        assert bool(named) == (status != "untested"), f"{row[0]}: a status of {status} with {len(named)} tests"


def test_every_threat_names_a_test_or_says_that_there_is_none() -> None:
    text = docpages.page("docs/threat-model.md")
    found = [row for rows in docpages.tables(text) if rows[0][:1] == ["threat"] for row in rows[1:]]
    assert len(found) >= 30
    for row in found:
        assert len(row) == 3, row
        named = docpages.named_tests(row[2])
        assert named or row[2] in {"none yet", "measured, not promised"}, row[0]
        assert all("::test_" in test for test in named), f"{row[0]}: a file is no test"


def test_every_parser_of_foreign_bytes_has_a_property_test() -> None:
    rows = docpages.table_with(docpages.page("docs/threat-model.md"), "parser", "of whom")
    assert len(rows) >= 30
    for row in rows:
        named = docpages.named_tests(row[2])
        assert named and not any(map(docpages.missing_test, named)), row[0]
        assert any("given" in docpages.decorators(test) for test in named), f"{row[0]}: none is a property test"


@pytest.mark.parametrize("path", docpages.pages(), ids=lambda p: str(p.relative_to(docpages.ROOT)))
def test_named_tests_exist(path: Any) -> None:
    wrong = [why for named in docpages.named_tests(path.read_text()) if (why := docpages.missing_test(named))]
    assert not wrong, "; ".join(wrong)


DECISIONS = sorted((docpages.ROOT / "docs/adr").glob("[0-9]*.md"))


@pytest.mark.parametrize("path", DECISIONS, ids=lambda p: p.stem)
def test_a_decision_is_listed_and_says_what_it_costs(path: Any) -> None:
    text, index = path.read_text(), docpages.page("docs/adr/README.md")
    number, title = text.partition("\n")[0].removeprefix("# ").split(" ", 1)
    assert path.name.startswith(f"{number}-")
    assert f"| [{number}]({path.name}) | {title} |" in index
    for part in ("**Forced by.**", "**Chosen.**", "**Costs.**", "**Would change it.**"):
        assert f"\n{part}" in text, f"{path.name} has no {part}"


def test_decisions_are_numbered_without_gaps() -> None:
    assert [path.name[:4] for path in DECISIONS] == [f"{n:04}" for n in range(1, len(DECISIONS) + 1)]
