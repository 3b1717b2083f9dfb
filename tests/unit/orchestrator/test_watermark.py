"""How far the log may be called applied, though outcomes arrive out of its order."""

from __future__ import annotations

from aether.orchestrator.reconcile import Watermark

NONE: frozenset[str] = frozenset()


def test_nothing_seen_nothing_stored() -> None:
    watermark = Watermark()
    assert watermark.turn(NONE) is None
    assert watermark.turn(NONE) is None


def test_an_index_is_stored_a_turn_after_it_was_noted() -> None:
    watermark = Watermark()
    watermark.saw(9)
    assert watermark.turn(NONE) is None
    watermark.saw(20)
    assert watermark.turn(NONE) == 10
    assert watermark.turn(NONE) == 21


def test_a_job_that_was_finishing_holds_it_back() -> None:
    watermark = Watermark()
    watermark.saw(9)
    assert watermark.turn(frozenset({"a", "b"})) is None
    watermark.saw(30)
    assert watermark.turn(frozenset({"b", "c"})) is None, "b may have ended at an index below 10"
    assert watermark.turn(frozenset({"c"})) == 10, "c began to finish later"
