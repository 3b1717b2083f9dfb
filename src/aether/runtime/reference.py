"""What a request costs without us: the same graphs on the same arrays by ONNX Runtime alone, for benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from aether.contract.jobs import JobRequest
from aether.runtime.graphs import Float


def bare_predict(package: Path, body: bytes) -> Callable[[], Float]:
    """A call that predicts the mean obs[K, O] for the `predict_next_state` job in ``body`` (lists, dt, >= 2 rows).

    Reading, parsing and verifying happen here, once; the call is two graph runs and nothing else. Horizons must lie
    within one step of the model. The package is trusted: nothing is checked.
    """
    job = msgspec.json.decode(body, type=JobRequest)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    sequence, step = (
        ort.InferenceSession(str(package / name), options, providers=["CPUExecutionProvider"])
        for name in ("sequence.onnx", "step.onnx")
    )
    history = {name: np.array([job.inputs["history"][name]], np.float32) for name in ("obs", "action", "dt")}
    h0 = np.zeros((1, sequence.get_inputs()[3].shape[-1]), np.float32)
    horizons = np.array(job.params["horizons_s"], np.float32)[:, None]
    rows = np.zeros(len(horizons), np.int64)
    held = np.array([job.inputs["action"]], np.float32)[rows]

    def call() -> Float:
        z, h = sequence.run(["z", "h_T"], {**history, "h0": h0})
        mean: Float = step.run(["obs_mean"], {"z": z[rows, -1], "action": held, "dt": horizons, "h": h[rows]})[0]
        return mean

    return call
