"""Between aurorad and a model runtime (cfcd), and the documents of a model package.

**Frames.** One connected AF_UNIX stream socket that the runtime inherits; `codec` frames of msgpack maps. The runtime
sends `Hello` once, then one `InferReply` for each `InferRequest`, in any order. `params` and `inputs` of a request are
those of the job, unread by anyone before: the runtime parses them into the types here, and a wrong one is answered
with an error for that request alone. `result` is JSON text, so that nobody between the runtime and the client needs
to decode it. EOF from the peer, or SIGTERM, ends the runtime.

**Tensors** are nested lists of numbers or `Tensor`; float32 either way. In a sequence of n observations, `action` and
`dt` have n - 1 rows: row k belongs to the interval from observation k to observation k + 1.

**Packages.** `manifest.json` names every other file by digest and is signed (DSSE, Ed25519) in
`signature.dsse.json`; the digest of a package is the digest of `manifest.json`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from aether.contract.errors import ErrorBody
from aether.contract.jobs import ModelOp

PROTOCOL_VERSION: Final = 1
PACKAGE_SCHEMA_VERSION: Final = 1
MANIFEST_PAYLOAD_TYPE: Final = "application/vnd.aether.model-manifest+json"

# ---- inputs of the three operations


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A float32 array, row-major and little-endian, in base64."""

    dtype: Literal["f32"]
    shape: tuple[int, ...]
    b64: str


Vector = Tensor | list[float]
Matrix = Tensor | list[list[float]]


