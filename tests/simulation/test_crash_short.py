"""A short crash simulation, the same as `make crash`: 12 deaths, every role its share."""

from __future__ import annotations

import pytest

from tests.simulation.crash import run


@pytest.mark.timeout(180)
def test_twelve_deaths(capfd: pytest.CaptureFixture[str]) -> None:
    good = run(seed=11, kills=12)
    said = capfd.readouterr().out
    assert good, said
    assert "kills: aetherd=3 aurorad=3 cfcd=2 keeper=2 spawner=2" in said
    assert "duplicate=0 orphan=0 unverified=0" in said
