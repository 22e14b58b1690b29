"""The figures of one machine: how fast it multiplies, reads, copies, and how much room each tier has."""

from __future__ import annotations

import dataclasses
import difflib
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexbatch.config import parse_bytes
from flexbatch.errors import ConfigError

Curve = tuple[tuple[int, float], ...]
"""Pairs (rows, FLOP/s) or (hidden size, part of the full rate), by rising first."""

FORMATS = ("float32", "bfloat16", "float16", "int8", "compressed")
DEVICES = ("cpu", "cuda", "mps")


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """One machine, seen from the engine. Sizes in bytes, rates per second. `device` is where the maths runs.

    `device_memory`, `host_memory` and `disk_space` are what is really free. On a machine without an accelerator the
    device is main memory, `host_memory` is 0 and the two link rates do not matter.

    `gemm` maps a number format to its rate in FLOP/s against the rows of the product, weights cold and 4096 wide
    (`compressed`: bfloat16 weights that are compressed without loss and expanded within the product; where it is
    missing, they are expanded before it); `gemm_width` says what part of it is left at other hidden sizes.
    `activation_numbers` per second pass through what lies between the products (norms, residuals, activation functions,
    copies).
    `attention_flops` is the prefill attention's rate in FLOP/s, `attention_bytes` the KV bytes per second that decode
    attention reads on the device, `host_attention_bytes` the same by the CPU in main memory, `packed_attention_numbers`
    the packed KV numbers that it reads on the device as they are kept (0: it expands them), and
    `compressed_attention_numbers` those of a cache that is compressed without loss (0: there is none). `memory_touch`
    is how fast main memory is found and cleared when it is first used. `dequantize_numbers` are packed numbers expanded
    per second, `expansion_numbers` those of weights compressed without loss (0: as many as packed ones).
    `read_cpu_seconds` is processor time for one byte read from disk, which a CPU device takes away from its arithmetic
    (what reading does to the caches included). `layer_call_seconds` is what one layer costs besides what the other
    terms count, `pass_seconds` what one pass costs besides its layers. `process_bytes` is device memory in use before
    any weight.
    """

    name: str
    device: str
    cores: int
    device_memory: int
    host_memory: int
    disk_space: int
    gemm: Mapping[str, Curve]
    gemm_width: Curve
    activation_numbers: float
    attention_flops: float
    attention_bytes: float
    host_attention_bytes: float
    packed_attention_numbers: float
    memory_copy: float
    memory_touch: float
    disk_read: float
    disk_write: float
    host_to_device: float
    device_to_host: float
    dequantize_numbers: float
    read_cpu_seconds: float
    layer_call_seconds: float
    pass_seconds: float
    process_bytes: int
    compressed_attention_numbers: float = 0.0
    expansion_numbers: float = 0.0

    def gemm_rate(self, kind: str, rows: float, width: int = 4096) -> float:
        """FLOP/s of a linear layer of this hidden size with this many rows."""
        curve = self.gemm[kind]
        few = min(1.0, max(rows, 1e-9) / curve[0][0])
        return few * _between(curve, rows) * _between(self.gemm_width, width)

    @property
    def has_accelerator(self) -> bool:
        return self.device != "cpu"


def _between(curve: Curve, place: float) -> float:
    """The curve's value, between its points by logarithm, beyond them as at its ends."""
    if place <= curve[0][0]:
        return curve[0][1]
    if place >= curve[-1][0]:
        return curve[-1][1]
    high = bisect_left(curve, (place, 0.0))
    (low_place, low_value), (high_place, high_value) = curve[high - 1], curve[high]
    part = math.log(place / low_place) / math.log(high_place / low_place)
    return float(low_value * (high_value / low_value) ** part)


