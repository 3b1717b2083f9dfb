"""The parser of client input: each error code, both spellings of arrays, and no input that escapes as anything else."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.contract.errors import AetherError
from aether.runtime.inference import Inference
from aether.worldmodel.data import generate

CODES = {"BAD_FIELD", "SHAPE", "NONFINITE", "UNIT", "DT_NONPOSITIVE", "DT_OUT_OF_RANGE"}
DATA = generate(1, 5, 1)


def tensor(values: Any) -> dict[str, Any]:
    array = np.asarray(values, "<f4")
    return {"dtype": "f32", "shape": list(array.shape), "b64": base64.b64encode(array.tobytes()).decode()}


def params(**changes: Any) -> dict[str, Any]:
    return {"model": "pendulum", "horizons_s": [0.1], **changes}


def history(**changes: Any) -> dict[str, Any]:
    whole = {"obs": DATA.obs[0].tolist(), "action": DATA.action[0].tolist(), "dt": DATA.dt[0].tolist()}
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}


def inputs(**changes: Any) -> dict[str, Any]:
    return {"history": history(), "action": [0.5], **changes}


def code(inference: Inference, op: Any, given_params: Any, given_inputs: Any) -> str:
    with pytest.raises(AetherError) as caught:
        inference.parse(op, given_params, given_inputs)
    assert caught.value.message.startswith("cannot ")
    return caught.value.code


def test_lists_tensors_and_times_mean_the_same(inference: Inference) -> None:
    plain = inference.parse("predict_next_state", params(), inputs())
    packed = history(obs=tensor(DATA.obs[0]), action=tensor(DATA.action[0]), dt=tensor(DATA.dt[0]))
    timed = history(dt=None, t=(1.7e9 + DATA.t[0]).tolist())
    for other in (packed, timed):
        query = inference.parse("predict_next_state", params(), inputs(history=other, action=tensor([0.5])))
        assert np.array_equal(query.obs, plain.obs)  # type: ignore[union-attr]
        assert np.allclose(query.dt, plain.dt, atol=1e-6)  # type: ignore[union-attr]


def test_one_observation_is_a_history(inference: Inference) -> None:
    query = inference.parse("predict_next_state", params(), {"history": {"obs": [[1, 0]]}, "action": [0]})
    assert query.obs.shape == (1, 2) and query.action.shape == (0, 1) and query.dt.shape == (0,)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"obs": [[1.0, 0.0]]}, "SHAPE"),
        ({"obs": [[1.0, 0.0, 0.0]] * 5}, "SHAPE"),
        ({"obs": [[1.0, 0.0], [1.0]] * 2 + [[1.0, 0.0]]}, "SHAPE"),
        ({"obs": []}, "SHAPE"),
        ({"obs": [1.0] * 5}, "SHAPE"),
        ({"obs": [["1", "0"]] * 5}, "SHAPE"),
        ({"obs": [[True, False]] * 5}, "SHAPE"),
        ({"obs": [[None, 0.0]] * 5}, "SHAPE"),
        ({"obs": {**tensor(DATA.obs[0]), "shape": [2, 5]}}, "SHAPE"),
        ({"obs": {**tensor(DATA.obs[0]), "shape": [5, 3]}}, "SHAPE"),
        ({"obs": {**tensor(DATA.obs[0]), "shape": [-5, -2]}}, "SHAPE"),
        ({"obs": {**tensor(DATA.obs[0]), "shape": [1 << 62, 1 << 62]}}, "SHAPE"),
        ({"obs": {**tensor(DATA.obs[0]), "shape": [1] * 40}}, "SHAPE"),
        ({"obs": {**tensor(DATA.obs[0]), "b64": "*"}}, "SHAPE"),
        ({"obs": {**tensor(DATA.obs[0]), "b64": "é"}}, "SHAPE"),
        ({"obs": {**tensor(DATA.obs[0]), "dtype": "f64"}}, "SHAPE"),
        ({"obs": tensor(np.full((5, 2), np.nan))}, "NONFINITE"),
        ({"obs": [[1e300, 0.0]] * 5}, "NONFINITE"),
        ({"obs": [[math.inf, 0.0]] * 5}, "NONFINITE"),
        ({"action": tensor(np.full((4, 1), np.inf))}, "NONFINITE"),
        ({"action": [[0.0]] * 3}, "SHAPE"),
        ({"action": None}, "SHAPE"),
        ({"dt": None}, "SHAPE"),
        ({"t": [0.0, 0.1, 0.2, 0.3, 0.4]}, "SHAPE"),
        ({"dt": [0.1] * 3}, "SHAPE"),
        ({"dt": [[0.1]] * 4}, "SHAPE"),
        ({"dt": [0.1, math.nan, 0.1, 0.1]}, "NONFINITE"),
        ({"dt": [0.1, 0.0, 0.1, 0.1]}, "DT_NONPOSITIVE"),
        ({"dt": [0.1, -0.1, 0.1, 0.1]}, "DT_NONPOSITIVE"),
        ({"dt": [0.1, 0.3, 0.1, 0.1]}, "DT_OUT_OF_RANGE"),
        ({"dt": [0.1, 0.001, 0.1, 0.1]}, "DT_OUT_OF_RANGE"),
        ({"dt": None, "t": [0.0, 0.1, 0.1, 0.2, 0.3]}, "DT_NONPOSITIVE"),
        ({"dt": None, "t": [0.0, 0.1, 0.2, 0.3]}, "SHAPE"),
        ({"dt": None, "t": [0.0, 0.1, 0.2, 0.3, math.nan]}, "NONFINITE"),
        ({"velocity": [[0.0]]}, "BAD_FIELD"),
    ],
)
def test_wrong_histories(inference: Inference, changes: dict[str, Any], wanted: str) -> None:
    assert code(inference, "predict_next_state", params(), inputs(history=history(**changes))) == wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"action": [0.0, 0.0]}, "SHAPE"),
        ({"action": [math.nan]}, "NONFINITE"),
        ({"action": 0.5}, "SHAPE"),
        ({"units": {"torque": "N mm"}}, "UNIT"),
        ({"units": {"time": "ms"}}, "UNIT"),
        ({"units": {"speed": "m/s"}}, "UNIT"),
        ({"history": 5}, "BAD_FIELD"),
        ({"history": {}}, "BAD_FIELD"),
        ({"session_id": "s"}, "BAD_FIELD"),
    ],
)
def test_wrong_inputs(inference: Inference, changes: dict[str, Any], wanted: str) -> None:
    assert code(inference, "predict_next_state", params(), inputs(**changes)) == wanted


@pytest.mark.parametrize(
    ("horizons_s", "wanted"),
    [
        ([], "SHAPE"),
        ([0.1] * 65, "SHAPE"),
        ([0.0], "DT_NONPOSITIVE"),
        ([-1.0], "DT_NONPOSITIVE"),
        ([math.nan], "NONFINITE"),
        ([0.001], "DT_OUT_OF_RANGE"),
        ([1.01], "DT_OUT_OF_RANGE"),
        ([1e300], "DT_OUT_OF_RANGE"),
        ("0.1", "BAD_FIELD"),
        (None, "BAD_FIELD"),
    ],
)
def test_wrong_horizons(inference: Inference, horizons_s: Any, wanted: str) -> None:
    assert code(inference, "predict_next_state", params(horizons_s=horizons_s), inputs()) == wanted


def test_right_units_and_the_range_ends_are_accepted(inference: Inference) -> None:
    units = {"cos_theta": "1", "sin_theta": "1", "torque": "N m", "time": "s"}
    ends = inputs(units=units, history=history(dt=[0.01, 0.25, 0.1, 0.1]))
    inference.parse("predict_next_state", params(horizons_s=[0.01, 0.25, 1.0]), ends)


def test_limits_of_each_operation(inference: Inference) -> None:
    limits = inference.package.manifest.limits
    long = {"obs": [[1, 0]] * (limits.history_max + 1), "action": [[0]] * limits.history_max}
    long["dt"] = [0.1] * limits.history_max  # type: ignore[assignment]
    assert code(inference, "predict_next_state", params(), inputs(history=long)) == "SHAPE"
    plain = {"model": "pendulum"}
    assert code(inference, "encode_state", plain, {"obs": [[1, 0]] * (limits.encode_rows_max + 1)}) == "SHAPE"
    assert code(inference, "encode_state", plain, {"obs": []}) == "SHAPE"
    assert code(inference, "encode_state", {**plain, "horizons_s": [0.1]}, {"obs": [[1, 0]]}) == "BAD_FIELD"
    assert code(inference, "score_sequence", plain, {"obs": [[1, 0]], "action": [], "dt": []}) == "SHAPE"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
ARRAYS = (
    st.lists(st.floats() | JSON, max_size=5)
    | st.lists(st.lists(st.floats(), min_size=1, max_size=3), max_size=5)
    | st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["f32", "f16"]),
            "shape": st.lists(st.integers(-(2**70), 2**70) | st.integers(0, 5), max_size=3),
            "b64": st.text(max_size=12) | st.binary(max_size=24).map(lambda raw: base64.b64encode(raw).decode()),
        }
    )
)
NAMES = st.sampled_from(["history", "obs", "action", "t", "dt", "units", "x"])


@settings(max_examples=500, deadline=None)
@given(
    op=st.sampled_from(["predict_next_state", "encode_state", "score_sequence"]),
    horizons=JSON | st.lists(st.floats(), max_size=3),
    top=st.dictionaries(NAMES, ARRAYS | JSON, max_size=5),
    inner=st.dictionaries(NAMES, ARRAYS | JSON, max_size=5) | JSON,
)
def test_any_input_is_parsed_or_refused_with_a_code(
    inference: Inference, op: Any, horizons: Any, top: dict[str, Any], inner: Any
) -> None:
    try:
        query = inference.parse(op, {"model": "pendulum", "horizons_s": horizons}, {**top, "history": inner})
        inference.run([query])
    except AetherError as error:
        assert error.code in CODES
