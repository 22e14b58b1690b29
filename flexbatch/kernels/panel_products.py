"""Matrix products on a CPU with AVX2 that multiplies neither bfloat16 nor 8-bit integers by itself.

torch's products of bfloat16 reach a sixth of the rate of float32 on such a processor, those of int8 a hundredth
(docs/benchmarks.md). Here a block of the weight is widened to float32 or int16 where the cache holds it, and is
multiplied there by all rows (or as many as `PANEL_BYTES` hold) before the next one: memory is read in the weight's
own, narrow form.

Sums of bfloat16 are float32, added up in one order whatever rows are beside a row; those of int8 are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from flexbatch.kernels.floats import narrowed, widened
from flexbatch.kernels.register_tiles import PANEL, TILE, float_tile, pair_tile
from flexbatch.kernels.threads import new_counter, on_all_threads, take
from flexbatch.kernels.vectors import multiplies_floats, multiplies_integers

BLOCK = 8 * TILE
"""Most rows of the weight that are widened at a time."""
STEPS = 512
"""Numbers, or pairs of them, of each of these rows: with them a block takes 100 kB of the second cache."""
STRIDE = STEPS + 16
"""From one widened row to the next: no power of two, or the rows would share a few lines of the cache."""
PANEL_BYTES = 8 << 20
"""Most memory for widened inputs."""


def suit(dtype: torch.dtype) -> bool:
    """Whether these are this CPU's way to multiply numbers of this type: torch has none that is fast."""
    if not multiplies_floats():
        return False
    if dtype == torch.int8:
        return not multiplies_integers()
    by_torch = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # type: ignore[no-untyped-call]
    return dtype == torch.bfloat16 and not by_torch


def float_product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`rows` bfloat16 `[rows, in]` times `weight` bfloat16 `[out, in]` plus `bias` bfloat16 `[out]`, all contiguous:
    summed in float32, rounded once to bfloat16 `[rows, out]`."""
    out = torch.empty(len(rows), len(weight), dtype=torch.bfloat16)
    offset = np.zeros(len(weight), np.float32) if bias is None else bias.float().numpy()
    source, target = _bits(rows), _bits(out)
    right, block = _bits(weight), _block(len(weight))
    for chunk in _chunks(*rows.shape):
        left, result = source[chunk], target[chunk]
        panels = np.empty(_panels(len(left)) * left.shape[1] * PANEL, np.float32)
        _on_threads(_pack_floats, left, panels)
        _on_threads(_multiply_floats, right, block, panels, offset, result)
    return out


def integer_sums(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`values` int8 `[rows, in]` times `weight` int8 `[out, in]`, both contiguous: exact, int32 `[rows, out]`."""
    out = torch.empty(len(values), len(weight), dtype=torch.int32)
    source, target, right, block = values.numpy(), out.numpy(), weight.numpy(), _block(len(weight))
    for chunk in _chunks(*values.shape):
        left, result = source[chunk], target[chunk]
        panels = np.empty(_panels(len(left)) * _pairs(left.shape[1]) * PANEL, np.int32)
        _on_threads(_pack_pairs, left, panels)
        _on_threads(_multiply_pairs, right, block, panels, result)
    return out


def _bits(numbers: torch.Tensor) -> Any:
    return numbers.view(torch.uint16).numpy()


