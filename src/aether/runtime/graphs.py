"""The three graphs of a package as ONNX Runtime sessions, and the two walks over them that everything is made of.

One thread, no memory pattern across shapes, sessions from bytes that were already verified. All arrays are float32
and C-contiguous, in the schema's units; B rows are independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]

Float = npt.NDArray[np.float32]

GRAPH_NAMES: Final = ("encode", "step", "sequence")
GRAPH_INPUTS: Final[Mapping[str, tuple[str, ...]]] = {
    "encode": ("obs",),
    "step": ("z", "action", "dt", "h"),
    "sequence": ("obs", "action", "dt", "h0"),
}
GRAPH_OUTPUTS: Final[Mapping[str, tuple[str, ...]]] = {
    "encode": ("z",),
    "step": ("z_hat", "h_next", "obs_mean", "obs_std", "gate_mean"),
    "sequence": ("energy", "z", "z_hat", "h_T", "obs_mean", "obs_std"),
}
_LOG_ERRORS_ONLY: Final = 3
_ROUNDING: Final = 1e-4


class Walked(NamedTuple):
    """Along B sequences of S intervals: energy[B,S], z[B,S+1,d], z_hat[B,S,d], h_last[B,H], mean and std[B,S,O]."""

    energy: Float
    z: Float
    z_hat: Float
    h_last: Float
    obs_mean: Float
    obs_std: Float


class Stepped(NamedTuple):
    """After one step of B rows: z_hat[B,d], h_next[B,H], obs_mean[B,O], obs_std[B,O], gate_mean[B,1]."""

    z_hat: Float
    h_next: Float
    obs_mean: Float
    obs_std: Float
    gate_mean: Float


def open_session(graph: bytes) -> ort.InferenceSession:
    """A single-threaded CPU session; no custom operator library is ever registered."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _LOG_ERRORS_ONLY
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True, slots=True)
class Graphs:
    """The sessions of one package. `state_size` is H, the width of the CfC state that starts at zero."""

    encode: ort.InferenceSession
    step: ort.InferenceSession
    sequence: ort.InferenceSession
    state_size: int

    def run(self, name: str, inputs: Mapping[str, Float]) -> Sequence[Float]:
        """All outputs of graph ``name``, whose order is that of GRAPH_OUTPUTS: the loader checked it."""
        session: ort.InferenceSession = getattr(self, name)
        outputs: Sequence[Float] = session.run(None, inputs)
        return outputs

    def encoded(self, obs: Float) -> Float:
        """z[B, d] of obs[B, O]."""
        return self.run("encode", {"obs": obs})[0]

    def walked(self, obs: Float, action: Float, dt: Float) -> Walked:
        """From a zero state along obs[B, S+1, O], action[B, S, A], dt[B, S] with S >= 1."""
        h0 = np.zeros((len(obs), self.state_size), np.float32)
        return Walked(*self.run("sequence", {"obs": obs, "action": action, "dt": dt, "h0": h0}))

    def state_after(self, obs: Float, action: Float, dt: Float) -> tuple[Float, Float]:
        """z[B, d] and h[B, H] at the last of obs[B, S+1, O], S >= 0."""
        if obs.shape[1] == 1:
            return self.encoded(obs[:, 0]), np.zeros((len(obs), self.state_size), np.float32)
        walked = self.walked(obs, action, dt)
        return walked.z[:, -1], walked.h_last

    def stepped(self, z: Float, action: Float, dt: Float, h: Float) -> Stepped:
        """One step of B rows: z[B, d], action[B, A], dt[B, 1], h[B, H]."""
        return Stepped(*self.run("step", {"z": z, "action": action, "dt": dt, "h": h}))

    def rolled_out(self, z: Float, h: Float, action: Float, horizon_s: Float, dt_max_s: float) -> Stepped:
        """B rows ahead by horizon_s[B], the action held: one step up to dt_max_s, above it equal steps in open loop."""
        # the tolerance keeps a horizon of exactly dt_max_s one step, whatever float32 made of it
        one_step_s = dt_max_s * (1 + _ROUNDING)
        if horizon_s.max() <= one_step_s:
            return self.stepped(z, action, horizon_s[:, None], h)
        counts = np.maximum(1, np.ceil(horizon_s / one_step_s)).astype(np.int64)
        dt = (horizon_s / counts)[:, None].astype(np.float32)
        result = Stepped(*(part.copy() for part in self.stepped(z, action, dt, h)))
        for taken in range(1, int(counts.max())):
            rows = np.flatnonzero(counts > taken)
            ahead = self.stepped(result.z_hat[rows], action[rows], dt[rows], result.h_next[rows])
            for kept, part in zip(result, ahead, strict=True):
                kept[rows] = part
        return result
