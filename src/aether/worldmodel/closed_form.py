"""The CfC cell in NumPy, straight from the closed form; the reference that the torch cell and the graphs must match.

Closed-form continuous-time network (Hasani et al., Nature Machine Intelligence 4, 2022, eq. 10 in its practical form):
``h' = sigmoid(-f t) g + (1 - sigmoid(-f t)) h_branch`` with all three heads on one backbone. Written with
``s(t) = sigmoid(ta t + tb)``: ``h' = f1 + s(t) (f2 - f1)``.

Readout (ours): ``r = (s(t) - s(0)) (f2 - f1)``, exactly zero at t = 0, so a prediction over no time is the present.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# LeCun's scaled tanh, as in the published CfC backbones
TANH_GAIN: Final = 1.7159
TANH_SLOPE: Final = 0.666


@dataclass(frozen=True, slots=True)
class CfcWeights:
    """w_in[U, I], b_in[U], w_state[U, H], w_heads[4H, U], b_heads[4H]; head order f1, f2, ta, tb."""

    w_in: Array
    b_in: Array
    w_state: Array
    w_heads: Array
    b_heads: Array


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


def cfc_step(weights: CfcWeights, x: Array, h: Array, dt: Array) -> tuple[Array, Array, Array]:
    """One step for x[B, I], h[B, H], dt[B, 1] in normalised time; returns (h_next, readout, gate), each [B, H]."""
    drive = x @ weights.w_in.T + weights.b_in + h @ weights.w_state.T
    backbone = TANH_GAIN * np.tanh(TANH_SLOPE * drive)
    f1, f2, ta, tb = np.split(backbone @ weights.w_heads.T + weights.b_heads, 4, axis=-1)
    f1, f2 = np.tanh(f1), np.tanh(f2)
    gate = _sigmoid(ta * dt + tb)
    return f1 + gate * (f2 - f1), (gate - _sigmoid(tb)) * (f2 - f1), gate
