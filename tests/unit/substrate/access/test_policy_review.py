"""What a policy would decide: explanations, cases, differences, trials, slices."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.contract.errors import AetherError
from aether.contract.policycalls import Asking, Case
from aether.substrate.access.identity import Principal, principal_of
from aether.substrate.access.policy import Policy, Question
from aether.substrate.access.policytext import examine
from aether.substrate.access.review import asked, compare, locks_out, run_cases, verdicts
from aether.substrate.access.schema import schema
from aether.substrate.access.trial import PolicyTrial

NOON = 1_800_000_000_000_000_000
EXAMPLES = Path(__file__).parents[4] / "examples/policies"
USER = principal_of(1000, "default")


class Table(msgspec.Struct):
    cases: tuple[Case, ...]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.cedar")), ids=lambda path: path.stem)
def test_the_examples_decide_what_their_cases_say(path: Path) -> None:
    cases = msgspec.toml.decode(path.with_suffix(".cases.toml").read_bytes(), type=Table).cases
    found = run_cases(Policy.load(path.read_text()), cases, NOON)
    assert found.passed == len(cases) > 4 and not found.failed, [each for each in found.results if not each.passed]


def test_why_each_policy_applied_or_not() -> None:
    policy = Policy.load(
        """@id("reads") permit (principal, action in Action::"read", resource);
        @id("other-role") permit (principal in Role::"queen", action, resource);
        @id("other-kind") permit (principal, action, resource is Model);
        @id("by-night") forbid (principal, action == Action::"job.submit", resource)
        when { true } when { context.time.hour < 6 };
        @id("users") permit (principal in Role::"user", action, resource);
        @id("marked") forbid (principal, action, resource) when { context.labels.contains("x") };"""
    )
    asking = Asking(operation="job.submit", kind="command", labels=("x",), time="2026-09-21T12:00:00Z")
    decision, found = verdicts(policy, asking, NOON)
    assert not decision.allow and decision.determining == ("marked",)
    assert {each.policy: each.verdict for each in found} == {
        "reads": "action", "other-role": "principal", "other-kind": "resource", "by-night": "condition",
        "users": "applied", "marked": "decided",
    }  # fmt: skip
    assert "when clause 2" in found[3].why and "context.time" in found[3].why


def test_cases_that_fail_say_why() -> None:
    cases = [
        Case(operation="job.submit", kind="command", expect="deny"),
        Case(operation="job.submit", kind="command", expect="allow", policies=("operator",)),
        Case(operation="job.submit", kind="command", expect="allow", policies=("user-submit",)),
    ]
    found = run_cases(Policy.default(), cases, NOON)
    assert [each.why for each in found.results] == ["expected deny", "expected operator", ""]
    assert (found.passed, found.failed) == (1, 2)


@pytest.mark.parametrize(
    "asking",
    [
        Asking(operation="no.such"),
        Asking(operation="job.get", kind="cell"),
        Asking(operation="job.get", time="yesterday"),
        Asking(operation="job.get", time="9999-99-99T00:00:00Z"),
    ],
)
def test_what_no_policy_could_be_asked(asking: Asking) -> None:
    with pytest.raises(AetherError) as caught:
        asked(asking, NOON)
    assert caught.value.code == "BAD_FIELD"


def test_a_difference_names_policies_and_decisions() -> None:
    before = Policy.default()
    text = before.text.replace('@id("user-submit")', '@id("users-submit")').replace(
        'permit (principal in Role::"worker-gpu", action in Action::"read", resource);',
        'permit (principal in Role::"worker-gpu", action == Action::"job.get", resource);',
    )
    text += '@id("auditor") permit (principal in Role::"auditor", action in Action::"read", resource);'
    found = compare(before, Policy.load(text), NOON)
    assert found.added == ("auditor", "users-submit") and found.removed == ("user-submit",)
    assert found.changed == ("worker-gpu",)
    roles = {change.role for change in found.decisions}
    assert roles == {"auditor", "worker-gpu"}
    assert all(change.after == ("allow" if change.role == "auditor" else "deny") for change in found.decisions)
    assert not compare(before, before, NOON).decisions


def test_who_could_load_another_policy() -> None:
    root = (principal_of(0, "default"), "queen")
    assert not locks_out(Policy.default(), [root], NOON)
    assert locks_out(Policy.load('permit (principal in Role::"user", action, resource);'), [root], NOON)


def test_a_trial_decides_for_its_share_alone() -> None:
    current, candidate = Policy.default(), Policy.load("")
    question = Question("job.submit", "command")
    people = [principal_of(uid, "default") for uid in range(2000)]
    enforced = PolicyTrial(current, candidate, 25, "enforced")
    chosen = [p for p in people if enforced.chosen(p)]
    assert 400 < len(chosen) < 600
    for person in (chosen[0], next(p for p in people if not enforced.chosen(p))):
        decision = enforced.decide(person, "user", question, NOON)
        assert decision.allow is not enforced.chosen(person)
        assert decision.digest == (candidate if enforced.chosen(person) else current).digest
    shadow = PolicyTrial(current, candidate, 25, "shadow").decide(chosen[0], "user", question, NOON)
    assert shadow.allow and shadow.digest == current.digest
    assert shadow.shadow is not None and not shadow.shadow.allow and shadow.shadow.digest == candidate.digest


SCOPES = st.tuples(
    st.sampled_from(["principal", 'principal in Role::"user"', 'principal in Tenant::"t"', "principal is Principal",
                     'principal == Principal::"uid:7"', 'principal is Principal in Role::"queen"']),
    st.sampled_from(["action", 'action == Action::"job.submit"', 'action in Action::"read"',
                     'action in [Action::"job.get", Action::"control"]']),
    st.sampled_from(["resource", "resource is Model", 'resource in Tenant::"t"', 'resource is Job in Tenant::"t"',
                     'resource == Model::"m"', 'resource in Model::"m"', 'resource == Job::"j"']),
)  # fmt: skip
CONDITIONS = st.sampled_from(
    [
        "", 'when { context.labels.contains("a") }', "when { context.time.hour < 12 }", 'when { context.op == "run" }',
        "when { resource has owner && resource.owner == principal }", 'unless { resource in Tenant::"t" }',
        'when { resource.labels.contains("a") }', "when { principal.tenant == Tenant::\"t\" }",
        "when { context.hosts.isEmpty() }", 'when { resource == Model::"m" || context.kind == "x" }',
        'when { (if context.op == "" then resource else resource) in Tenant::"t" }',
        'when { {a: context}.a.model == "m@1" }', 'unless { [context.id, "z"].contains("j") }',
    ]
)  # fmt: skip
RULES = st.tuples(st.sampled_from(["permit", "forbid"]), SCOPES, CONDITIONS)
ASKED = st.builds(
    Question,
    st.just("job.submit"), st.sampled_from(["model", "command"]),
    op=st.sampled_from([None, "run"]), model=st.sampled_from([None, "m", "m@1", "n"]),
    labels=st.sampled_from([(), ("a",)]), owner=st.sampled_from([None, "uid:7"]), tenant=st.sampled_from([None, "t"]),
    hosts=st.sampled_from([None, ("h",)]),
) | st.builds(
    Question, st.just("job.get"), st.just("job"), id=st.sampled_from([None, "j"]),
    owner=st.sampled_from([None, "uid:7", "uid:8"]), tenant=st.sampled_from([None, "t", "u"]),
)  # fmt: skip
PEOPLE = st.sampled_from([Principal("uid:7", "t", "user", 7), Principal("uid:8", "u", "user", 8)])


@settings(deadline=None, max_examples=40)
@given(st.lists(RULES, min_size=1, max_size=6), st.lists(st.tuples(PEOPLE, ASKED), min_size=1, max_size=8))
def test_a_slice_and_the_cache_decide_what_the_whole_set_does(
    rules: list[tuple[str, tuple[str, str, str], str]], questions: list[tuple[Principal, Question]]
) -> None:
    """Against a decision by every rule, uncached, that is told everything."""
    texts = [f"{effect} ({', '.join(scope)}) {condition};" for effect, scope, condition in rules]
    texts = [text for text in texts if not examine(text)[1]]
    policy = Policy.load("\n".join(texts))
    everything = Policy.load("\n".join([*texts, READS_ALL]))
    for person, question in questions * 2:
        for role in ("user", "queen"):
            quick = policy.decide(person, role, question, NOON)
            whole = everything.decide_by(everything.rules, person, role, question, NOON)
            assert (quick.allow, quick.determining) == (whole.allow, tuple(n for n in whole.determining if n != "all"))


READS_ALL = '@id("all") forbid (principal, action, resource) when { context == context && resource.id == "no such" };'


def test_every_kind_that_the_authority_asks_about_has_a_type() -> None:
    pattern = re.compile(r'(?:kind=|_KIND(?:: Final)? = )"([a-z]+)"')
    source = Path(__file__).parents[4] / "src/aether/substrate"
    kinds = {kind for path in source.rglob("*.py") for kind in pattern.findall(path.read_text())}
    types = {each.lower() for found in schema().types.values() for each in found}
    assert kinds - {"user", "node"} <= types, kinds - types