def _block(rows: int) -> int:
    """Rows of a block, so that all threads have as many."""
    threads = torch.get_num_threads()
    blocks = -(-rows // (BLOCK * threads)) * threads
    return -(-rows // (blocks * TILE)) * TILE


def _chunks(rows: int, numbers: int) -> list[slice]:
    """Rows whose panels are in memory together, in whole panels."""
    step = max(1, PANEL_BYTES // (4 * max(1, numbers) * PANEL)) * PANEL
    return [slice(first, min(rows, first + step)) for first in range(0, rows, step)]


def _on_threads(kernel: Any, *arguments: Any) -> None:
    counter = new_counter()
    on_all_threads(lambda _first, _step: kernel(counter, *arguments))


@njit(nogil=True)
def _panels(rows: int) -> int:
    return (rows + PANEL - 1) // PANEL


@njit(nogil=True)
def _pairs(numbers: int) -> int:
    return (numbers + 1) // 2


@njit(nogil=True, inline="always")
def _pair(first: Any, second: Any) -> Any:
    return np.int32((np.int32(second) << np.int32(16)) | (np.int32(first) & np.int32(0xFFFF)))


@njit(nogil=True, cache=True, error_model="numpy")
def _pack_floats(counter: Any, rows: Any, panels: Any) -> None:
    """Every panel that `counter` gives: a step's numbers of all its rows side by side, zeros where none is."""
    count, numbers = rows.shape
    panel = take(counter)
    while panel < _panels(count):
        for lane in range(PANEL):
            row, at = panel * PANEL + lane, panel * numbers * PANEL + lane
            for index in range(numbers):
                panels[at + index * PANEL] = widened(rows[row, index]) if row < count else np.float32(0)
        panel = take(counter)


@njit(nogil=True, cache=True, error_model="numpy")
def _pack_pairs(counter: Any, rows: Any, panels: Any) -> None:
    """The same of pairs; beside the last of an odd number is a zero."""
    count, numbers = rows.shape
    steps, panel = _pairs(numbers), take(counter)
    while panel < _panels(count):
        for lane in range(PANEL):
            row, at = panel * PANEL + lane, panel * steps * PANEL + lane
            for index in range(steps):
                last = 2 * index + 1 == numbers
                pair = _pair(rows[row, 2 * index], 0 if last else rows[row, 2 * index + 1]) if row < count else 0
                panels[at + index * PANEL] = pair
        panel = take(counter)


@njit(nogil=True)
def _widen_floats(source: Any, start: int, count: int, wide: Any, at: int) -> None:
    target, numbers = wide[at : at + count], source[start : start + count]
    for index in range(count):
        target[index] = widened(numbers[index])


@njit(nogil=True)
def _widen_pairs(source: Any, start: int, count: int, wide: Any, at: int) -> None:
    """`count` pairs from pair number `start` on."""
    halves = wide.view(np.int16)[2 * at : 2 * (at + count)]
    numbers = source[2 * start : 2 * (start + count)]
    halves[-1] = 0
    for index in range(len(numbers)):
        halves[index] = np.int16(numbers[index])


def _sums(tile: Any, widen: Any) -> Any:
    """The sums of `rows` rows of the weight from `base` on, for `panels` of `steps` steps: into `out`, panel by panel,
    row by row. `wide` is room for a widened block."""

    @njit(nogil=True)
    def sums(weight: Any, base: int, rows: int, panels: Any, steps: int, wide: Any, out: Any) -> None:
        out[:] = 0
        for start in range(0, steps, STEPS):
            count = min(STEPS, steps - start)
            for row in range(rows):
                widen(weight[base + row], start, count, wide, row * STRIDE)
            for panel in range(len(panels) // (steps * PANEL)):
                for row in range(0, rows, TILE):
                    to = (panel * BLOCK + row) * PANEL
                    tile(wide, row * STRIDE, STRIDE, panels, (panel * steps + start) * PANEL, count, out, to)

    return sums


_float_sums, _pair_sums = _sums(float_tile, _widen_floats), _sums(pair_tile, _widen_pairs)


@njit(nogil=True, cache=True, error_model="numpy")
def _multiply_floats(counter: Any, weight: Any, block: int, panels: Any, offset: Any, out: Any) -> None:
    """Every block of the weight that `counter` gives."""
    rows, numbers = len(out), weight.shape[1]
    wide, sums = np.zeros(BLOCK * STRIDE, np.float32), np.empty(_panels(rows) * BLOCK * PANEL, np.float32)
    base = take(counter) * block
    while base < len(weight):
        count = min(block, len(weight) - base)
        _float_sums(weight, base, count, panels, numbers, wide, sums)
        for row in range(rows):
            at, target = (row // PANEL * BLOCK) * PANEL + row % PANEL, out[row, base : base + count]
            for column in range(count):
                target[column] = narrowed(sums[at + column * PANEL] + offset[base + column])
        base = take(counter) * block


@njit(nogil=True, cache=True, error_model="numpy")
def _multiply_pairs(counter: Any, weight: Any, block: int, panels: Any, out: Any) -> None:
    """Every block of the weight that `counter` gives."""
    rows, steps = len(out), _pairs(weight.shape[1])
    wide, sums = np.zeros(BLOCK * STRIDE, np.int32), np.empty(_panels(rows) * BLOCK * PANEL, np.int32)
    base = take(counter) * block
    while base < len(weight):
        count = min(block, len(weight) - base)
        _pair_sums(weight, base, count, panels, steps, wide, sums)
        for row in range(rows):
            at, target = (row // PANEL * BLOCK) * PANEL + row % PANEL, out[row, base : base + count]
            for column in range(count):
                target[column] = sums[at + column * PANEL]
        base = take(counter) * block
