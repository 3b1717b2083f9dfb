"""The three operations: what they answer, that batching changes nothing, and that tables are used as documented."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aether.contract.modelwire import EncodeResult, PredictResult, ScoreResult
from aether.runtime.calibration import bin_of, sequence_score
from aether.runtime.inference import Inference
from aether.runtime.queries import EncodeQuery, PredictQuery, ScoreQuery
from aether.worldmodel.data import generate

DATA = generate(12, 17, 77)


def predict_query(inference: Inference, row: int, horizons_s: list[float], action: float = 0.3) -> PredictQuery:
    history = {"obs": DATA.obs[row].tolist(), "action": DATA.action[row].tolist(), "dt": DATA.dt[row].tolist()}
    given = {"history": history, "action": [action]}
    query = inference.parse("predict_next_state", {"model": "m", "horizons_s": horizons_s}, given)
    assert isinstance(query, PredictQuery)
    return query


def flat(result: PredictResult) -> Any:
    return np.array([[*one.mean, *one.std, *np.ravel(one.interval90), *one.z_hat] for one in result.predictions])


def test_a_batch_answers_what_each_query_alone_is_answered(inference: Inference) -> None:
    queries = [predict_query(inference, row, [0.02, 0.2, 0.6, 1.0][: 1 + row % 4]) for row in range(12)]
    together = inference.predict(queries)
    for query, result in zip(queries, together, strict=True):
        alone = inference.predict([query])[0]
        assert [one.horizon_s for one in alone.predictions] == [one.horizon_s for one in result.predictions]
        assert np.allclose(flat(alone), flat(result), rtol=1e-4, atol=1e-5)


def test_intervals_hold_the_mean_and_widen_with_the_horizon(inference: Inference) -> None:
    result = inference.predict([predict_query(inference, 0, [0.02, 1.0])])[0]
    near, far = result.predictions
    for one in (near, far):
        for mean, (low, high) in zip(one.mean, one.interval90, strict=True):
            assert low < mean < high
    assert np.ptp(far.interval90[0]) > np.ptp(near.interval90[0])


def test_a_long_horizon_is_equal_steps_under_a_held_action(inference: Inference) -> None:
    query = predict_query(inference, 3, [0.5])
    graphs = inference.package.graphs
    z, h = graphs.state_after(query.obs[None], query.action[None], query.dt[None])
    dt = np.full((1, 1), 0.25, np.float32)
    first = graphs.stepped(z, query.held[None], dt, h)
    second = graphs.stepped(first.z_hat, query.held[None], dt, first.h_next)
    got = inference.predict([query])[0].predictions[0]
    assert np.allclose(got.mean, second.obs_mean[0], atol=1e-5) and got.extrapolating


def test_extrapolating_marks_inputs_outside_the_trained_ranges(inference: Inference) -> None:
    inside = inference.predict([predict_query(inference, 0, [0.25])])[0].predictions[0]
    outside = inference.predict([predict_query(inference, 0, [0.25], action=2.5)])[0].predictions[0]
    assert (inside.extrapolating, outside.extrapolating) == (False, True)


def test_encode_splits_a_batch_back(inference: Inference) -> None:
    queries = [EncodeQuery(DATA.obs[row, : 1 + row]) for row in range(4)]
    together = inference.encode(queries)
    for row, result in enumerate(together):
        assert isinstance(result, EncodeResult) and np.shape(result.z) == (1 + row, 8)
        assert np.allclose(result.z, inference.encode([queries[row]])[0].z, atol=1e-5)


def test_score_agrees_with_the_sequence_graph(inference: Inference) -> None:
    query = ScoreQuery(DATA.obs[2], DATA.action[2], DATA.dt[2])
    result = inference.score([query])[0]
    assert isinstance(result, ScoreResult)
    walked = inference.package.graphs.walked(query.obs[None], query.action[None], query.dt[None])
    assert np.allclose(result.energy, walked.energy[0])
    assert result.seq_score == pytest.approx(np.mean(sorted(result.surprise)[-3:]))
    assert all(0 < p <= 1 for p in result.p_value) and np.isfinite(result.nll).all()
    assert result.threshold_id == "pendulum@1.0.0/seq_score/q99/16"


def test_a_spike_raises_the_score(inference: Inference) -> None:
    clean = ScoreQuery(DATA.obs[5], DATA.action[5], DATA.dt[5])
    spiked = ScoreQuery(DATA.obs[5].copy(), DATA.action[5], DATA.dt[5])
    spiked.obs[10] += 0.5
    before, after = inference.score([clean])[0], inference.score([spiked])[0]
    assert after.seq_score > before.seq_score + 1
    assert int(np.argmax(after.surprise)) + 1 in (10, 11, 12)
    assert min(after.p_value) < 0.01


def test_bins_and_short_sequences() -> None:
    edges = np.array([1.0, 2.0, 3.0])
    assert bin_of([0.5, 1.0, 1.99, 2.0, 3.0, 9.0], edges).tolist() == [0, 0, 0, 1, 1, 1]
    assert sequence_score(np.array([4.0])) == 4.0
    assert sequence_score(np.array([1.0, 2.0, 9.0, 3.0])) == pytest.approx((2 + 9 + 3) / 3)
