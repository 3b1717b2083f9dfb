"""Policy text: where it is wrong, its bounds, what is told of a policy without evaluating it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract import limits
from aether.contract.policycalls import Case
from aether.substrate.access.policy import Policy
from aether.substrate.access.policytext import checked, examine, parse
from aether.substrate.access.review import run_cases
from aether.substrate.access.schema import schema

NOON = 1_800_000_000_000_000_000
WORDS = """permit forbid ( ) { } [ ] ; , principal action resource in == is when unless context . labels has like @id
Role:: "user" Action:: // ("x") contains ?principal ip "a*" " 1 - ! && || if then else é"""
TEXTS = st.lists(st.sampled_from([*WORDS.split(), "\n", "\0"]), max_size=60).map(" ".join)


@pytest.mark.parametrize(
    ("text", "line", "column", "says"),
    [
        ("permit (principal, action, resource", 1, 36, "unexpected end"),
        ("permit (principal, action, resource);\n\n  foo (principal);", 3, 3, "invalid policy effect"),
        ("permit (principal, action, resource)\nwhen { context.labels.contains( };", 2, 33, "unexpected token `}`"),
        ('@id("a")\npermit (principal action, resource);', 2, 19, "unexpected token `action`"),
        ('permit (principal, action == Action::"no.such", resource);', 1, 1, "unrecognized action"),
        (
            '// says ";" and "\n@id("a") permit (principal, action, resource)\nwhen { context.x };',
            2,
            1,
            "attribute `x`",
        ),
        (
            '@id("a") permit (principal, action, resource);\n@id("a") forbid (principal, action, resource);',
            2,
            1,
            "second",
        ),
        ("permit (principal in ?principal, action, resource);", 1, 1, "template"),
        ('permit (principal, action == Action::"job.get", resource is Cell);', 1, 1, "applicable action"),
        ("permit (principal, action, resource) when { resource.owner == principal };", 1, 1, "optional attribute"),
    ],
)
def test_problems_say_where(text: str, line: int, column: int, says: str) -> None:
    problem = checked(text).problems[0]
    assert (problem.line, problem.column) == (line, column) and says in problem.message


@pytest.mark.parametrize(
    "condition",
    [
        "(" * 100_000 + "true" + ")" * 100_000,
        "(" * 30_000 + "true",
        "[" * 5_000,
        "1 + " * 50_000 + "1 == 1",
        "true && " * 20_000 + "true",
        "principal" + ".a" * 30_000,
        "!" * 60_000 + "true",
        "if true then true else " * 5_000 + "true",
    ],
)
def test_text_that_would_overflow_the_parser_is_refused(condition: str) -> None:
    rules, problems = examine(f"permit (principal, action, resource) when {{ {condition} }};")
    assert problems and not rules


def test_the_deepest_text_that_is_let_through_is_decided() -> None:
    deep = "(" * (limits.POLICY_DEPTH_MAX - 1) + "true" + ")" * (limits.POLICY_DEPTH_MAX - 1)
    assert len(parse(f"permit (principal, action, resource) when {{ {deep} }};")) == 1
    joined = " && ".join(["true"] * (limits.POLICY_TOKENS_MAX // 2 - 8))
    rules, problems = examine(f"permit (principal, action, resource) when {{ {joined} }};")
    assert rules or "recursion" in problems[0].message
    many = "permit (principal, action, resource);" * limits.POLICY_RULES_MAX
    assert len(parse(many)) == limits.POLICY_RULES_MAX
    assert "more than" in checked(many + "permit (principal, action, resource);").problems[0].message


@given(TEXTS | st.text(max_size=200))
def test_any_text_is_loaded_or_told_to_be_wrong(text: str) -> None:
    rules, problems = examine(text)
    assert not (rules and problems)
    assert all(problem.line >= 1 and problem.column >= 1 for problem in problems)
    if not problems:
        Policy.load(text)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: f'{{"cases": [{t}]}}'.encode("utf-8", "replace")))
def test_any_table_of_cases_is_run_or_refused(data: bytes) -> None:
    try:
        cases = msgspec.json.decode(data, type=dict[str, tuple[Case, ...]])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return
    for each in cases.values():
        run_cases(Policy.default(), each, NOON)


def test_the_schema_in_cedars_syntax_says_the_same() -> None:
    import cedarpy

    found = schema()
    again = cedarpy.Schema.from_str(found.text())
    assert str(again).replace("__cedar::", "") == str(found.handle).replace("__cedar::", "")
    assert cedarpy.validate_policies(Policy.default().text, again).validation_passed
