"""The least time that a job can take here: its arithmetic at the measured rate, or its bytes at the disk's, the larger.

Pure. The figures are measured by `engines.machine_limits`, in the same run as what they are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MachineLimits:
    """Rates of this machine at this model's shapes, and what a token costs in this model.

    `gemm` maps rows to FLOP/s of one decoder layer's matrices (weights not in a cache), `int8` the same for W8A8.
    `disk_read` (direct) and `memory_copy` are bytes per second. `linear_flops` are for one token through all layers,
    `head_flops` for one row of logits, `attention_flops` for one pair of positions over all layers.
    """

    gemm: Mapping[int, float]
    int8: Mapping[int, float]
    disk_read: float
    memory_copy: float
    linear_flops: float
    head_flops: float
    attention_flops: float

    @staticmethod
    def from_details(details: Mapping[str, Any]) -> MachineLimits:
        """From the JSON answer of the measuring child (whose mappings have texts as keys)."""
        curves = {name: {int(rows): rate for rows, rate in details[name].items()} for name in ("gemm", "int8")}
        return MachineLimits(**{**details, **curves})

    def rate(self, rows: int, *, int8: bool = False) -> float:
        """FLOP/s at `rows`, between the measured points by logarithm."""
        curve = sorted((self.int8 if int8 else self.gemm).items())
        below = max((point for point in curve if point[0] <= rows), default=curve[0])
        above = min((point for point in curve if point[0] >= rows), default=curve[-1])
        if below[0] == above[0]:
            return below[1]
        place = math.log(rows / below[0]) / math.log(above[0] / below[0])
        return float(below[1] * (above[1] / below[1]) ** place)


@dataclass(frozen=True)
class Work:
    """FLOP of a job: `prefill` for its prompts, `decode` for every token after the first, heads included."""

    prefill: float
    decode: float


def work_of(limits: MachineLimits, lengths: Sequence[int], new_tokens: int, shared: int = 0) -> Work:
    """What must be computed for these prompts. The first `shared` tokens are computed once for all of them."""
    own = [length - shared for length in lengths]
    prefill = limits.linear_flops * (sum(own) + shared) + limits.head_flops * len(own)
    pairs = sum(n * (n + 1) / 2 + n * shared for n in own) + shared * (shared + 1) / 2
    decoded = (new_tokens - 1) * len(own)
    decode = decoded * (limits.linear_flops + limits.head_flops)
    later = sum((new_tokens - 1) * (length + new_tokens / 2) for length in lengths)
    return Work(prefill + limits.attention_flops * pairs, decode + limits.attention_flops * later)


def arithmetic_seconds(limits: MachineLimits, work: Work, decode_rows: int, *, int8: bool = False) -> float:
    """Prefill at the best rate measured, decode at the rate of as many rows as decode together."""
    best = max((limits.int8 if int8 else limits.gemm).values())
    return work.prefill / best + work.decode / limits.rate(max(1, decode_rows), int8=int8)


def job_seconds(limits: MachineLimits, arithmetic: float, read_bytes: int) -> float:
    """The roofline of a job that reads `read_bytes` from disk."""
    return max(arithmetic, read_bytes / limits.disk_read)
