"""Figures of a package on data that neither training nor calibration saw; through the served code, without torch.

Every point is one trajectory of its own, so points are independent and the bootstrap resamples trajectories.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from aether.contract.modelwire import ModelStats
from aether.runtime.calibration import Tables, bin_of, sequence_score
from aether.runtime.graphs import Float, Graphs, Stepped
from aether.worldmodel.data import DT_MAX_S, DT_MIN_S, FAULT_KINDS, FREEZE_STEPS, FaultKind, Trajectories, generate
from aether.worldmodel.streams import Stream

Double = npt.NDArray[np.float64]

POINTS: Final = 1_000
HISTORY: Final = 24
PEAK_TOLERANCE_STEPS: Final = 2
FAULT_LENGTH: Final = 48
FAULT_TRIALS: Final = 200
_BOOTSTRAPS: Final = 1_000
_CLEAN_SEQUENCES: Final = 1_000


@dataclass(frozen=True, slots=True)
class Served:
    """The graphs and tables that are judged, and the training variance that errors are divided by."""

    graphs: Graphs
    tables: Tables
    obs_std: Double

    @classmethod
    def of(cls, graphs: Graphs, stats: ModelStats) -> "Served":
        return cls(graphs, Tables.of(stats), np.array(stats.obs_std))

    def squared_errors(self, predicted: npt.ArrayLike, data: Trajectories) -> Double:
        """Squared error of the last observation over the training variance, mean over columns: [N]."""
        scaled = (np.asarray(predicted, np.float64) - data.obs[:, -1]) / self.obs_std
        return np.asarray((scaled**2).mean(1))

    def last_predicted(self, data: Trajectories, age: int | None = None) -> Stepped:
        """The last observation from the ``age`` ones before it (all of them by default)."""
        first = 0 if age is None else data.obs.shape[1] - 1 - age
        z, h = self.graphs.state_after(data.obs[:, first:-1], data.action[:, first:-1], data.dt[:, first:-1])
        return self.graphs.rolled_out(z, h, data.action[:, -1], data.dt[:, -1], DT_MAX_S)

    def covered(self, data: Trajectories, age: int | None = None) -> npt.NDArray[np.bool_]:
        """Whether the 90% interval holds the last observation: [N, O]."""
        ahead = self.last_predicted(data, age)
        seen = data.obs.shape[1] - 1 if age is None else age
        half = self.tables.half_widths(seen, data.dt[:, -1], ahead.obs_std)
        return np.asarray(np.abs(data.obs[:, -1] - ahead.obs_mean) <= half)

    def surprises(self, data: Trajectories) -> Double:
        """Surprise of every interval: [N, S]; the peak of interval k is the step of observation k + 1."""
        energy: Float = self.graphs.walked(data.obs, data.action, data.dt).energy
        return self.tables.surprise(energy, data.dt)


def held_out(seed: int) -> Trajectories:
    """1,000 points: 24 observations of history, then one more after an interval of the trained range."""
    return generate(POINTS, HISTORY + 1, seed, stream=Stream.HELD_OUT)


def interval95(values: Double, seed: int) -> list[float]:
    """Bootstrap 95% interval of the mean of values[N]."""
    rng = np.random.default_rng([seed, len(values)])
    means = values[rng.integers(0, len(values), (_BOOTSTRAPS, len(values)))].mean(1)
    return [_short(np.quantile(means, level)) for level in (0.025, 0.975)]


def peaks_near_fault(served: Served, kind: FaultKind, count: int, seed: int) -> npt.NDArray[np.bool_]:
    """For ``count`` faulty sequences: whether surprise peaks within 2 steps of the fault (or of a lasting one's span).

    A frozen sensor is a fault at every step until it is released, so its whole stretch counts.
    """
    data = generate(count, FAULT_LENGTH, seed, stream=Stream.HELD_OUT_FAULTS, fault=kind)
    peak = served.surprises(data).argmax(1) + 1
    last = data.fault_step + (FREEZE_STEPS if kind == "freeze" else 0)
    early, late = data.fault_step - PEAK_TOLERANCE_STEPS, last + PEAK_TOLERANCE_STEPS
    return np.asarray((peak >= early) & (peak <= late))


def report(served: Served, seed: int, baselines: dict[str, npt.ArrayLike]) -> dict[str, Any]:
    """All figures; ``baselines`` maps names to their predictions obs_hat[N, O] of the held-out points."""
    data = held_out(seed)
    own = served.squared_errors(served.last_predicted(data).obs_mean, data)
    table = {"cfc_jepa": _row(own, seed)}
    for name, predicted in {"persistence": data.obs[:, -2], **baselines}.items():
        errors = served.squared_errors(predicted, data)
        table[name] = _row(errors, seed) | {"difference_to_cfc_jepa_interval95": interval95(errors - own, seed)}
    return {
        "points": POINTS,
        "normalised_mse": table,
        "normalised_mse_by_dt": _by_bin(own, data.dt[:, -1], np.geomspace(DT_MIN_S, DT_MAX_S, 5)),
        "coverage90": _coverage(served, data, seed),
        "long_horizons": _long_horizons(served, seed),
        "faults": _faults(served, seed),
        "latent": _latent(served, data),
    }


def _row(errors: Double, seed: int) -> dict[str, Any]:
    return {"mean": _short(errors.mean()), "interval95": interval95(errors, seed)}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _by_bin(values: Double, at: npt.ArrayLike, edges: Double) -> list[dict[str, Any]]:
    bins = bin_of(at, edges)
    return [
        {
            "from_s": _short(edges[i]),
            "to_s": _short(edges[i + 1]),
            "points": int((bins == i).sum()),
            "mean": _short(values[bins == i].mean()),
        }
        for i in range(len(edges) - 1)
    ]


def _coverage(served: Served, data: Trajectories, seed: int) -> dict[str, Any]:
    covered = served.covered(data)
    ahead = served.last_predicted(data)
    gaussian = np.abs(data.obs[:, -1] - ahead.obs_mean) <= 1.6449 * ahead.obs_std
    return {
        "mean": _short(covered.mean()),
        "interval95": interval95(covered.mean(1), seed),
        "by_column": [_short(one) for one in covered.mean(0)],
        "by_dt": _by_bin(covered.mean(1), data.dt[:, -1], np.geomspace(DT_MIN_S, DT_MAX_S, 5)),
        "by_observations_seen": {str(age): _short(served.covered(data, age).mean()) for age in (1, 2, 4, 8, 16)},
        "uncalibrated_gaussian": _short(gaussian.mean()),
    }


def _long_horizons(served: Served, seed: int) -> dict[str, Any]:
    """Beyond the longest trained interval: several steps in open loop under a held action."""
    horizon_max_s = float(served.tables.horizon_edges[-1])
    data = generate(POINTS, HISTORY + 1, seed, stream=Stream.HELD_OUT_HORIZONS, final_dt_s=(DT_MAX_S, horizon_max_s))
    errors = served.squared_errors(served.last_predicted(data).obs_mean, data)
    still = served.squared_errors(data.obs[:, -2], data)
    edges = np.geomspace(DT_MAX_S, horizon_max_s, 3)
    return {
        "normalised_mse": _by_bin(errors, data.dt[:, -1], edges),
        "persistence": _by_bin(still, data.dt[:, -1], edges),
        "coverage90": _by_bin(served.covered(data).mean(1), data.dt[:, -1], edges),
    }


def _faults(served: Served, seed: int) -> dict[str, Any]:
    clean = generate(_CLEAN_SEQUENCES, FAULT_LENGTH, seed, stream=Stream.HELD_OUT)
    level = served.tables.threshold_for(FAULT_LENGTH - 1).value
    quiet = np.array([sequence_score(row) for row in served.surprises(clean)])
    kinds = {}
    for kind in FAULT_KINDS:
        data = generate(FAULT_TRIALS, FAULT_LENGTH, seed, stream=Stream.HELD_OUT_FAULTS, fault=kind)
        loud = np.array([sequence_score(row) for row in served.surprises(data)])
        above = (loud[:, None] > quiet[None]).mean() + 0.5 * (loud[:, None] == quiet[None]).mean()
        kinds[kind] = {
            "auroc": _short(above),
            "detected_at_threshold": _short((loud > level).mean()),
            "peak_within_2_steps": _short(peaks_near_fault(served, kind, FAULT_TRIALS, seed).mean()),
        }
    return {"false_alarm_rate": _short((quiet > level).mean()), "trials": FAULT_TRIALS, "kinds": kinds}


def _latent(served: Served, data: Trajectories) -> dict[str, Any]:
    std = served.graphs.encoded(data.obs[:, -1]).std(0)
    return {"std_min": _short(std.min()), "collapsed": bool(std.min() < 0.02)}
