"""The rules of `contract.jobs.check_bounds` in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from aether.api.schemas import refine_optional
from aether.contract import limits

_BYTES_MAX: Final = 1 << 50
_OPTIONAL: Final = {
    **dict.fromkeys(("memory_min_bytes", "memory_low_bytes", "memory_high_bytes", "swap_bytes"), (0, _BYTES_MAX)),
    **dict.fromkeys(("cpu_weight", "io_weight"), (1, limits.WEIGHT_MAX)),
    **dict.fromkeys(("io_read_bps", "io_write_bps", "io_read_iops", "io_write_iops"), (1, _BYTES_MAX)),
}
_TIMES: Final = ("runtime_us", "deadline_us", "period_us")


def refine(schemas: Mapping[str, Any]) -> None:
    """Adds to `Limits` and `Sched`."""
    found = schemas["Limits"]["properties"]
    for name, (low, high) in _OPTIONAL.items():
        refine_optional(found[name], "integer", minimum=low, maximum=high)
    for name in ("cpuset_cpus", "cpuset_mems"):
        refine_optional(found[name], "string", pattern=limits.CPU_LIST_PATTERN, maxLength=limits.CPU_LIST_CHARS_MAX)
    _refine_sched(schemas["Sched"])


def _refine_sched(sched: dict[str, Any]) -> None:
    none = {"const": 0}
    no_times = dict.fromkeys(_TIMES, none)
    times = {name: {"minimum": 2, "maximum": limits.SCHED_PERIOD_US_MAX} for name in _TIMES}
    sched["properties"]["nice"].update(minimum=-20, maximum=19)
    sched["properties"]["io_priority"].update(minimum=0, maximum=7)
    sched["anyOf"] = [
        {"properties": {"policy": {"enum": ["other", "batch"]}, "priority": none, **no_times}},
        {
            "properties": {"policy": {"const": "idle"}, "priority": none, "nice": none, **no_times},
            "required": ["policy"],
        },
        {
            "properties": {
                "policy": {"enum": ["fifo", "rr"]},
                "priority": {"minimum": 1, "maximum": 99},
                "nice": none,
                **no_times,
            },
            "required": ["policy", "priority"],
        },
        {
            "properties": {"policy": {"const": "deadline"}, "priority": none, "nice": none, **times},
            "required": ["policy", *_TIMES],
        },
    ]
