"""The CfC-JEPA in torch: encoder, own CfC cell, decoder, and the training loss.

Time convention: ``h[k+1] = CfC([z[k], a[k]], h[k], dt[k -> k+1])`` and ``z_hat[k+1] = z[k] + W r[k+1]`` with the
anchored readout r of `closed_form`. All tensors here are normalised; physical units begin in `export`.

The loss is prediction in latent space + variance/covariance regulariser + reconstruction of z and of z_hat + a small
Gaussian likelihood, with the decoder's gradient on: without the regulariser the latent collapses.
"""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812  (the name every torch user reads)
from torch import Tensor, nn

from aether.worldmodel.closed_form import TANH_GAIN, TANH_SLOPE

LOG_VARIANCE_MIN: Final = -12.0
LOG_VARIANCE_MAX: Final = 4.0
_COVARIANCE_WEIGHT: Final = 0.04
_NLL_WEIGHT: Final = 0.05
_REGULARISED_ROWS: Final = 1024


@dataclass(frozen=True, slots=True)
class Sizes:
    """Widths of one model: observation, action, latent, CfC state, CfC backbone, encoder and decoder layers."""

    obs: int = 2
    action: int = 1
    latent: int = 8
    state: int = 64
    backbone: int = 96
    hidden: int = 128


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
    )


class CfcCell(nn.Module):
    """Fused CfC cell; the maths is `closed_form.cfc_step`. ncps 1.0.1 is not used: its batched timespans are wrong."""

    def __init__(self, inputs: int, state: int, backbone: int) -> None:
        super().__init__()
        self.w_in = nn.Linear(inputs, backbone)
        self.w_state = nn.Linear(state, backbone, bias=False)
        self.heads = nn.Linear(backbone, 4 * state)
        for layer in (self.w_in, self.w_state, self.heads):
            nn.init.xavier_uniform_(layer.weight)

    def step(self, driven: Tensor, h: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``driven`` = w_in(x) [B, U], h[B, H], dt[B, 1]; returns (h_next, readout, gate), each [B, H]."""
        backbone = TANH_GAIN * torch.tanh(TANH_SLOPE * (driven + self.w_state(h)))
        f1, f2, ta, tb = self.heads(backbone).chunk(4, -1)
        f1 = torch.tanh(f1)
        span = torch.tanh(f2) - f1
        gate = torch.sigmoid(ta * dt + tb)
        return f1 + gate * span, (gate - torch.sigmoid(tb)) * span, gate

    def forward(self, x: Tensor, dt: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x[B, T, I], dt[B, T], h[B, H]; returns (readouts[B, T, H], gates[B, T, H], h_T[B, H])."""
        driven = self.w_in(x)
        readouts, gates = [], []
        for k in range(x.shape[1]):
            h, readout, gate = self.step(driven[:, k], h, dt[:, k].unsqueeze(-1))
            readouts.append(readout)
            gates.append(gate)
        return torch.stack(readouts, 1), torch.stack(gates, 1), h


class Jepa(nn.Module):
    """Encoder, CfC predictor in latent space, decoder to an observation's mean and log variance."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = mlp(sizes.obs, sizes.hidden, sizes.latent)
        self.cell = CfcCell(sizes.latent + sizes.action, sizes.state, sizes.backbone)
        self.readout = nn.Linear(sizes.state, sizes.latent, bias=False)
        self.decoder = mlp(sizes.latent, sizes.hidden, 2 * sizes.obs)

    def predict(self, z: Tensor, action: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """z[B, T, d], action[B, T, A], dt[B, T] from a zero state; returns (z_hat[B, T, d], gates[B, T, H])."""
        h = z.new_zeros(z.shape[0], self.sizes.state)
        readouts, gates, _ = self.cell(torch.cat([z, action], -1), dt, h)
        return z + self.readout(readouts), gates

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.decoder(z).chunk(2, -1)
        return mean, log_variance.clamp(LOG_VARIANCE_MIN, LOG_VARIANCE_MAX)


def spread_penalty(z: Tensor) -> Tensor:
    """Variance hinge at 1 and covariance penalty over rows z[N, d] (VICReg's two terms)."""
    centred = z - z.mean(0)
    hinge = F.relu(1.0 - torch.sqrt(centred.var(0) + 1e-4)).mean()
    covariance = centred.T @ centred / (len(z) - 1)
    off_diagonal = covariance - torch.diag(torch.diagonal(covariance))
    return hinge + _COVARIANCE_WEIGHT * (off_diagonal**2).sum() / z.shape[1]


def jepa_loss(model: Jepa, obs: Tensor, action: Tensor, dt: Tensor, rng: torch.Generator) -> Tensor:
    """Scalar loss over obs[B, T, O], action[B, T-1, A], dt[B, T-1], all normalised."""
    z = model.encoder(obs)
    z_hat, _ = model.predict(z[:, :-1], action, dt)
    rows = z.reshape(-1, z.shape[-1])
    sample = torch.randint(0, len(rows), (_REGULARISED_ROWS,), generator=rng)
    mean, _ = model.decode(z)
    ahead, log_variance = model.decode(z_hat)
    target = obs[:, 1:]
    nll = 0.5 * ((ahead - target) ** 2 * torch.exp(-log_variance) + log_variance).mean()
    return (
        F.mse_loss(z_hat, z[:, 1:])
        + spread_penalty(rows[sample])
        + F.mse_loss(mean, obs)
        + F.mse_loss(ahead, target)
        + _NLL_WEIGHT * nll
    )
