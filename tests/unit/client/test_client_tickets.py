"""Narrowing and looking into a ticket without its authority: by the library and by the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from aether.cli import main
from aether.cli.amounts import parse
from aether.cli.tickets import amounts, lifetime_ms, narrowing
from aether.client.tickets import attenuate, inspect
from aether.contract import caveats as c
from aether.contract.caveats import Request
from aether.contract.errors import AetherError
from aether.contract.units import AMOUNT_MAX, UNITS
from aether.substrate.access.tickets import Tickets, check

NOW_MS = 1_790_000_000_000
AUTHORITY = Tickets({"e1": b"s" * 32}, "e1")
PLAIN = AUTHORITY.mint("default", bytes(16), (c.role("user"), c.expires(NOW_MS + 10), c.budget("ops", 5)))
NAMES = st.sampled_from(["job.submit", "job.*", "*", "cell.list", "command", "model", "m", "m@1", "a", "a/*"])
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.lists(NAMES, max_size=3) for name in ("operations", "kinds", "models", "labels", "hosts", "cells")},
        "paths": st.lists(st.sampled_from(["r:/work", "rwx:/", "r:/work/../etc"]), max_size=2),
        "role": st.sampled_from(["user", "queen", "node"]),
        "budget": st.dictionaries(st.sampled_from(UNITS), st.integers(0, 1 << 53), max_size=2),
        "expires_at_ms": st.integers(NOW_MS - 2, NOW_MS + 20),
    },
)
REQUESTS = st.builds(
    Request,
    operation=st.sampled_from(["job.submit", "job.get", "cell.list", "cell.allocate", "ticket.mint"]),
    kind=st.sampled_from(["command", "model", None]),
    model=st.sampled_from(["m", "m@2", None]),
    labels=st.lists(st.sampled_from(["a", "b"]), max_size=2).map(tuple),
    cells=st.lists(st.sampled_from(["a", "a/b", "c"]), max_size=2).map(tuple),
    paths=st.lists(st.sampled_from(["r:/work/x", "w:/work"]), max_size=2).map(tuple),
)


def allowed(text: str, request: Request, now_ms: int) -> bool:
    try:
        check(AUTHORITY.verify(text), request, now_ms)
    except AetherError as error:
        assert error.code in ("TICKET_DENIED", "TICKET_EXPIRED")
        return False
    return True


@given(st.lists(OPTIONS, max_size=4), REQUESTS, st.integers(NOW_MS - 2, NOW_MS + 20))
@settings(max_examples=300, deadline=None)
def test_what_the_library_narrows_never_widens(steps: list[dict[str, object]], request: Request, now_ms: int) -> None:
    text = PLAIN
    for step in steps:
        try:
            narrower = attenuate(text, **step)  # type: ignore[arg-type]
        except AetherError as error:
            assert error.code == "BAD_FIELD"
            continue
        before, after = AUTHORITY.verify(text), AUTHORITY.verify(narrower)
        assert not allowed(narrower, request, now_ms) or allowed(text, request, now_ms)
        assert set(before.roles) <= set(after.roles) and before.limits == after.limits[: len(before.limits)]
        assert inspect(narrower).link_id == after.link_ids[-1]
        assert inspect(narrower).links == tuple(tuple(map(str, link)) for link in after.links)
        text = narrower


@given(st.integers(0, 511), st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_inspecting_changed_text_is_an_answer_or_a_bad_ticket(at: int, change: int) -> None:
    raw = bytearray(PLAIN.encode())
    raw[at % len(raw)] ^= change
    try:
        inspect(raw.decode("latin-1"))
    except AetherError as error:
        assert error.code == "BAD_TICKET" and "aetk1_" not in str(error)


def run(tmp_path: Path, *words: str, text: str = "") -> tuple[int, str]:
    """The command, with no instance anywhere near."""
    env = {"AETHER_STATE": str(tmp_path / "none"), "AETHER_TICKET": ""}
    done = CliRunner().invoke(main.build(), ["ticket", *words], input=text, env=env)
    return done.exit_code, done.output


def test_the_command_narrows_and_inspects_offline(tmp_path: Path) -> None:
    options = ("--budget", "ops=3,cpu_ms=100", "--budget", "ops=2", "--allow", "job.*", "--allow", "kinds=command")
    code, out = run(tmp_path, "attenuate", "-", *options, "--label", "pii", text=PLAIN + "\n")
    assert code == 0
    narrower = out.strip()
    assert len(narrower) < 512, "an ordinary ticket is small"
    assert {str(caveat) for caveat in AUTHORITY.verify(narrower).links[1]} == {
        "operations=job.*", "kinds=command", "labels=pii", "budget=2 ops", "budget=100 cpu_ms",
    }  # fmt: skip
    code, out = run(tmp_path, "inspect", narrower, "--json")
    assert code == 0 and json.loads(out)["link_id"] == AUTHORITY.verify(narrower).link_ids[-1]


def test_the_command_refuses_what_it_does_not_understand(tmp_path: Path) -> None:
    for words in (
        ("attenuate", PLAIN, "--budget", "gold=1"),
        ("attenuate", PLAIN, "--budget", "ops"),
        ("attenuate", PLAIN, "--allow", "everything=1"),
        ("attenuate", PLAIN, "--role", "Not A Role"),
        ("attenuate",),
    ):
        assert run(tmp_path, *words)[0] == 2, words
    assert run(tmp_path, "inspect", "aetk1_AAAA")[0] == 121
    assert not (tmp_path / "none").exists(), "nothing was started"


def test_options_are_read_as_written() -> None:
    assert amounts(["ops=1,cpu_ms=2", "ops=0"]) == {"ops": 0, "cpu_ms": 2}
    assert narrowing(None, None, ["job.get,job.list", "operations=job.logs", "hosts=x.org:443"], ["a", "b"]) == {
        "role": None,
        "budget": {},
        "operations": ("job.get", "job.list", "job.logs"),
        "hosts": ("x.org:443",),
        "labels": ("a", "b"),
    }


def test_budgets_have_short_spellings() -> None:
    text = "ops=100,usd=0.25,cpu=10s,wall=1m,in=10MB,out=1K,memory=8G,gpu=1s,tokens=7,ticks=2,ttl=1h,bytes_in=5"
    assert parse([text, "usd=1"]) == {
        "ops": 100, "micro_usd": 250_000, "cpu_ms": 10_000, "wall_ms": 60_000, "bytes_in": 5, "bytes_out": 1_024,
        "memory_byte_s": 8 << 30, "gpu_ms": 1_000, "tokens": 7, "ticks": 2, "ttl_ms": 3_600_000,
    }  # fmt: skip
    assert lifetime_ms("2h", [text]) == 3_600_000 and lifetime_ms("1s", [text]) == 1_000
    assert lifetime_ms(None, ["ops=1"]) is None
    for text in ("usd=1.2345678", "usd=-1", "ops=1.5", "cpu=fast", "ops=", "=1", "in=9999999999T", "tokens=²"):
        with pytest.raises(AetherError):
            parse([text])


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse([text])
    except AetherError as error:
        assert error.code == "BAD_FIELD"
    else:
        assert all(0 <= amount <= AMOUNT_MAX for amount in found.values())