_BYTES = ("device_memory", "host_memory", "disk_space", "process_bytes")
_NOT_THERE = {
    field.name: field.default
    for field in dataclasses.fields(HardwareProfile)
    if field.default is not dataclasses.MISSING
}
"""What a hardware file need not say."""
_MAY_BE_ZERO = {
    *_NOT_THERE,
    "host_memory",
    "packed_attention_numbers",
    "read_cpu_seconds",
    "layer_call_seconds",
    "pass_seconds",
    "process_bytes",
}


def profile_from_mapping(figures: Mapping[str, Any], *, where: str) -> HardwareProfile:
    """A checked profile from the mapping of a hardware file. `ConfigError` names the key, its value and `where`."""
    fields = [field.name for field in dataclasses.fields(HardwareProfile)]
    for key in figures:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            raise _wrong(where, key, f"is not a figure of a machine{f'; did you mean {near[0]}?' if near else ''}")
    figures = {**_NOT_THERE, **figures}
    missing = [field for field in fields if figures.get(field) is None]
    if missing:
        raise _wrong(where, missing[0], "is missing")
    values: dict[str, Any] = {"name": str(figures["name"]), "device": str(figures["device"])}
    if values["device"] not in DEVICES:
        raise _wrong(where, "device", f"is {values['device']!r}; it must be one of {', '.join(DEVICES)}")
    for field in fields[2:]:
        if field == "gemm":
            values[field] = _curves(figures[field], where)
        elif field == "gemm_width":
            values[field] = _curve(figures[field], where, field)
        elif field in _BYTES:
            values[field] = int(_number(_size(figures[field], where, field), where, field))
        else:
            values[field] = _number(figures[field], where, field)
    values["cores"] = int(values["cores"])
    if values["device"] != "cpu" and values["host_memory"] <= 0:
        raise _wrong(where, "host_memory", "is 0; a machine with an accelerator has main memory too")
    if values["process_bytes"] >= values["device_memory"]:
        raise _wrong(where, "process_bytes", "is not smaller than device_memory")
    return HardwareProfile(**values)


def profile_to_mapping(profile: HardwareProfile) -> dict[str, Any]:
    """The mapping that `profile_from_mapping` reads back, of plain numbers and texts."""
    figures = {field.name: getattr(profile, field.name) for field in dataclasses.fields(profile)}
    figures["gemm_width"] = {str(width): part for width, part in profile.gemm_width}
    figures["gemm"] = {kind: {str(rows): rate for rows, rate in curve} for kind, curve in profile.gemm.items()}
    return figures


def _size(value: Any, where: str, key: str) -> Any:
    return parse_bytes(value, key=f"{where}: {key}") if isinstance(value, str) else value


def _number(value: Any, where: str, key: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise _wrong(where, key, f"is {value!r}, which is not a number") from None
    least = 0.0 if key in _MAY_BE_ZERO else math.ulp(0.0)
    if not least <= number < math.inf:
        raise _wrong(where, key, f"is {value!r}; it must be a {'number from 0' if least == 0 else 'positive number'}")
    return number


def _curves(value: Any, where: str) -> dict[str, Curve]:
    if not isinstance(value, Mapping) or not value:
        raise _wrong(where, "gemm", f"is {value!r}; it must map a number format to rates by rows")
    curves = {}
    for kind, points in value.items():
        if kind not in FORMATS:
            raise _wrong(where, f"gemm.{kind}", f"is not a number format; use {', '.join(FORMATS)}")
        curves[str(kind)] = _curve(points, where, f"gemm.{kind}")
    return curves


def _curve(points: Any, where: str, key: str) -> Curve:
    if not isinstance(points, Mapping) or not points:
        raise _wrong(where, key, f"is {points!r}; it must map whole numbers to rates")
    pairs = (
        (int(_number(place, where, key)), _number(rate, where, f"{key}.{place}")) for place, rate in points.items()
    )
    return tuple(sorted(pairs))


def _wrong(where: str, key: str, what: str) -> ConfigError:
    return ConfigError(
        f"{where}: {key} {what}.", remedy="Correct the hardware file; conf/hardware holds complete examples."
    )
