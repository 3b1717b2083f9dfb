"""Training: AdamW with warm-up and cosine decay, the best epoch by validation error, seeded and single-threaded.

Reproducible on one kind of CPU: torch runs on one thread with deterministic algorithms, and every draw comes from a
generator seeded by the caller. Another CPU may round differently; `train` says whether its outputs agree.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from aether.worldmodel.data import Normaliser, Trajectories

BURN_IN_STEPS: Final = 8
_BATCH: Final = 128
_LEARNING_RATE: Final = 3e-3
_WEIGHT_DECAY: Final = 1e-4
_WARM_UP_STEPS: Final = 50
_DECAY_FLOOR: Final = 0.02
_CLIP_NORM: Final = 1.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Normalised tensors: obs[N, T, O], action[N, T-1, A], dt[N, T-1]."""

    obs: Tensor
    action: Tensor
    dt: Tensor

    def rows(self, index: Tensor) -> "Batch":
        return Batch(self.obs[index], self.action[index], self.dt[index])


def normalised(data: Trajectories, norm: Normaliser) -> Batch:
    obs = (torch.from_numpy(data.obs) - torch.tensor(norm.obs_mean)) / torch.tensor(norm.obs_std)
    return Batch(obs, torch.from_numpy(data.action), torch.from_numpy(data.dt) / norm.dt_mean_s)


def make_deterministic(seed: int) -> torch.Generator:
    """Puts torch on one thread with deterministic algorithms; the generator draws batches, the global seed weights."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def _schedule(step: int, total: int) -> float:
    warm = min(1.0, (step + 1) / _WARM_UP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    return warm * (_DECAY_FLOOR + (1 - _DECAY_FLOOR) * cosine)


def _shuffled(count: int, rng: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=rng)
    for first in range(0, count - _BATCH + 1, _BATCH):
        yield order[first : first + _BATCH]


def fit(
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    error: Callable[[], float],
    data: Batch,
    *,
    epochs: int,
    rng: torch.Generator,
    on_epoch: Callable[[int, float], None],
) -> list[float]:
    """Trains in place and leaves the weights of the epoch with the least ``error()``; returns the error by epoch."""
    optimiser = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    total = epochs * (len(data.obs) // _BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _schedule(step, total))
    history: list[float] = []
    best = {name: value.clone() for name, value in model.state_dict().items()}
    for epoch in range(epochs):
        for index in _shuffled(len(data.obs), rng):
            optimiser.zero_grad()
            loss(data.rows(index)).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            value = error()
        if not history or value < min(history):
            best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        history.append(value)
        on_epoch(epoch, value)
    model.load_state_dict(best)
    return history
