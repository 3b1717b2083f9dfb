"""A recording becomes what a model takes: n observations, the n-1 actions between them, and the action held."""

from __future__ import annotations

import pytest

from aether.cli.trajectory import prediction, sequence
from aether.contract.errors import AetherError


def test_action_per_observation() -> None:
    given = {"t": [0, 1, 2], "obs": [[0], [1], [2]], "action": [[7], [8], [9]]}
    assert prediction(given) == ({**given, "action": [[7], [8]]}, [9])
    assert sequence(given) == {**given, "action": [[7], [8]]}


def test_action_between_observations() -> None:
    given = {"dt": [1, 1], "obs": [[0], [1], [2]], "action": [[7], [8]]}
    assert prediction(given) == (given, [8])
    assert sequence(given) == given


def test_given_as_the_model_takes_it() -> None:
    given = {"history": {"obs": [[0]]}, "action": [5]}
    assert prediction(given) == ({"obs": [[0]]}, [5])


@pytest.mark.parametrize("given", [{}, {"obs": [[0]]}, {"obs": [[0]], "action": []}, {"action": {"dtype": "f32"}}])
def test_no_action(given: dict[str, object]) -> None:
    with pytest.raises(AetherError, match="BAD_FIELD"):
        prediction(given)
