"""Trains, calibrates, validates and packs the pendulum model; seeded, on one core, within minutes.

    python -m aether.worldmodel.train --seed 7 --out build/pendulum [--key my.key]

Without ``--key`` the package is complete but unsigned. With ``--against DIR`` (default: the sample package, where it is
found) the new graphs replay that package's golden inputs, and the largest difference is printed. A directory that
already holds a package is never written over: a version is published once.
"""

import argparse
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from aether.contract.modelwire import PACKAGE_SCHEMA_VERSION, ModelSchema, Provenance, Quantity
from aether.runtime.graphs import Graphs
from aether.runtime.modelpackage import GOLDEN_ATOL, MANIFEST, load_unsigned
from aether.worldmodel.baselines import ArxDt, fit_gru
from aether.worldmodel.calibrate import HORIZON_MAX_S, calibrated
from aether.worldmodel.card import model_card, verdict
from aether.worldmodel.data import (
    DT_MAX_S,
    DT_MIN_S,
    NOISE_STD,
    TORQUE_MAX_NM,
    Normaliser,
    Trajectories,
    generate,
)
from aether.worldmodel.export import OPSET, export_graphs
from aether.worldmodel.fit import BURN_IN_STEPS, Batch, fit, make_deterministic, normalised
from aether.worldmodel.model import Jepa, Sizes, jepa_loss
from aether.worldmodel.package import (
    golden_difference,
    load_private_key,
    open_graphs,
    sign,
    write_document,
    write_golden,
    write_manifest,
)
from aether.worldmodel.streams import Stream
from aether.worldmodel.validate import Served, held_out, report

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]

MODEL_ID: Final = "pendulum"
VERSION: Final = "1.0.0"
SAMPLE: Final = Path("packages") / MODEL_ID / VERSION
_TRAIN_COUNT: Final = 4_000
_VALID_COUNT: Final = 500
_LENGTH: Final = 65
_EPOCHS: Final = 60
_OBS_RANGE: Final = 1.05


def _say(text: str) -> None:
    print(text, flush=True)


def _validation_error(model: Jepa, valid: Batch) -> float:
    z_hat, _ = model.predict(model.encoder(valid.obs[:, :-1]), valid.action, valid.dt)
    errors = (model.decode(z_hat)[0] - valid.obs[:, 1:])[:, BURN_IN_STEPS:]
    return float((errors**2).mean())


def train_model(train: Batch, valid: Batch, seed: int, epochs: int) -> Jepa:
    rng = make_deterministic(seed)
    model = Jepa(Sizes(state=96, backbone=128))
    started = time.monotonic()

    def on_epoch(epoch: int, error: float) -> None:
        if epoch % 5 == 4:
            _say(f"epoch {epoch + 1:3d}  validation error {error:.5f}  {time.monotonic() - started:5.0f} s")

    fit(
        model,
        lambda batch: jepa_loss(model, batch.obs, batch.action, batch.dt, rng),
        lambda: _validation_error(model, valid),
        train,
        epochs=epochs,
        rng=rng,
        on_epoch=on_epoch,
    )
    return model.eval()


def _schema(sizes: Sizes) -> ModelSchema:
    return ModelSchema(
        schema_version=PACKAGE_SCHEMA_VERSION,
        predictor="cfc",
        observation=(
            Quantity(name="cos_theta", unit="1", min=-_OBS_RANGE, max=_OBS_RANGE),
            Quantity(name="sin_theta", unit="1", min=-_OBS_RANGE, max=_OBS_RANGE),
        ),
        action=(Quantity(name="torque", unit="N m", min=-TORQUE_MAX_NM, max=TORQUE_MAX_NM),),
        time_unit="s",
        dt_min_s=DT_MIN_S,
        dt_max_s=DT_MAX_S,
        horizon_max_s=HORIZON_MAX_S,
        latent_size=sizes.latent,
        state_size=sizes.state,
        state_layout=f"h: float32[{sizes.state}], the CfC state, zero before the first observation",
    )


