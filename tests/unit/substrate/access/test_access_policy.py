"""Policy: the default set's meaning, errors that deny, what may be cached."""

from __future__ import annotations

import pytest

from aether.contract.errors import AetherError
from aether.substrate.access.identity import Principal, node_principal, principal_of
from aether.substrate.access.policy import Policy, Question

NOON = 1_800_000_000_000_000_000
USER = principal_of(1000, "default")
DEFAULT = Policy.default()


@pytest.mark.parametrize(
    ("role", "question", "expected"),
    [
        ("queen", Question("job.submit", "command"), ("operator",)),
        ("queen", Question("policy.load", "policy"), ("operator",)),
        ("user", Question("job.submit", "command"), ("user-submit",)),
        ("user", Question("job.get", "job"), ("user-read",)),
        ("user", Question("job.stop", "job"), ("user-control",)),
        ("user", Question("policy.load", "policy"), None),
        ("user", Question("ticket.mint", "ticket"), ("user-control",)),
        ("user", Question("ticket.grant", "ticket", id="queen"), None),
        ("user", Question("no.such.operation", "node"), None),
        ("worker-heartbeat", Question("job.get", "job"), ("worker-heartbeat",)),
        ("worker-heartbeat", Question("job.submit", "model"), None),
        ("worker-gpu", Question("job.submit", "model"), ("worker-gpu-submit",)),
        ("worker-gpu", Question("job.submit", "command"), None),
        ("nobody", Question("health", "node"), ("anyone-open",)),
        ("nobody", Question("job.list", "job"), None),
        ("", Question("job.submit", "command"), None),
    ],
)
def test_default_policy(role: str, question: Question, expected: tuple[str, ...] | None) -> None:
    decision = DEFAULT.decide(USER, role, question, NOON)
    assert decision.allow is (expected is not None)
    assert decision.determining == (expected or ())
    assert decision.digest == DEFAULT.digest and decision.errors == ()
    assert DEFAULT.decide(USER, role, question, NOON) == decision


def test_the_node_may_only_start_its_workers() -> None:
    assert DEFAULT.decide(node_principal(), "node", Question("job.submit", "model"), NOON).allow
    assert not DEFAULT.decide(node_principal(), "node", Question("job.submit", "command"), NOON).allow


def test_a_forbid_outweighs_and_is_named() -> None:
    question = Question("job.submit", "provider", labels=("local-only",))
    decision = DEFAULT.decide(USER, "queen", question, NOON)
    assert (decision.allow, decision.determining) == (False, ("local-only-stays",))
    assert decision.outcome == "deny"
    assert DEFAULT.decide(USER, "queen", Question("job.submit", "provider"), NOON).allow


def test_an_error_denies_where_cedar_would_skip_it() -> None:
    # a forbid that overflows: Cedar alone would drop it and allow
    policy = Policy.load(
        """@id("all") permit (principal, action, resource);
        @id("sums") forbid (principal, action == Action::"job.submit", resource)
        when { (if context.op == "run" then 9223372036854775807 else 0) + 1 == 0 };"""
    )
    broken = policy.decide(USER, "user", Question("job.submit", "command", "run"), NOON)
    assert not broken.allow and broken.errors
    assert policy.decide(USER, "user", Question("job.submit", "command", "other"), NOON).allow
    assert policy.decide(USER, "user", Question("job.get", "job"), NOON).allow


@pytest.mark.parametrize(
    "text",
    [
        "permit (principal, action, resource",
        'permit (principal, action == Action::"no.such", resource);',
        "permit (principal, action, resource) when { context.colour == 1 };",
        "permit (principal, action, resource) when { principal.shoe > 3 };",
        "x" * (1 << 21),
    ],
)
def test_policies_that_do_not_load(text: str) -> None:
    with pytest.raises(AetherError) as caught:
        Policy.load(text)
    assert caught.value.code == "BAD_POLICY"


def test_an_empty_policy_allows_nothing() -> None:
    assert not Policy.load("").decide(USER, "queen", Question("health", "node"), NOON).allow


@pytest.mark.parametrize(
    ("condition", "cached"),
    [
        ("", True),
        ('when { principal in Role::"user" }', True),
        ('when { context.labels.contains("a") }', False),
        ('when { context.model like "m*" }', False),
        ('when { principal.tenant == Tenant::"default" && principal.kind == "user" }', True),
        ('when { context.kind == "command" && context.tenant == "default" }', True),
        ('when { resource.labels.contains("a") }', False),
        ('when { resource in Tenant::"default" }', False),
        ('when { resource == Command::"x" }', True),
        ("when { context.time.hour < 12 }", False),
        ('when { (if context.kind == "x" then context else context).op == "a" }', False),
        ("unless { context has id }", False),
    ],
)
def test_only_decisions_that_read_nothing_else_are_cached(condition: str, cached: bool) -> None:
    policy = Policy.load(f'permit (principal, action == Action::"job.submit", resource) {condition};')
    assert _cached(policy, Question("job.submit", "command")) is cached
    assert _cached(policy, Question("job.get", "job"))


def test_group_and_resource_scopes_count_for_caching() -> None:
    when = 'when { context.op == "run" }'
    grouped = Policy.load(f'permit (principal, action in Action::"read", resource) {when};')
    assert not _cached(grouped, Question("job.get", "job")) and _cached(grouped, Question("job.submit", "command"))
    scoped = Policy.load(f"permit (principal, action, resource is Model) {when};")
    assert not _cached(scoped, Question("job.submit", "model")) and _cached(scoped, Question("job.submit", "x"))


def test_context_decides_anew_each_time() -> None:
    policy = Policy.load('permit (principal, action, resource) when { context.labels.contains("ok") };')
    assert policy.decide(USER, "user", Question("job.submit", "command", labels=("ok",)), NOON).allow
    assert not policy.decide(USER, "user", Question("job.submit", "command"), NOON).allow


def test_names_that_look_like_cedar_are_only_names() -> None:
    odd = Principal('uid:0" in Role::"queen', "t\n", "user", 7)
    assert not DEFAULT.decide(odd, 'queen" || "', Question("policy.load", 'x"y'), NOON).allow


def _cached(policy: Policy, question: Question) -> bool:
    """Whether the same question is answered with the very same decision."""
    return policy.decide(USER, "user", question, NOON) is policy.decide(USER, "user", question, NOON)
