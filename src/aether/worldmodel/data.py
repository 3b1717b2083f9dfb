"""Seeded trajectories of a pendulum that is seen only by its position, at irregular times.

The world: ``theta'' = 15 sin(theta) + 3 u - 0.1 theta'`` (rad, s; theta = 0 points up; u is a torque in N m on a rod of
1 kg and 1 m with g = 10 m/s^2), integrated by RK4 with substeps of at most 5 ms. The torque is an Ornstein-Uhlenbeck
process clipped to [-2, 2] and held over each interval. An observation is ``[cos theta, sin theta]`` plus Gaussian
noise of 0.01; the angular velocity is never observed, so one observation alone cannot predict the next.

Needs numpy alone, so that demonstrations and tests can make held-out trajectories where torch is not installed.

Invariants:
- the same arguments give the same arrays (PCG64 seeded by ``[seed, stream]``; streams keep splits disjoint);
- ``action[:, k]`` and ``dt[:, k]`` belong to the interval from observation k to observation k + 1.
"""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
FaultKind = Literal["kick", "spike", "freeze", "stuck_actuator", "heavy"]

FAULT_KINDS: Final[tuple[FaultKind, ...]] = ("kick", "spike", "freeze", "stuck_actuator", "heavy")
DT_MIN_S: Final = 0.01
DT_MAX_S: Final = 0.25
TORQUE_MAX_NM: Final = 2.0
NOISE_STD: Final = 0.01
FREEZE_STEPS: Final = 6
_SUBSTEP_S: Final = 0.005
_TORQUE_TAU_S: Final = 0.4
_GRAVITY_TERM: Final = 15.0
_TORQUE_GAIN: Final = 3.0
_DAMPING_PER_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Trajectories:
    """N trajectories of T observations and T - 1 intervals.

    obs[N, T, 2] noisy [cos, sin]; clean[N, T, 2] without noise and sensor faults; action[N, T-1, 1] in N m;
    dt[N, T-1] in s; fault_step[N] index of the first observation that a fault touches, -1 without a fault.
    """

    obs: Float
    clean: Float
    action: Float
    dt: Float
    fault_step: npt.NDArray[np.int64]

    @property
    def t(self) -> Double:
        """Observation times t[N, T] in s, starting at 0."""
        steps = np.cumsum(self.dt.astype(np.float64), axis=1)
        return np.concatenate([np.zeros((len(steps), 1)), steps], axis=1)


@dataclass(frozen=True, slots=True)
class _Plant:
    """What the integrator sees of one interval: torque applied and the rod's relative mass, each [N]."""

    torque: Double
    mass: Double

    def derivative(self, state: Double) -> Double:
        theta, omega = state[:, 0], state[:, 1]
        drive = (_TORQUE_GAIN * self.torque - _DAMPING_PER_S * omega) / self.mass
        return np.stack([omega, _GRAVITY_TERM * np.sin(theta) + drive], axis=1)


