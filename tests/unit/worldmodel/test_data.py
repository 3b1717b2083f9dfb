"""The generator: seeded, within its ranges, physically consistent, faults where it says."""

from __future__ import annotations

import numpy as np
import pytest

from aether.worldmodel.data import (
    DT_MAX_S,
    DT_MIN_S,
    FAULT_KINDS,
    FREEZE_STEPS,
    NOISE_STD,
    TORQUE_MAX_NM,
    FaultKind,
    generate,
)


def test_same_arguments_same_arrays_and_streams_differ() -> None:
    first, again, other = generate(3, 20, 5), generate(3, 20, 5), generate(3, 20, 5, stream=1)
    assert np.array_equal(first.obs, again.obs) and np.array_equal(first.dt, again.dt)
    assert not np.array_equal(first.dt, other.dt)


def test_shapes_types_and_ranges() -> None:
    data = generate(50, 30, 1)
    assert data.obs.shape == (50, 30, 2) and data.action.shape == (50, 29, 1) and data.dt.shape == (50, 29)
    assert data.obs.dtype == data.action.dtype == data.dt.dtype == np.float32
    assert data.dt.min() >= np.float32(DT_MIN_S) and data.dt.max() <= np.float32(DT_MAX_S)
    assert np.abs(data.action).max() <= TORQUE_MAX_NM
    assert np.allclose(np.linalg.norm(data.clean, axis=2), 1, atol=1e-6)
    assert np.std(data.obs - data.clean) == pytest.approx(NOISE_STD, rel=0.1)
    assert (data.fault_step == -1).all()


def test_times_add_up_to_the_intervals() -> None:
    data = generate(4, 12, 3)
    assert (data.t[:, 0] == 0).all() and np.allclose(np.diff(data.t, axis=1), data.dt, atol=1e-9)


def test_the_last_interval_may_come_from_another_range() -> None:
    data = generate(200, 5, 2, final_dt_s=(0.5, 1.0))
    assert data.dt[:, -1].min() >= 0.5 and data.dt[:, :-1].max() <= np.float32(DT_MAX_S)


def test_energy_changes_only_by_torque_and_friction() -> None:
    """Without torque and over a short time the integrator keeps omega^2 / 2 + 15 cos(theta) but for friction."""
    from aether.worldmodel.data import _advance, _Plant

    state = np.array([[1.0, 2.0], [3.0, -1.0]])
    plant = _Plant(np.zeros(2), np.ones(2))
    before = state[:, 1] ** 2 / 2 + 15 * np.cos(state[:, 0])
    after = _advance(state, plant, np.full(2, 0.25))
    lost = before - (after[:, 1] ** 2 / 2 + 15 * np.cos(after[:, 0]))
    assert (lost > 0).all() and (lost < 0.1 * 0.25 * 60).all()


@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_a_fault_touches_nothing_before_its_step(kind: FaultKind) -> None:
    clean, faulty = generate(20, 30, 4), generate(20, 30, 4, fault=kind)
    assert ((faulty.fault_step >= 10) & (faulty.fault_step < 20)).all()
    for i, step in enumerate(faulty.fault_step):
        assert np.array_equal(clean.obs[i, :step], faulty.obs[i, :step])
        assert not np.array_equal(clean.obs[i, step:], faulty.obs[i, step:])
        if kind == "freeze":
            assert (faulty.obs[i, step : step + FREEZE_STEPS] == faulty.obs[i, step - 1]).all()
        if kind == "spike":
            assert np.array_equal(clean.obs[i, step + 1 :], faulty.obs[i, step + 1 :])
