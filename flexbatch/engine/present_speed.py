"""How fast a CPU is now, beside the time at which it was measured.

What other tenants of a machine take can halve its speed for hours (docs/benchmarks.md). A second's look at three of
the rates says by how much; each of the others goes with the one that it is likest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flexbatch.engine.measurement import decode_attention_work
from flexbatch.engine.product_rates import HIDDEN, gemm_work, int8_work, type_name
from flexbatch.engine.rehearsal import half_type
from flexbatch.engine.timing import medians
from flexbatch.plan.hardware import HardwareProfile

CPU = torch.device("cpu")
ROWS = 256
LOOKS, SECONDS = 5, 0.06
"""At each of the rates, in turn, and of each: other tenants come and go within a second."""
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
    """A look at this CPU, of which `measured` was kept: about a second."""
    works = {"products": gemm_work(CPU, ROWS), "integers": int8_work(ROWS), "vectors": decode_attention_work(CPU)}
    now = medians([{name: work.rate(SECONDS) for name, work in works.items()} for _ in range(LOOKS)])
    then = {
        "products": measured.gemm_rate(type_name(half_type(CPU)), ROWS, HIDDEN),
        "integers": measured.gemm_rate("int8", ROWS, HIDDEN),
        "vectors": measured.attention_bytes,
    }
    return Speed(**{name: _clear(now[name] / then[name]) for name in works})


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
        activation_numbers=measured.activation_numbers * speed.vectors,
        dequantize_numbers=measured.dequantize_numbers * speed.vectors,
        memory_copy=measured.memory_copy * speed.vectors,
        layer_call_seconds=measured.layer_call_seconds / speed.vectors,
        pass_seconds=measured.pass_seconds / speed.vectors,
    )


def _clear(factor: float) -> float:
    """1 where it may be chance."""
    return 1.0 if 1.0 / CLEAR < factor < CLEAR else factor
