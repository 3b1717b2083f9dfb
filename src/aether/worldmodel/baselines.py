"""Honest baselines, always shown beside the model: persistence, ARX+dt (NumPy), GRU with an MLP head that sees dt.

Each predicts every observation from those before it: ``predicted(data) -> obs_hat[N, T-1, O]`` in physical units.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aether.worldmodel.data import Normaliser, Trajectories
from aether.worldmodel.fit import BURN_IN_STEPS, Batch, fit, normalised

Double = npt.NDArray[np.float64]

ARX_LAGS: Final = 8
_RIDGES: Final = (1e-2, 1.0, 1e2)


def persistence(data: Trajectories) -> Double:
    return data.obs[:, :-1].astype(np.float64)


def error_after_burn_in(predicted: Double, data: Trajectories, norm: Normaliser) -> float:
    """Mean squared error over the training variance, after the burn-in."""
    scaled = (predicted - data.obs[:, 1:]) / np.array(norm.obs_std)
    return float((scaled[:, BURN_IN_STEPS:] ** 2).mean())


class ArxDt:
    """Ridge regression of the next increment on 8 lags of observation, action and dt, and their products with dt."""

    def __init__(self, train: Trajectories, valid: Trajectories, norm: Normaliser) -> None:
        features = self._features(train)[:, BURN_IN_STEPS:]
        rows = features.reshape(-1, features.shape[-1])
        target = np.diff(train.obs.astype(np.float64), axis=1)[:, BURN_IN_STEPS:].reshape(len(rows), -1)
        gram, moment = rows.T @ rows, rows.T @ target
        fits = [np.asarray(np.linalg.solve(gram + ridge * np.eye(len(gram)), moment), np.float64) for ridge in _RIDGES]
        self.weights = min(fits, key=lambda weights: error_after_burn_in(self._apply(valid, weights), valid, norm))

    def predicted(self, data: Trajectories) -> Double:
        return self._apply(data, self.weights)

    def _apply(self, data: Trajectories, weights: Double) -> Double:
        return np.asarray(persistence(data) + self._features(data) @ weights)

    @staticmethod
    def _features(data: Trajectories) -> Double:
        obs, action = persistence(data), data.action.astype(np.float64)
        dt = data.dt.astype(np.float64)[:, :, None]
        columns = [np.ones_like(dt)]
        for lag in range(ARX_LAGS):
            past_obs, past_action, past_dt = (_lagged(part, lag) for part in (obs, action, dt))
            columns += [past_obs, past_action, past_dt, past_obs * past_dt, past_obs * dt, past_action * dt]
        return np.concatenate(columns, axis=2)


def _lagged(values: Double, lag: int) -> Double:
    """values[N, T, C] delayed by ``lag``; the first row stands in for what lies before it."""
    first = np.repeat(values[:, :1], lag, axis=1)
    return np.concatenate([first, values[:, : values.shape[1] - lag]], axis=1)


class GruMlpDt(nn.Module):
    """GRU over [obs, action, dt, log dt] with an MLP head that sees the same; the strongest simple rival."""

    def __init__(self, obs: int, action: int, state: int, hidden: int) -> None:
        super().__init__()
        inputs = obs + action + 2
        self.gru = nn.GRU(inputs, state, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(state + inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, obs)
        )

    def forward(self, batch: Batch) -> Tensor:
        dt = batch.dt.unsqueeze(-1)
        seen = torch.cat([batch.obs[:, :-1], batch.action, dt, 0.5 * torch.log(dt)], -1)
        increments: Tensor = self.head(torch.cat([self.gru(seen)[0], seen], -1))
        return batch.obs[:, :-1] + increments

    def error(self, batch: Batch) -> Tensor:
        missed: Tensor = (self(batch) - batch.obs[:, 1:])[:, BURN_IN_STEPS:]
        return (missed**2).mean()

    def predicted(self, data: Trajectories, norm: Normaliser) -> Double:
        with torch.no_grad():
            ahead: Tensor = self(normalised(data, norm))
        physical: Double = ahead.numpy().astype(np.float64) * np.array(norm.obs_std) + np.array(norm.obs_mean)
        return physical


def fit_gru(train: Batch, valid: Batch, *, state: int, hidden: int, epochs: int, rng: torch.Generator) -> GruMlpDt:
    model = GruMlpDt(train.obs.shape[-1], train.action.shape[-1], state, hidden)
    fit(
        model,
        lambda batch: ((model(batch) - batch.obs[:, 1:]) ** 2).mean(),
        lambda: float(model.error(valid)),
        train,
        epochs=epochs,
        rng=rng,
        on_epoch=lambda _epoch, _error: None,
    )
    return model
