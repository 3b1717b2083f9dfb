"""Policy text: its bounds, what is wrong with it and where, and the rules that it holds. Pure.

Cedar's parser and validator recurse, natively and without a bound: text that nests a thousand parentheses, or joins
ten thousand terms, overflows the stack and ends the process. So text is scanned first, by tokens, and refused beyond
limits that lie far below that. The scan also tells where a policy stands, which Cedar's messages do not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import cedarpy

from aether.contract import limits
from aether.contract.canonical import digest_bytes
from aether.contract.errors import AetherError
from aether.contract.policycalls import Checked, Problem
from aether.substrate.access.rules import Rule, rules_of
from aether.substrate.access.schema import schema

# https://docs.cedarpolicy.com/policies/syntax-grammar.html: comments, strings, words, numbers, signs
_TOKEN: Final = re.compile(r'//[^\n]*|"(?:[^"\\\n]|\\.|\n)*"|[A-Za-z_0-9]+|\s+|&&|\|\||[=!<>]=|::|.', re.DOTALL)
_SPACE: Final = re.compile(r"//|\s")
_OPEN: Final = frozenset("([{")
_CLOSE: Final = frozenset(")]}")
_PROBLEMS_MAX: Final = 50
_TOKEN_FAULTS: Final = ("unexpected token", "invalid token")
_INCOMPLETE: Final = "unexpected end of input"


@dataclass(frozen=True, slots=True)
class _Statement:
    """One policy's text: where it begins, and where each of its tokens does; `depth` is how deep its brackets nest."""

    start: int
    end: int
    tokens: tuple[int, ...]
    depth: int


def parse(text: str) -> tuple[Rule, ...]:
    """The rules of a policy set that may be loaded; raises AetherError BAD_POLICY with the first problem."""
    rules, problems = examine(text)
    if problems:
        first = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        where = f"line {first.line}, column {first.column}"
        named = f" ({first.policy})" if first.policy else ""
        raise AetherError(
            "BAD_POLICY",
            f"cannot load the policy: {where}{named}: {first.message}{more}",
            details={"line": first.line, "column": first.column},
        )
    return rules


def checked(text: str) -> Checked:
    """What is wrong with a policy's text, or the names of what it holds. Pure."""
    rules, problems = examine(text)
    return Checked(
        ok=not problems,
        digest=digest_bytes(text.encode(errors="replace")),
        policies=() if problems else tuple(rule.name for rule in rules),
        problems=problems,
    )


def examine(text: str) -> tuple[tuple[Rule, ...], tuple[Problem, ...]]:
    """The rules, or what is wrong: bounds, then syntax, then names, then the schema."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        return (), (_problem(text, error.start, "not Unicode text: an unpaired surrogate"),)
    if size > limits.POLICY_BYTES_MAX:
        return (), (_problem(text, 0, f"longer than {limits.POLICY_BYTES_MAX} bytes"),)
    statements = tuple(_statements(text))
    problems = tuple(_bounds(text, statements)) or tuple(_syntax(text, statements))
    if problems:
        return (), problems[:_PROBLEMS_MAX]
    try:
        document = json.loads(cedarpy.policies_to_json_str(text))
    except (ValueError, RecursionError) as error:
        return (), (_problem(text, 0, str(error)),)
    rules = rules_of(document["staticPolicies"])
    problems = tuple(_names(text, rules, statements, bool(document["templates"]))) or tuple(
        _misfits(text, rules, statements)
    )
    return rules, problems[:_PROBLEMS_MAX]


def _statements(text: str) -> Iterator[_Statement]:
    tokens: list[int] = []
    depth = deepest = 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if _SPACE.match(token):
            continue
        tokens.append(match.start())
        depth += (token in _OPEN) - (token in _CLOSE)
        deepest = max(deepest, depth)
        if token == ";" and depth <= 0:
            yield _Statement(tokens[0], match.end(), tuple(tokens), deepest)
            tokens, depth, deepest = [], 0, 0
    if tokens:
        yield _Statement(tokens[0], len(text), tuple(tokens), deepest)


def _bounds(text: str, statements: tuple[_Statement, ...]) -> Iterator[Problem]:
    if len(statements) > limits.POLICY_RULES_MAX:
        yield _problem(text, statements[limits.POLICY_RULES_MAX].start, f"more than {limits.POLICY_RULES_MAX} policies")
    for statement in statements:
        if statement.depth > limits.POLICY_DEPTH_MAX:
            yield _problem(text, statement.start, f"brackets nest deeper than {limits.POLICY_DEPTH_MAX}")
        if len(statement.tokens) > limits.POLICY_TOKENS_MAX:
            yield _problem(text, statement.start, f"a policy of more than {limits.POLICY_TOKENS_MAX} words and signs")


def _syntax(text: str, statements: tuple[_Statement, ...]) -> Iterator[Problem]:
    for statement in statements:
        why = _fault(text[statement.start : statement.end])
        if why is not None:
            yield _problem(text, _fault_at(text, statement, why), why)


def _fault(text: str) -> str | None:
    try:
        cedarpy.PolicySet.from_str(text)
    except ValueError as error:
        return str(error)
    return None


def _fault_at(text: str, statement: _Statement, why: str) -> int:
    """Where the first token stands that no policy could go on with: up to it the text is merely incomplete."""
    if why == _INCOMPLETE:
        return statement.end
    ends = (*statement.tokens[1:], statement.end)
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        if _fault(text[statement.start : ends[middle]]) in (None, _INCOMPLETE):
            low = middle + 1
        else:
            high = middle
    if not why.startswith(_TOKEN_FAULTS):
        return statement.start  # of the policy as a whole: an effect of that name, too many negations
    # the parser may look one token ahead before it says so
    begin = statement.tokens[low - 1] if low else 0
    return (
        begin
        if low and why == f"unexpected token `{text[begin : statement.tokens[low]].strip()}`"
        else statement.tokens[low]
    )


def _names(
    text: str, rules: tuple[Rule, ...], statements: tuple[_Statement, ...], templates: bool
) -> Iterator[Problem]:
    if templates:
        yield _problem(text, 0, "a template (?principal, ?resource) is not linked to anybody here: write a policy")
        return
    seen: set[str] = set()
    for rule, statement in zip(rules, statements, strict=True):
        if rule.name in seen:
            yield _problem(text, statement.start, f"a second policy with the @id {rule.name!r}", rule.name)
        if len(rule.name) > limits.POLICY_NAME_CHARS_MAX or not rule.name.isprintable():
            why = f"an @id is at most {limits.POLICY_NAME_CHARS_MAX} printable characters"
            yield _problem(text, statement.start, why)
        seen.add(rule.name)


def _misfits(text: str, rules: tuple[Rule, ...], statements: tuple[_Statement, ...]) -> Iterator[Problem]:
    found = cedarpy.validate_policies(text, schema().handle, release_gil=True)
    by_key = {rule.key: (rule, statement) for rule, statement in zip(rules, statements, strict=True)}
    for error in found.errors:
        why = error.error.removeprefix(f"for policy `{error.policy_id}`, ")
        if error.policy_id in by_key:
            rule, statement = by_key[error.policy_id]
            yield _problem(text, statement.start, why, rule.name)
        else:
            yield _problem(text, 0, why)
    if not found.validation_passed and not found.errors:
        yield _problem(text, 0, "it does not fit the schema")


def _problem(text: str, at: int, why: str, policy: str = "") -> Problem:
    line = text.count("\n", 0, at) + 1
    column = at - (text.rfind("\n", 0, at) + 1) + 1
    return Problem(line=line, column=column, message=why, policy=policy)
