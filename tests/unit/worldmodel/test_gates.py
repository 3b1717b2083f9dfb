"""The committed sample package holds its promises on data nobody has used; onnxruntime and numpy alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aether.runtime.calibration import Tables, sequence_score
from aether.runtime.modelpackage import LoadedPackage, load_package, load_public_key
from aether.worldmodel.data import FaultKind, Trajectories, generate
from aether.worldmodel.validate import HISTORY, POINTS, Served, peaks_near_fault

ROOT = Path(__file__).parents[3]
SEED = 90210  # neither training, calibration nor the report has seen it


@pytest.fixture(scope="module")
def package() -> LoadedPackage:
    key = load_public_key(ROOT / "packages" / "keys" / "aether-samples.pub")
    return load_package(ROOT / "packages" / "pendulum" / "1.0.0", [key])


@pytest.fixture(scope="module")
def served(package: LoadedPackage) -> Served:
    return Served(package.graphs, package.tables, np.array(package.stats.obs_std))


@pytest.fixture(scope="module")
def points() -> Trajectories:
    return generate(POINTS, HISTORY + 1, SEED)


def test_one_step_error_is_a_small_part_of_the_variance(served: Served, points: Trajectories) -> None:
    own = served.squared_errors(served.last_predicted(points).obs_mean, points).mean()
    still = served.squared_errors(points.obs[:, -2], points).mean()
    assert own <= 0.005, f"normalised error {own:.5f} beside persistence {still:.5f}"
    assert still > 20 * own


def test_the_gate_on_error_can_fail(served: Served, points: Trajectories) -> None:
    """The same model with its history shuffled misses the gate by far: the figure measures what it says."""
    order = np.random.default_rng(0).permutation(HISTORY)
    mixed = Trajectories(
        np.concatenate([points.obs[:, order], points.obs[:, -1:]], axis=1),
        points.clean,
        points.action,
        points.dt,
        points.fault_step,
    )
    assert served.squared_errors(served.last_predicted(mixed).obs_mean, mixed).mean() > 0.05


def test_intervals_cover_what_they_promise(served: Served, points: Trajectories) -> None:
    covered = served.covered(points)
    assert 0.85 <= covered.mean() <= 0.95
    assert all(0.85 <= column <= 0.95 for column in covered.mean(0))


@pytest.mark.parametrize("age", [1, 2, 4, 8])
def test_intervals_cover_after_short_histories_too(served: Served, points: Trajectories, age: int) -> None:
    assert 0.85 <= served.covered(points, age).mean() <= 0.95


def test_intervals_cover_long_horizons(served: Served, package: LoadedPackage) -> None:
    horizons = (package.schema.dt_max_s, package.schema.horizon_max_s)
    far = generate(POINTS, HISTORY + 1, SEED, stream=1, final_dt_s=horizons)
    assert 0.85 <= served.covered(far).mean() <= 0.95


def test_halved_intervals_would_not_cover(served: Served, package: LoadedPackage, points: Trajectories) -> None:
    tables = Tables.of(package.stats)
    tables.interval_factor[:] *= 0.5
    assert Served(package.graphs, tables, served.obs_std).covered(points).mean() < 0.85


@pytest.mark.parametrize("kind", ["spike", "freeze"])
def test_surprise_peaks_at_an_injected_fault(served: Served, kind: FaultKind) -> None:
    """Ten seeds, one faulty recording each: the peak lies within 2 steps of the fault in at least nine."""
    near = [bool(peaks_near_fault(served, kind, 1, SEED + seed)[0]) for seed in range(10)]
    assert sum(near) >= 9, f"{kind}: {sum(near)} of 10"


def test_surprise_peaks_at_most_kicks(served: Served) -> None:
    """A kick changes the unseen velocity: after short intervals it shows a few steps later, so most, not nearly all."""
    assert peaks_near_fault(served, "kick", 200, SEED).mean() >= 0.8


def test_clean_recordings_are_quiet(served: Served, package: LoadedPackage) -> None:
    clean = generate(500, 49, SEED, stream=2)
    level = package.tables.threshold_for(48).value
    alarms = np.mean([sequence_score(row) > level for row in served.surprises(clean)])
    assert alarms <= 0.03


def test_p_values_are_uniform_on_clean_data(served: Served, package: LoadedPackage) -> None:
    clean = generate(500, 65, SEED, stream=3)
    p_values = package.tables.p_values(served.surprises(clean)).ravel()
    for level in (0.05, 0.1, 0.5):
        assert abs((p_values <= level).mean() - level) < 0.02