class History(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was seen up to now: obs[n, O], action[n-1, A], and either times t[n] or intervals dt[n-1], in s."""

    obs: Matrix
    action: Matrix = []
    t: Vector | None = None
    dt: Vector | None = None


class PredictParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """1 to 64 horizons in s after the last observation."""

    model: str
    horizons_s: list[float]


class PlainParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`encode_state` and `score_sequence` need the model alone."""

    model: str
    horizons_s: None = None


class PredictInputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`predict_next_state`: action[A] is held from the last observation on. `units` maps names to units."""

    history: History
    action: Vector
    units: dict[str, str] = {}


class EncodeInputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`encode_state`: obs[B, O]."""

    obs: Matrix
    units: dict[str, str] = {}


class ScoreInputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`score_sequence`: obs[n, O] with n >= 2, action[n-1, A], and either t[n] or dt[n-1], in s."""

    obs: Matrix
    action: Matrix
    t: Vector | None = None
    dt: Vector | None = None
    units: dict[str, str] = {}


# ---- frames


class InferRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`batch_key` stands for tenant and labels: two keys never share a batch. `deadline_ms` counts from receipt."""

    request_id: str
    op: ModelOp
    model_id: str
    model_version: str
    params: dict[str, Any]
    inputs: dict[str, Any]
    batch_key: str
    deadline_ms: int = 10_000


class InferReply(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly one of `result` (JSON text) and `error` is set. `infer_us` is the whole batch's time."""

    request_id: str
    ok: bool
    result: bytes | None
    error: ErrorBody | None
    batch_size: int
    infer_us: int
    queue_us: int


# ---- results (as JSON text)


class HorizonPrediction(msgspec.Struct, frozen=True, kw_only=True):
    """At one horizon: mean[O], std[O], interval90[O][2] (conformal), z_hat[d].

    `extrapolating`: the horizon is longer than any trained interval, or an input lies outside the schema's ranges.
    """

    horizon_s: float
    mean: list[float]
    std: list[float]
    interval90: list[tuple[float, float]]
    z_hat: list[float]
    extrapolating: bool


class PredictResult(msgspec.Struct, frozen=True, kw_only=True):
    predictions: list[HorizonPrediction]


class EncodeResult(msgspec.Struct, frozen=True, kw_only=True):
    z: list[list[float]]


class ScoreResult(msgspec.Struct, frozen=True, kw_only=True):
    """Lists have one entry per interval. `surprise` is the z-score of log energy among intervals of like dt and age.

    `p_value` is conformal; `seq_score` is the mean of the three largest surprises, to be compared with `threshold`.
    """

    energy: list[float]
    surprise: list[float]
    nll: list[float]
    p_value: list[float]
    seq_score: float
    threshold_id: str
    threshold: float


# ---- the package's documents

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
Positive = Annotated[int, msgspec.Meta(ge=1)]
PositiveReal = Annotated[float, msgspec.Meta(gt=0)]


class Quantity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One column of an observation or action; `min` and `max` are the trained range."""

    name: str
    unit: str
    min: float
    max: float


class ModelSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`schema.json`: what goes in, what comes out, and where the model may be asked. `state_layout` describes h."""

    schema_version: int
    predictor: str
    observation: tuple[Quantity, ...]
    action: tuple[Quantity, ...]
    time_unit: str
    dt_min_s: PositiveReal
    dt_max_s: PositiveReal
    horizon_max_s: PositiveReal
    latent_size: Positive
    state_size: Positive
    state_layout: str


class Threshold(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An alarm level of `seq_score` for sequences of at most `intervals_max` intervals."""

    id: str
    intervals_max: Positive
    value: float


class ModelStats(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`stats.json`: training statistics and calibration tables.

    age = observations seen so far; `age_edges[i]` is the least age of class i. `interval_factor[age][horizon][O]`
    multiplies the predicted std to the conformal 90% half-width; `log_energy_*[age][dt]` standardise surprise;
    `surprise_sorted` are order statistics of calibration surprises.
    """

    schema_version: int
    obs_mean: tuple[float, ...]
    obs_std: tuple[float, ...]
    dt_mean_s: PositiveReal
    age_edges: tuple[int, ...]
    horizon_edges_s: tuple[float, ...]
    interval_factor: tuple[tuple[tuple[float, ...], ...], ...]
    dt_edges_s: tuple[float, ...]
    log_energy_mean: tuple[tuple[float, ...], ...]
    log_energy_std: tuple[tuple[float, ...], ...]
    surprise_sorted: tuple[float, ...]
    thresholds: tuple[Threshold, ...]
    gate_mean: float
    gate_std: float


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    sha256: Sha256
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]


class RuntimeLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one request may ask of this package."""

    history_max: Positive
    sequence_max: Positive
    horizons_max: Positive
    encode_rows_max: Positive


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the package came to be: the command that makes it again, its seed, and the library that trained it."""

    command: str
    seed: int
    trained_with: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`manifest.json`, canonical JSON. `files` holds every file but this one and the signature."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9_-]{0,62}[a-z0-9])?$")]
    version: Annotated[str, msgspec.Meta(pattern=r"^(0|[1-9][0-9]{0,5})(\.(0|[1-9][0-9]{0,5})){2}$")]
    schema_version: int
    created: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{6}Z$")]
    files: dict[str, FileEntry]
    limits: RuntimeLimits
    opset: int
    provenance: Provenance


class DsseSignature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`keyid` is `sha256:` of the public key's DER SubjectPublicKeyInfo; a hint, never trusted."""

    keyid: Sha256
    sig: str


class DsseEnvelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`signature.dsse.json` (DSSE v1.0): base64 payload, its type, signatures over `dsse_message`."""

    payload: str
    payloadType: Literal["application/vnd.aether.model-manifest+json"]  # noqa: N815  (the specification's name)
    signatures: Annotated[tuple[DsseSignature, ...], msgspec.Meta(min_length=1)]


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded model as `Hello` shows it."""

    id: str
    version: str
    digest: str
    schema: ModelSchema
    limits: RuntimeLimits


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """The first frame from a runtime: every model in it is verified and has passed its golden vectors."""

    protocol_version: int
    pid: int
    models: tuple[ModelInfo, ...]


def dsse_message(payload_type: str, payload: bytes) -> bytes:
    """DSSE v1.0 pre-authentication encoding: the bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