def _advance(state: Double, plant: _Plant, dt: Double) -> Double:
    """RK4 over one interval; every trajectory takes the same number of substeps, each of its own length."""
    substeps = max(1, int(np.ceil(dt.max() / _SUBSTEP_S)))
    h = (dt / substeps)[:, None]
    for _ in range(substeps):
        k1 = plant.derivative(state)
        k2 = plant.derivative(state + h / 2 * k1)
        k3 = plant.derivative(state + h / 2 * k2)
        k4 = plant.derivative(state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state


def _intervals(
    rng: np.random.Generator, count: int, steps: int, final_dt_s: tuple[float, float] | None
) -> tuple[Double, Double]:
    """dt[N, steps] log-uniform in the trained range (the last column in ``final_dt_s``) and torque[N, steps]."""
    dt = np.exp(rng.uniform(np.log(DT_MIN_S), np.log(DT_MAX_S), (count, steps)))
    if final_dt_s is not None:
        dt[:, -1] = np.exp(rng.uniform(np.log(final_dt_s[0]), np.log(final_dt_s[1]), count))
    # float32 may round a value across the bound that the served model enforces
    dt = np.clip(dt.astype(np.float32), np.float32(DT_MIN_S), None).astype(np.float64)
    torque = np.empty_like(dt)
    level = rng.uniform(-TORQUE_MAX_NM, TORQUE_MAX_NM, count)
    for k in range(steps):
        torque[:, k] = level
        keep = np.exp(-dt[:, k] / _TORQUE_TAU_S)
        shock = TORQUE_MAX_NM * np.sqrt(1 - keep**2) * rng.standard_normal(count)
        level = np.clip(level * keep + shock, -TORQUE_MAX_NM, TORQUE_MAX_NM)
    return dt, torque


def _sensor_fault(rng: np.random.Generator, kind: FaultKind | None, obs: Double, at: npt.NDArray[np.int64]) -> None:
    """Writes a spike or a frozen stretch into ``obs`` in place; plant faults leave it alone."""
    for i, step in enumerate(at):
        if kind == "spike":
            obs[i, step] += rng.choice([-1.0, 1.0], 2) * rng.uniform(0.15, 0.45)
        elif kind == "freeze":
            obs[i, step : step + FREEZE_STEPS] = obs[i, step - 1]


def generate(
    count: int,
    length: int,
    seed: int,
    *,
    stream: int = 0,
    fault: FaultKind | None = None,
    final_dt_s: tuple[float, float] | None = None,
) -> Trajectories:
    """``count`` trajectories of ``length`` observations (at least 6 when a fault is asked for).

    A fault begins once, in the middle third: ``kick`` adds +-(3 to 5) rad/s, ``spike`` offsets one observation by
    0.15 to 0.45 per axis, ``freeze`` repeats one observation 6 times, ``stuck_actuator`` applies no torque from then
    on, ``heavy`` makes the rod four times heavier for the torque from then on.
    """
    rng = np.random.default_rng([seed, stream])
    steps = length - 1
    dt, torque = _intervals(rng, count, steps, final_dt_s)
    state = np.stack([rng.uniform(-np.pi, np.pi, count), rng.uniform(-4, 4, count)], axis=1)
    at = rng.integers(length // 3, max(length // 3 + 1, 2 * length // 3), count)
    kick = rng.choice([-1.0, 1.0], count) * rng.uniform(3.0, 5.0, count)
    angle = np.empty((count, length))
    angle[:, 0] = state[:, 0]
    for k in range(steps):
        begun = k + 1 >= at
        if fault == "kick":
            state[:, 1] += np.where(k + 1 == at, kick, 0.0)
        applied = np.where(begun & (fault == "stuck_actuator"), 0.0, torque[:, k])
        mass = np.where(begun & (fault == "heavy"), 4.0, 1.0)
        state = _advance(state, _Plant(applied, mass), dt[:, k])
        angle[:, k + 1] = state[:, 0]
    clean = np.stack([np.cos(angle), np.sin(angle)], axis=2)
    obs = clean + NOISE_STD * rng.standard_normal(clean.shape)
    _sensor_fault(rng, fault, obs, at)
    return Trajectories(
        obs=obs.astype(np.float32),
        clean=clean.astype(np.float32),
        action=torque[:, :, None].astype(np.float32),
        dt=dt.astype(np.float32),
        fault_step=at if fault is not None else np.full(count, -1),
    )


@dataclass(frozen=True, slots=True)
class Normaliser:
    """Training statistics: obs mean[O] and std[O], and the mean interval in s that becomes one unit of time."""

    obs_mean: tuple[float, ...]
    obs_std: tuple[float, ...]
    dt_mean_s: float

    @classmethod
    def of(cls, data: Trajectories) -> "Normaliser":
        rows = data.obs.reshape(-1, data.obs.shape[-1]).astype(np.float64)
        return cls(tuple(rows.mean(0).tolist()), tuple(rows.std(0).tolist()), float(data.dt.mean()))
