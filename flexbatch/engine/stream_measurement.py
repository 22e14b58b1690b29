"""Measures what streaming from disk takes from the products beside it, where both share a processor."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import torch

from flexbatch.engine.linear_layers import product
from flexbatch.engine.rehearsal import random_values
from flexbatch.memory.blocked_weight import suits
from flexbatch.memory.direct_io import AlignedBuffer, DirectReader
from flexbatch.memory.float_layout import float_layout
from flexbatch.memory.safetensors_header import TensorEntry
from flexbatch.memory.transfer import StreamTensor, StreamUnit, WeightStream
from flexbatch.plan.placement import stream_bytes

WIDTH, ROWS = 2048, 256
MATRICES = 6
"""Of a unit, as a decoder layer of this width has them: 50 MB."""
LAPS = 2


@torch.inference_mode()
def streaming_cost(file: Path, cores: int) -> float:
    """Core-seconds for a byte of `file`, streamed as weights are and multiplied with: the stream's own work, and what
    products lose to it (memory, caches, Python's lock). Waiting for the disk does not count."""
    inputs = random_values((ROWS, WIDTH), torch.bfloat16, torch.device("cpu"))
    units = list(_units(file, _matrix_bytes()))
    if not units:
        return 0.0
    resident = [AlignedBuffer(MATRICES * _matrix_bytes()).tensor.random_() for _ in range(2)]
    before = _alone(inputs, resident, LAPS * len(units))
    streamed = _streamed(inputs, units)
    after = _alone(inputs, resident, LAPS * len(units))
    nbytes = LAPS * len(units) * MATRICES * _matrix_bytes()
    return max(0.0, streamed - (before + after) / 2) * cores / nbytes


def _units(file: Path, nbytes: int) -> Iterable[StreamUnit]:
    for unit in range(file.stat().st_size // (MATRICES * nbytes)):
        entries = (
            TensorEntry(f"{unit}.{index}", file, (unit * MATRICES + index) * nbytes, nbytes, "U8", (nbytes,))
            for index in range(MATRICES)
        )
        yield StreamUnit(str(unit), tuple(StreamTensor(entry.name, entry) for entry in entries))


def _streamed(inputs: torch.Tensor, units: list[StreamUnit]) -> float:
    """Seconds of products with all units, in turn and several times over, without what was spent waiting."""
    cpu = torch.device("cpu")
    budget, reader = stream_bytes(WeightStream.required_bytes(units, cpu)), DirectReader()
    stream = WeightStream(units, reader=reader, budget_bytes=budget, device=cpu)
    try:
        started = time.perf_counter()
        for unit in units * LAPS:
            for stored in stream.acquire(unit.name).values():
                product(inputs, _weight(stored))
            stream.release(unit.name)
        return time.perf_counter() - started - stream.statistics().wait_seconds
    finally:
        stream.close()
        reader.close()


def _alone(inputs: torch.Tensor, resident: list[torch.Tensor], units: int) -> float:
    """Seconds of products with so many units that lie in memory, each too large for a cache."""
    nbytes, started = _matrix_bytes(), time.perf_counter()
    for unit in range(units):
        for index in range(MATRICES):
            product(inputs, _weight(resident[unit % len(resident)][index * nbytes : (index + 1) * nbytes]))
    return time.perf_counter() - started


def _weight(stored: torch.Tensor) -> torch.Tensor:
    """The weight over its bytes, as a packed checkpoint keeps it here."""
    if suits(torch.bfloat16):
        return float_layout((WIDTH, WIDTH)).weight(stored)
    return stored.view(torch.bfloat16).view(WIDTH, WIDTH)


def _matrix_bytes() -> int:
    return float_layout((WIDTH, WIDTH)).nbytes if suits(torch.bfloat16) else WIDTH * WIDTH * 2
