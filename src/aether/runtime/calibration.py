"""From raw model outputs to calibrated ones: intervals, surprise, p-values. Pure NumPy over a package's tables.

A class of age (observations seen so far) and a bin of dt or horizon pick the table's cell: the angular velocity is
not observable from one observation, so early errors are of another kind than late ones. Values outside the edges
fall into the nearest bin; requests outside the model's range are refused before they come here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from aether.contract.modelwire import ModelStats, Threshold

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

TOP_SURPRISES: Final = 3
_ENERGY_FLOOR: Final = 1e-12
_HALF_LOG_2PI: Final = 0.5 * float(np.log(2 * np.pi))


def log_energy(energy: Float) -> Double:
    return np.log(energy.astype(np.float64) + _ENERGY_FLOOR)


def bin_of(values: npt.ArrayLike, edges: Double) -> Index:
    """Index of the bin [edges[i], edges[i+1]) of each value, clipped to the outer bins."""
    inner = edges[1:-1]
    return np.searchsorted(inner, values, side="right")


def age_class_of(ages: npt.ArrayLike, age_edges: Index) -> Index:
    """Index of the class of each age; age_edges[0] is 1."""
    return np.searchsorted(age_edges[1:], ages, side="right")


def nll_of(obs: Float, mean: Float, std: Float) -> Double:
    """Gaussian negative log likelihood in nats, summed over the last axis."""
    scaled = (obs.astype(np.float64) - mean) / std
    return np.asarray((0.5 * scaled**2 + np.log(std.astype(np.float64)) + _HALF_LOG_2PI).sum(-1))


def sequence_score(surprise: Double) -> float:
    """Mean of the largest three surprises of one sequence (of all, when there are fewer)."""
    top = np.partition(surprise, max(0, len(surprise) - TOP_SURPRISES))[-TOP_SURPRISES:]
    return float(top.mean())


@dataclass(frozen=True, slots=True)
class Tables:
    """A package's `stats.json` as arrays, made once at load."""

    age_edges: Index
    horizon_edges: Double
    interval_factor: Double
    dt_edges: Double
    log_energy_mean: Double
    log_energy_std: Double
    surprise_sorted: Double
    thresholds: tuple[Threshold, ...]

    @classmethod
    def of(cls, stats: ModelStats) -> Tables:
        """Raises ValueError when shapes disagree, edges do not increase, or a value is not finite and positive."""
        tables = cls(
            age_edges=np.asarray(stats.age_edges, np.int64),
            horizon_edges=np.asarray(stats.horizon_edges_s, np.float64),
            interval_factor=np.asarray(stats.interval_factor, np.float64),
            dt_edges=np.asarray(stats.dt_edges_s, np.float64),
            log_energy_mean=np.asarray(stats.log_energy_mean, np.float64),
            log_energy_std=np.asarray(stats.log_energy_std, np.float64),
            surprise_sorted=np.asarray(stats.surprise_sorted, np.float64),
            thresholds=tuple(sorted(stats.thresholds, key=lambda one: one.intervals_max)),
        )
        tables._check(len(stats.obs_mean))
        return tables

    def _check(self, observed: int) -> None:
        ages, horizons, bins = len(self.age_edges), len(self.horizon_edges) - 1, len(self.dt_edges) - 1
        edges = (self.age_edges, self.horizon_edges, self.dt_edges)
        if ages < 1 or horizons < 1 or bins < 1 or any((np.diff(one) <= 0).any() for one in edges):
            raise ValueError("its bin edges do not increase")
        if self.age_edges[0] != 1 or self.interval_factor.shape != (ages, horizons, observed):
            raise ValueError("its interval table has the wrong shape")
        if self.log_energy_mean.shape != (ages, bins) or self.log_energy_std.shape != (ages, bins):
            raise ValueError("its surprise table has the wrong shape")
        if not (self.interval_factor > 0).all() or not (self.log_energy_std > 0).all():
            raise ValueError("its tables hold a scale that is not positive")
        arrays = (*edges, self.interval_factor, self.log_energy_mean, self.log_energy_std, self.surprise_sorted)
        if not all(np.isfinite(one).all() for one in arrays):
            raise ValueError("its tables hold a value that is not finite")
        if len(self.surprise_sorted) == 0 or (np.diff(self.surprise_sorted) < 0).any() or not self.thresholds:
            raise ValueError("its surprise quantiles or thresholds are missing or out of order")

    def half_widths(self, age: int, horizon_s: Float, std: Float) -> Float:
        """90% half-widths[B, O] at horizon_s[B] for predicted std[B, O] after ``age`` observations."""
        factor = self.interval_factor[age_class_of(age, self.age_edges), bin_of(horizon_s, self.horizon_edges)]
        return np.asarray(std * factor, np.float32)

    def surprise(self, energy: Float, dt: Float) -> Double:
        """z-score of log energy[..., S] among calibration intervals of like dt[..., S] and age."""
        ages = age_class_of(np.arange(1, energy.shape[-1] + 1), self.age_edges)
        cell = (np.broadcast_to(ages, energy.shape), bin_of(dt, self.dt_edges))
        return np.asarray((log_energy(energy) - self.log_energy_mean[cell]) / self.log_energy_std[cell])

    def p_values(self, surprise: Double) -> Double:
        """Conformal p-value: share of calibration surprises at least as large, never 0."""
        count = len(self.surprise_sorted)
        larger = count - np.searchsorted(self.surprise_sorted, surprise, side="left")
        return np.asarray((1 + larger) / (count + 1))

    def threshold_for(self, intervals: int) -> Threshold:
        """The alarm level calibrated for sequences of this length, or the longest there is."""
        for threshold in self.thresholds:
            if intervals <= threshold.intervals_max:
                return threshold
        return self.thresholds[-1]
