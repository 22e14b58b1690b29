"""How fast a CPU is now, beside the time at which it was measured.

What other tenants of a machine take can halve its speed for hours (docs/benchmarks.md), and for a second. A look at
three of the rates says by how much; what it finds is believed when two more, some seconds apart, find it too. Each of
the other rates goes with the one that it is likest.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from flexbatch.engine.attention_rates import decode_attention_work
from flexbatch.engine.product_rates import HIDDEN, gemm_works, int8_works, type_name
from flexbatch.engine.rehearsal import half_type
from flexbatch.engine.timing import medians
from flexbatch.plan.hardware import HardwareProfile

CPU = torch.device("cpu")
ROWS = 256
WEIGHT_BYTES = 128 << 20
"""Of the weights: less than when the machine is measured, because a run has to have the room; at these rows it makes
five parts in a hundred."""
LAPS, SECONDS = 5, 0.06
"""Of a look: over all rates in turn, and of each."""
LOOKS, PAUSE = 3, 2.5
"""As many must agree, and the seconds between them."""
CLEAR = 1.25
"""A difference by less than this factor is chance."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Factors by which a machine is faster now than when it was measured: in products of floats and of 8-bit integers,
    and in what reads memory with vector instructions."""

    products: float
    integers: float
    vectors: float


def present_speed(measured: HardwareProfile) -> Speed:
    """What this CPU, of which `measured` was kept, is at present: a second and a half, or ten where it is another."""
    half = half_type(CPU)
    works = {
        "products": gemm_works(CPU, half, [ROWS], WEIGHT_BYTES)[ROWS],
        "integers": int8_works([ROWS], WEIGHT_BYTES)[ROWS],
        "vectors": decode_attention_work(CPU),
    }
    then = {
        "products": measured.gemm_rate(type_name(half), ROWS, HIDDEN),
        "integers": measured.gemm_rate("int8", ROWS, HIDDEN),
        "vectors": measured.attention_bytes,
    }
    looks: list[dict[str, float]] = []
    while len(looks) < LOOKS:
        now = medians([{name: work.rate(SECONDS) for name, work in works.items()} for _ in range(LAPS)])
        looks.append({name: now[name] / then[name] for name in works})
        speed = Speed(**{name: agreed([look[name] for look in looks]) for name in works})
        if speed == Speed(1.0, 1.0, 1.0):
            break
        if len(looks) < LOOKS:
            time.sleep(PAUSE)
    return speed


def agreed(factors: Sequence[float]) -> float:
    """The least difference that all of these show; 1 where one shows none that is clear, or the opposite."""
    slowest, fastest = min(factors), max(factors)
    if slowest >= CLEAR:
        return slowest
    return fastest if fastest <= 1.0 / CLEAR else 1.0


def at_speed(measured: HardwareProfile, speed: Speed) -> HardwareProfile:
    """The profile of a CPU that is so much faster now."""
    factors = {kind: speed.integers if kind == "int8" else speed.products for kind in measured.gemm}
    return replace(
        measured,
        gemm={
            kind: tuple((rows, rate * factors[kind]) for rows, rate in curve) for kind, curve in measured.gemm.items()
        },
        attention_flops=measured.attention_flops * speed.products,
        attention_bytes=measured.attention_bytes * speed.vectors,
        host_attention_bytes=measured.host_attention_bytes * speed.vectors,
        packed_attention_numbers=measured.packed_attention_numbers * speed.vectors,
        compressed_attention_numbers=measured.compressed_attention_numbers * speed.vectors,
        activation_numbers=measured.activation_numbers * speed.vectors,
        dequantize_numbers=measured.dequantize_numbers * speed.vectors,
        expansion_numbers=measured.expansion_numbers * speed.vectors,
        memory_copy=measured.memory_copy * speed.vectors,
        layer_call_seconds=measured.layer_call_seconds / speed.vectors,
        pass_seconds=measured.pass_seconds / speed.vectors,
    )
