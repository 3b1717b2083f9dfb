"""One small request for the pendulum model, the same in every benchmark: a short history, one horizon."""

from __future__ import annotations

import json
import math

MODEL = "pendulum"
OBSERVATIONS = 8


def predict_request(wait: bool = True) -> tuple[str, bytes]:
    """(path, body) of a `predict_next_state` job."""
    dt_s = 0.05
    obs = [[math.cos(0.3 + 0.2 * k), math.sin(0.3 + 0.2 * k)] for k in range(OBSERVATIONS)]
    body = {
        "kind": "model",
        "op": "predict_next_state",
        "params": {"model": MODEL, "horizons_s": [0.1]},
        "inputs": {
            "history": {"obs": obs, "action": [[0.0]] * (OBSERVATIONS - 1), "dt": [dt_s] * (OBSERVATIONS - 1)},
            "action": [0.0],
        },
    }
    return "/v0/jobs" + ("?wait=10s" if wait else ""), json.dumps(body).encode()
