"""Calibration of exported graphs on trajectories that training never saw: `stats.json`.

Works on the graphs through `aether.runtime`, so that what is calibrated is what is served. Needs no torch.

- Intervals: split conformal on |error| / predicted std, one quantile per class of age, bin of horizon and column.
- Surprise: mean and std of log energy per class of age and bin of dt on one half of the sequences; order statistics
  for p-values and alarm thresholds on the other half.
"""

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from aether.contract.modelwire import PACKAGE_SCHEMA_VERSION, ModelStats, Threshold
from aether.runtime.calibration import age_class_of, bin_of, log_energy, sequence_score
from aether.runtime.graphs import Graphs
from aether.worldmodel.data import DT_MAX_S, DT_MIN_S, Normaliser, generate
from aether.worldmodel.streams import Stream

Double = npt.NDArray[np.float64]

COVERAGE: Final = 0.9
HORIZON_MAX_S: Final = 1.0
AGE_EDGES: Final = (1, 2, 3, 4, 5, 7, 10)
_AGES_BY_CLASS: Final = ((1,), (2,), (3,), (4,), (5, 6), (7, 8, 9), (10, 12, 16))
_HISTORY_MAX: Final = 16
_DT_BINS: Final = 12
_LONG_BINS: Final = 4
_POINTS: Final = 16_000
_SEQUENCES: Final = 4_000
_SEQUENCE_INTERVALS: Final = (8, 16, 24, 32, 48, 64, 96, 128)
_TABLE_INTERVALS: Final = 64
_ORDER_STATISTICS: Final = 999
_ALARM_QUANTILE: Final = 0.99


def _rounded(values: npt.ArrayLike) -> list[float]:
    return [float(f"{value:.7g}") for value in np.asarray(values, np.float64).ravel()]


def _table(values: Double) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(_rounded(row)) for row in values)


def dt_edges_s() -> Double:
    return np.geomspace(DT_MIN_S, DT_MAX_S, _DT_BINS + 1)


def horizon_edges_s() -> Double:
    """The bins of dt, then those of longer horizons, which are answered by several steps."""
    return np.concatenate([dt_edges_s(), np.geomspace(DT_MAX_S, HORIZON_MAX_S, _LONG_BINS + 1)[1:]])


def conformal_quantile(scores: Double, coverage: float = COVERAGE) -> Double:
    """The order statistic of scores[n, O] that covers a further exchangeable point with ``coverage``; needs n >= 9."""
    rank = math.ceil((len(scores) + 1) * coverage)
    return np.asarray(np.sort(scores, axis=0)[rank - 1])


def _interval_factors(graphs: Graphs, seed: int) -> Double:
    """factor[age class, horizon bin, O]: disjoint shares of the trajectories for the ages within a class."""
    data = generate(
        _POINTS, _HISTORY_MAX + 2, seed, stream=Stream.CALIBRATE_INTERVALS, final_dt_s=(DT_MIN_S, HORIZON_MAX_S)
    )
    edges, horizon_s, target = horizon_edges_s(), data.dt[:, -1], data.obs[:, -1]
    bins = bin_of(horizon_s, edges)
    factors = np.empty((len(AGE_EDGES), len(edges) - 1, target.shape[1]))
    for age_class, ages in enumerate(_AGES_BY_CLASS):
        scores = np.empty(target.shape)
        for share, age in enumerate(ages):
            rows = np.arange(share, _POINTS, len(ages))
            first = _HISTORY_MAX + 1 - age
            history = data.obs[rows, first:-1], data.action[rows, first:-1], data.dt[rows, first:-1]
            z, h = graphs.state_after(*history)
            ahead = graphs.rolled_out(z, h, data.action[rows, -1], horizon_s[rows], DT_MAX_S)
            scores[rows] = np.abs(target[rows] - ahead.obs_mean) / ahead.obs_std
        for one in range(len(edges) - 1):
            factors[age_class, one] = conformal_quantile(scores[bins == one])
    return factors


def _surprise_tables(energy: Double, dt: npt.NDArray[np.float32]) -> tuple[Double, Double]:
    """Mean and std of log energy[N, S] for [age class, dt bin]."""
    ages = np.broadcast_to(age_class_of(np.arange(1, energy.shape[1] + 1), np.array(AGE_EDGES)), energy.shape)
    bins = bin_of(dt, dt_edges_s())
    mean, std = np.empty((len(AGE_EDGES), _DT_BINS)), np.empty((len(AGE_EDGES), _DT_BINS))
    for age in range(len(AGE_EDGES)):
        for one in range(_DT_BINS):
            values = energy[(ages == age) & (bins == one)]
            mean[age, one], std[age, one] = values.mean(), values.std()
    return mean, std


def _order_statistics(surprise: Double) -> tuple[float, ...]:
    return tuple(sorted(_rounded(np.quantile(surprise, np.linspace(0, 1, _ORDER_STATISTICS)))))


def calibrated(graphs: Graphs, seed: int, model: str, norm: Normaliser) -> ModelStats:
    """Stats of ``model`` (``id@version``); ``norm`` from training."""
    data = generate(_SEQUENCES, max(_SEQUENCE_INTERVALS) + 1, seed, stream=Stream.CALIBRATE_SURPRISE)
    walked = graphs.walked(data.obs, data.action, data.dt)
    half = _SEQUENCES // 2
    logs = log_energy(walked.energy)
    # no longer than training sequences: torque pumps energy in, so later intervals are of another kind
    mean, std = _surprise_tables(logs[:half, :_TABLE_INTERVALS], data.dt[:half, :_TABLE_INTERVALS])
    ages = age_class_of(np.arange(1, logs.shape[1] + 1), np.array(AGE_EDGES))[None]
    bins = bin_of(data.dt[half:], dt_edges_s())
    surprise = (logs[half:] - mean[ages, bins]) / std[ages, bins]
    thresholds = []
    for intervals in _SEQUENCE_INTERVALS:
        scores = [sequence_score(row[:intervals]) for row in surprise]
        level = float(np.quantile(scores, _ALARM_QUANTILE))
        name = f"{model}/seq_score/q99/{intervals}"
        thresholds.append(Threshold(id=name, intervals_max=intervals, value=_rounded(level)[0]))
    gate = graphs.stepped(walked.z[:, -1], data.action[:, -1], data.dt[:, -1:], walked.h_last).gate_mean
    factors = _interval_factors(graphs, seed)
    return ModelStats(
        schema_version=PACKAGE_SCHEMA_VERSION,
        age_edges=AGE_EDGES,
        horizon_edges_s=tuple(_rounded(horizon_edges_s())),
        interval_factor=tuple(_table(one) for one in factors),
        dt_edges_s=tuple(_rounded(dt_edges_s())),
        log_energy_mean=_table(mean),
        log_energy_std=_table(std),
        surprise_sorted=_order_statistics(surprise[:, :_TABLE_INTERVALS]),
        thresholds=tuple(thresholds),
        gate_mean=_rounded(gate.mean())[0],
        gate_std=_rounded(gate.std())[0],
        obs_mean=norm.obs_mean,
        obs_std=norm.obs_std,
        dt_mean_s=norm.dt_mean_s,
    )