def _golden_inputs(graphs: Graphs, seed: int) -> dict[str, dict[str, Float]]:
    data = generate(4, 17, seed, stream=Stream.GOLDEN)
    h0 = np.zeros((4, graphs.state_size), np.float32)
    walked = graphs.walked(data.obs, data.action, data.dt)
    step = {"z": walked.z[:, -1], "action": data.action[:, -1], "dt": data.dt[:, -1:], "h": walked.h_last}
    return {
        "encode": {"obs": np.ascontiguousarray(data.obs[:, 0])},
        "step": {name: np.ascontiguousarray(value) for name, value in step.items()},
        "sequence": {"obs": data.obs, "action": data.action, "dt": data.dt, "h0": h0},
    }


def _baselines(train: Trajectories, valid: Trajectories, norm: Normaliser, seed: int, epochs: int) -> dict[str, Double]:
    """Predictions of the held-out points by each trained baseline: [N, O]."""
    points = held_out(seed)
    gru = fit_gru(
        normalised(train, norm),
        normalised(valid, norm),
        state=96,
        hidden=128,
        epochs=epochs,
        rng=make_deterministic(seed),
    )
    return {
        "arx_dt": ArxDt(train, valid, norm).predicted(points)[:, -1],
        "gru_mlp_dt": gru.predicted(points, norm)[:, -1],
    }


def _created() -> str:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def build(out: Path, seed: int, epochs: int) -> Graphs:
    """Everything from data to an unsigned package in ``out``; returns its graphs."""
    train = generate(_TRAIN_COUNT, _LENGTH, seed, stream=Stream.TRAIN)
    valid = generate(_VALID_COUNT, _LENGTH, seed, stream=Stream.VALID)
    norm = Normaliser.of(train)
    model = train_model(normalised(train, norm), normalised(valid, norm), seed, epochs)
    out.mkdir(parents=True, exist_ok=True)
    export_graphs(model, norm, out)
    graphs, schema = open_graphs(out, model.sizes.state), _schema(model.sizes)
    _say("calibrating")
    stats = calibrated(graphs, seed, f"{MODEL_ID}@{VERSION}", norm)
    _say("training the GRU baseline")
    figures = report(Served.of(graphs, stats), seed, dict(_baselines(train, valid, norm, seed, epochs)))
    table: dict[str, Any] = figures["normalised_mse"]
    command = f"python -m aether.worldmodel.train --seed {seed} --out build/pendulum"
    facts = {
        "latent": model.sizes.latent,
        "state": model.sizes.state,
        "backbone": model.sizes.backbone,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dt_min": DT_MIN_S,
        "dt_max": DT_MAX_S,
        "horizon_max": HORIZON_MAX_S,
        "noise": float(((NOISE_STD / np.array(norm.obs_std)) ** 2).mean()),
        "seed": seed,
        "command": command,
    }
    write_document(out / "schema.json", schema)
    write_document(out / "stats.json", stats)
    write_document(out / "validation" / "report.json", {**figures, "seed": seed, "verdict": verdict(table)})
    (out / "MODEL_CARD.md").write_text(model_card(f"{MODEL_ID} {VERSION}", facts, figures), encoding="utf-8")
    write_golden(out / "golden.npz", graphs, _golden_inputs(graphs, seed))
    provenance = Provenance(command=command, seed=seed, trained_with=f"torch {torch.__version__}")
    write_manifest(out, model_id=MODEL_ID, version=VERSION, created=_created(), opset=OPSET, provenance=provenance)
    return graphs


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="aether.worldmodel.train", description="Train and pack the pendulum model.")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--key", type=Path, help="private key (PEM) to sign with")
    parser.add_argument("--against", type=Path, default=SAMPLE, help="package whose golden vectors are replayed")
    parser.add_argument("--epochs", type=int, default=_EPOCHS, help="for the model and the GRU baseline alike")
    given = parser.parse_args(argv)
    out: Path = given.out
    if (out / MANIFEST).exists():
        _say(f"cannot train into {out}: it already holds a package")
        return 2
    graphs = build(out, given.seed, given.epochs)
    if given.key is not None:
        sign(out, load_private_key(given.key))
    load_unsigned(out)
    _say(f"{out}: {MODEL_ID} {VERSION}, {'unsigned' if given.key is None else 'signed'}, loads")
    golden = given.against / "golden.npz"
    if golden.exists() and given.against.resolve() != out.resolve():
        worst = golden_difference(golden, graphs)
        agrees = "agree with" if worst <= GOLDEN_ATOL else "differ from"
        _say(f"golden outputs {agrees} {given.against}: largest difference {worst:.2e}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
