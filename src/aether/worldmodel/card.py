"""MODEL_CARD.md of a package, written from its report so that no figure is typed by hand."""

from typing import Any, Final

_TEXT: Final = """# {name}

A small world model of a noisy pendulum seen only by its position at irregular times: given what was seen and the
torque, it predicts the next observation at any horizon with calibrated intervals, encodes a state, and says how
surprising each step of a recording was.

**"CFC" here means CfC**, the closed-form continuous-time network of Hasani et al. (2022), as the temporal predictor of
a joint-embedding predictive architecture (JEPA): encoder 2-128-128-{latent}, CfC state {state}
with backbone {backbone}, decoder {latent}-128-128-4, {parameters} parameters,
float32. `schema.json` names the predictor.

## Inputs and outputs
Observation `[cos theta, sin theta]` (no unit), action torque in N m within [-2, 2], time in s. Intervals of a history:
{dt_min:g} to {dt_max:g} s. Horizons: up to {horizon_max:g} s; above {dt_max:g} s the answer is several steps in open
loop under a held torque and is marked `extrapolating`.

## Data
Simulated, not measured: `aether.worldmodel.data`, seed {seed}; 4,000 trajectories of 64 intervals for training, others
for validation, calibration and every figure below. Friction, gravity and rod are fixed; another pendulum is another
model.

## Figures on {points} held-out points
Mean squared error over the training variance, one step over irregular intervals, bootstrap 95% intervals by trajectory.

| predictor | error | 95% interval |
|---|---|---|
{rows}
The sensor noise alone is about {noise:.5f}. **{verdict}** One training run of each, with the same data and
epochs; the interval is over held-out trajectories, not over training seeds.

90% intervals (split conformal) cover {coverage:.3f}; the uncalibrated Gaussian ones {gaussian:.3f}.

| fault | AUROC | found at the threshold | surprise peaks within 2 steps |
|---|---|---|---|
{faults}
False alarms on clean recordings of the same length: {false_alarms:.3f}.

## Limits
- Valid only within the ranges of `schema.json`; outside, time steps are refused and other inputs are marked.
- One observation does not determine the velocity: the first answers of a history have wide intervals.
- Coverage is marginal, over data like the calibration data; it is not promised for each single state.
- Near the upright position small errors grow quickly; horizons above {dt_max:g} s suffer most from it.
- The thresholds are for recordings of up to 128 intervals; longer ones reach them more often without a fault.
- Slow or weak faults (`stuck_actuator`, `heavy`) show late or not at all; see the table.

## Reproduce

    {command}

makes the package again within minutes on one core. Weights agree bit for bit only on like CPUs; the command prints how
far its graphs are from the golden vectors of this package.
"""
_NAMES: Final = {
    "cfc_jepa": "**CfC-JEPA (this model)**",
    "persistence": "persistence (nothing changes)",
    "arx_dt": "ARX, 8 lags, with dt",
    "gru_mlp_dt": "GRU with dt, MLP head with dt",
}


def _rows(table: dict[str, Any]) -> str:
    lines = [
        f"| {_NAMES[name]} | {row['mean']:.5f} | {row['interval95'][0]:.5f} to {row['interval95'][1]:.5f} |\n"
        for name, row in table.items()
    ]
    return "".join(lines)


def verdict(table: dict[str, Any]) -> str:
    """What the paired 95% intervals against each baseline allow to say."""
    said: dict[str, list[str]] = {"better than": [], "a tie with": [], "worse than": []}
    for name, row in table.items():
        if name == "cfc_jepa":
            continue
        low, high = row["difference_to_cfc_jepa_interval95"]
        word = "better than" if low > 0 else "worse than" if high < 0 else "a tie with"
        said[word].append(_NAMES[name])
    text = "; ".join(f"{word} {' / '.join(names)}" for word, names in said.items() if names)
    return f"{text[0].upper()}{text[1:]}."


def model_card(name: str, facts: dict[str, Any], report: dict[str, Any]) -> str:
    """``facts`` holds sizes, ranges, seed and command; ``report`` is validation/report.json."""
    table = report["normalised_mse"]
    faults = "".join(
        f"| {kind} | {row['auroc']:.3f} | {row['detected_at_threshold']:.2f} | {row['peak_within_2_steps']:.2f} |\n"
        for kind, row in report["faults"]["kinds"].items()
    )
    return _TEXT.format(
        name=name,
        points=report["points"],
        rows=_rows(table),
        verdict=verdict(table),
        coverage=report["coverage90"]["mean"],
        gaussian=report["coverage90"]["uncalibrated_gaussian"],
        faults=faults,
        false_alarms=report["faults"]["false_alarm_rate"],
        **facts,
    )
