"""Parses a request's params and inputs into float32 arrays that fit one model; everything a client sends ends here.

The answer is a frozen query or an AetherError: BAD_FIELD for the structure, SHAPE, NONFINITE, UNIT, DT_NONPOSITIVE and
DT_OUT_OF_RANGE for the arrays. Nothing here depends on more than the request and the model's schema and limits.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from aether.contract.errors import AetherError
from aether.contract.modelwire import (
    EncodeInputs,
    Manifest,
    ModelSchema,
    PlainParams,
    PredictInputs,
    PredictParams,
    Quantity,
    RuntimeLimits,
    ScoreInputs,
    Tensor,
)

Float = npt.NDArray[np.float32]
T = TypeVar("T")

# times arrive as decimal text and become float32: 0.25 must not fail for its last bit
DT_TOLERANCE: Final = 1e-4
_ARRAY_PATH: Final = re.compile(r"`\$\.(history\.)?(obs|action|t|dt)[\[.`]")


@dataclass(frozen=True, slots=True)
class PredictQuery:
    """obs[n, O], action[n-1, A], dt[n-1], held[A], horizon_s[K]; `outside` when an input leaves the trained range."""

    obs: Float
    action: Float
    dt: Float
    held: Float
    horizon_s: Float
    horizons_s: tuple[float, ...]
    outside: bool


@dataclass(frozen=True, slots=True)
class EncodeQuery:
    """obs[B, O]."""

    obs: Float


@dataclass(frozen=True, slots=True)
class ScoreQuery:
    """obs[n, O], action[n-1, A], dt[n-1] with n >= 2."""

    obs: Float
    action: Float
    dt: Float


Query = PredictQuery | EncodeQuery | ScoreQuery


@dataclass(frozen=True, slots=True)
class QueryParser:
    """The parser of one model; its bounds are arrays made once."""

    schema: ModelSchema
    limits: RuntimeLimits
    units: dict[str, str]
    obs_low: Float
    obs_high: Float
    action_low: Float
    action_high: Float

    @classmethod
    def of(cls, schema: ModelSchema, manifest: Manifest) -> QueryParser:
        columns = (*schema.observation, *schema.action)
        units = {column.name: column.unit for column in columns} | {"time": schema.time_unit}
        obs_low, obs_high = _bounds(schema.observation)
        action_low, action_high = _bounds(schema.action)
        return cls(schema, manifest.limits, units, obs_low, obs_high, action_low, action_high)

    def predict(self, params: dict[str, Any], inputs: dict[str, Any]) -> PredictQuery:
        horizons_s = _converted(params, PredictParams, "params").horizons_s
        given = _converted(inputs, PredictInputs, "inputs")
        self._check_units(given.units)
        horizon_s = self._horizons(horizons_s)
        history = given.history
        obs, action, dt = self._sequence(history.obs, history.action, history.t, history.dt, 1, self.limits.history_max)
        held = _vector(given.action, "action")
        if len(held) != len(self.action_low):
            raise _shape(f"action has {len(held)} values, the model takes {len(self.action_low)}")
        _check_finite(held, "action")
        return PredictQuery(obs, action, dt, held, horizon_s, tuple(horizons_s), self._outside(obs, action, held))

    def encode(self, params: dict[str, Any], inputs: dict[str, Any]) -> EncodeQuery:
        _converted(params, PlainParams, "params")
        given = _converted(inputs, EncodeInputs, "inputs")
        self._check_units(given.units)
        obs = self._rows(given.obs, "obs", len(self.obs_low))
        if not 1 <= len(obs) <= self.limits.encode_rows_max:
            raise _shape(f"obs has {len(obs)} rows, not 1 to {self.limits.encode_rows_max}")
        return EncodeQuery(obs)

    def score(self, params: dict[str, Any], inputs: dict[str, Any]) -> ScoreQuery:
        _converted(params, PlainParams, "params")
        given = _converted(inputs, ScoreInputs, "inputs")
        self._check_units(given.units)
        return ScoreQuery(*self._sequence(given.obs, given.action, given.t, given.dt, 2, self.limits.sequence_max))

    def _sequence(
        self,
        obs_given: Tensor | list[list[float]],
        action_given: Tensor | list[list[float]],
        t: Tensor | list[float] | None,
        dt_given: Tensor | list[float] | None,
        least: int,
        most: int,
    ) -> tuple[Float, Float, Float]:
        obs = self._rows(obs_given, "obs", len(self.obs_low))
        count = len(obs)
        if not least <= count <= most:
            raise _shape(f"obs has {count} rows, not {least} to {most}")
        action = self._rows(action_given, "action", len(self.action_low))
        if len(action) != count - 1:
            raise _shape(f"action has {len(action)} rows for {count - 1} intervals")
        dt = _intervals(t, dt_given, count)
        self._check_dt(dt)
        return obs, action, dt

    def _rows(self, given: Tensor | list[list[float]], what: str, width: int) -> Float:
        rows = _array(given, what)
        if rows.size == 0 and rows.ndim <= 2:
            return np.zeros((0, width), np.float32)
        if rows.ndim != 2 or rows.shape[1] != width:
            raise _shape(f"{what} has shape {list(rows.shape)}, the model takes [n, {width}]")
        _check_finite(rows, what)
        return rows

    def _check_units(self, units: dict[str, str]) -> None:
        for name, unit in units.items():
            known = self.units.get(name)
            if unit != known:
                wanted = "has no such quantity" if known is None else f"takes it in {known!r}"
                raise AetherError("UNIT", f"cannot use {name[:40]!r} in unit {unit[:40]!r}: the model {wanted}")

    def _check_dt(self, dt: Float) -> None:
        if not dt.size:
            return
        low, high = float(dt.min()), float(dt.max())
        if low <= 0:
            raise AetherError("DT_NONPOSITIVE", f"cannot use a time step of {low:g} s: times must increase")
        schema = self.schema
        if low < schema.dt_min_s * (1 - DT_TOLERANCE) or high > schema.dt_max_s * (1 + DT_TOLERANCE):
            odd = high if high > schema.dt_max_s else low
            raise _out_of_range(f"a time step of {odd:g} s", schema.dt_min_s, schema.dt_max_s)

    def _horizons(self, horizons_s: list[float]) -> Float:
        most = self.limits.horizons_max
        if not 1 <= len(horizons_s) <= most:
            raise _shape(f"horizons_s has {len(horizons_s)} values, not 1 to {most}")
        schema = self.schema
        for horizon in horizons_s:
            if not math.isfinite(horizon):
                raise AetherError("NONFINITE", "cannot use horizons_s: it holds NaN or Inf")
            if horizon <= 0:
                raise AetherError("DT_NONPOSITIVE", f"cannot predict {horizon:g} s ahead: a horizon is positive")
            if not schema.dt_min_s <= horizon * (1 + DT_TOLERANCE) or horizon > schema.horizon_max_s:
                raise _out_of_range(f"a horizon of {horizon:g} s", schema.dt_min_s, schema.horizon_max_s)
        return np.array(horizons_s, np.float32)

    def _outside(self, obs: Float, action: Float, held: Float) -> bool:
        actions = np.concatenate([action, held[None]])
        return _beyond(obs, self.obs_low, self.obs_high) or _beyond(actions, self.action_low, self.action_high)


def _beyond(values: Float, low: Float, high: Float) -> bool:
    """Whether any row of values[n, C] lies outside [low[C], high[C]]."""
    return bool(((values < low) | (values > high)).any())


def _bounds(columns: tuple[Quantity, ...]) -> tuple[Float, Float]:
    return (
        np.array([column.min for column in columns], np.float32),
        np.array([column.max for column in columns], np.float32),
    )


def _shape(why: str) -> AetherError:
    return AetherError("SHAPE", f"cannot use the input: {why}")


def _out_of_range(what: str, low_s: float, high_s: float) -> AetherError:
    return AetherError("DT_OUT_OF_RANGE", f"cannot use {what}: the model is valid within {low_s:g} to {high_s:g} s")


def _converted(given: dict[str, Any], to: type[T], what: str) -> T:
    try:
        return msgspec.convert(given, to)
    except msgspec.ValidationError as error:
        code = "SHAPE" if what == "inputs" and _ARRAY_PATH.search(str(error)) else "BAD_FIELD"
        raise AetherError(code, f"cannot read {what}: {error}") from error


def _array(given: Tensor | list[Any], what: str) -> Float:
    """A float32 array of any shape from nested lists of floats or a `Tensor`."""
    if isinstance(given, Tensor):
        return _decoded(given, what)
    try:
        # 1e300 becomes Inf here and is refused as such by the caller; numpy would also warn on stderr
        with np.errstate(over="ignore"):
            return np.array(given, np.float32)
    except ValueError as error:
        raise _shape(f"{what} has rows of different lengths") from error


def _decoded(given: Tensor, what: str) -> Float:
    try:
        raw = base64.b64decode(given.b64, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _shape(f"{what}.b64 is not base64") from error
    if len(given.shape) > 2 or any(not 0 <= extent <= len(raw) for extent in given.shape):
        raise _shape(f"{what}.shape is not the shape of the data")
    if math.prod(given.shape) * 4 != len(raw):
        raise _shape(f"{what} has {len(raw)} bytes of data, its shape needs {math.prod(given.shape) * 4}")
    # astype copies: the buffer of b64decode is read-only and possibly unaligned
    return np.frombuffer(raw, "<f4").reshape(given.shape).astype(np.float32)


def _vector(given: Tensor | list[float], what: str) -> Float:
    values = _array(given, what)
    if values.ndim != 1:
        raise _shape(f"{what} has shape {list(values.shape)}, not one axis")
    return values


def _check_finite(values: npt.NDArray[Any], what: str) -> None:
    if not np.isfinite(values).all():
        raise AetherError("NONFINITE", f"cannot use {what}: it holds NaN, Inf or a number beyond float32")


def _intervals(t: Tensor | list[float] | None, dt: Tensor | list[float] | None, count: int) -> Float:
    """dt[count - 1] from times or intervals, exactly one of which is given (none for a single observation)."""
    if t is not None and dt is not None:
        raise _shape("both t and dt are given")
    if dt is not None:
        values = _vector(dt, "dt")
        if len(values) != count - 1:
            raise _shape(f"dt has {len(values)} values for {count - 1} intervals")
        _check_finite(values, "dt")
        return values
    if t is None:
        if count == 1:
            return np.zeros(0, np.float32)
        raise _shape("neither t nor dt is given")
    # Unix times need float64: float32 resolves them to two minutes
    times = np.array(t, np.float64) if isinstance(t, list) else _decoded(t, "t").astype(np.float64)
    if times.ndim != 1 or len(times) != count:
        raise _shape(f"t has shape {list(times.shape)} for {count} observations")
    _check_finite(times, "t")
    return np.diff(times).astype(np.float32)
