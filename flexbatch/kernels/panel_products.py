"""Matrix products of many rows on a CPU with AVX2: a block of the weight is widened to float32 or int16 where the
cache holds it, and multiplied there by all rows (or as many as `PANEL_BYTES` hold) before the next one. So memory is
read in the weight's own, narrow form.

Sums of bfloat16 are float32, added up in one order whatever rows are beside a row; those of int8 are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numba.extending import register_jitable

from flexbatch.kernels.flat_memory import bits
from flexbatch.kernels.floats import widened
from flexbatch.kernels.register_tiles import (
    LANES,
    NARROW_TILE,
    PANEL,
    TILE,
    float_tile,
    narrow_float_tile,
    narrow_pair_tile,
    pair_tile,
)
from flexbatch.kernels.result_memory import result
from flexbatch.kernels.sums import exact, rounded
from flexbatch.kernels.threads import share_out, take

BLOCK = 8 * TILE
"""Most rows of the weight that are widened at a time."""
STEPS = 512
"""Numbers, or pairs of them, of each of these rows: with them a block takes 100 kB of the second cache."""
STRIDE = STEPS + 16
"""From one widened row to the next: no power of two, or the rows would share a few lines of the cache."""
PACKING = 32
"""Multiplications that take as long as laying a number of the inputs into its panel."""
PANEL_BYTES = 8 << 20
"""Most memory for widened inputs."""


def float_product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`rows` bfloat16 `[rows, in]` times `weight` bfloat16 `[out, in]` plus `bias` bfloat16 `[out]`, all contiguous:
    summed in float32, rounded once to bfloat16 `[rows, out]`."""
    out = result((len(rows), len(weight)), torch.bfloat16)
    offset = np.zeros(len(weight), np.float32) if bias is None else bias.float().numpy()
    right = bits(weight), _block(len(weight)), offset
    _multiply(_pack_floats, _multiply_floats, bits(rows), right, rows.shape[1], torch.float32, bits(out))
    return out


def integer_sums(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`values` int8 `[rows, in]` times `weight` int8 `[out, in]`, both contiguous: exact, int32 `[rows, out]`."""
    out = result((len(values), len(weight)), torch.int32)
    right = weight.numpy(), _block(len(weight))
    _multiply(_pack_pairs, _multiply_pairs, values.numpy(), right, -(-values.shape[1] // 2), torch.int32, out.numpy())
    return out


def _multiply(pack: Any, multiply: Any, left: Any, right: tuple[Any, ...], steps: int, number: Any, out: Any) -> None:
    """All rows of `left`, packed to panels of `steps` steps, times `right`, into `out`."""
    for chunk in _chunks(len(left), steps):
        rows = left[chunk]
        # torch's memory begins at a line of the cache: vectors that cross into a second one take longer.
        panels = torch.empty(_panels(len(rows)) * steps * PANEL, dtype=number).numpy()
        share_out(pack, rows, panels, operations=PACKING * panels.size)
        share_out(multiply, *right, panels, out[chunk], operations=out.shape[1] * panels.size)


def _block(rows: int) -> int:
    """Rows of a block, so that all threads have as many."""
    threads = torch.get_num_threads()
    blocks = -(-rows // (BLOCK * threads)) * threads
    return -(-rows // (blocks * TILE)) * TILE


def _chunks(rows: int, steps: int) -> list[slice]:
    """Rows whose panels are in memory together, in whole panels."""
    step = max(1, PANEL_BYTES // (4 * max(1, steps) * PANEL)) * PANEL
    return [slice(first, min(rows, first + step)) for first in range(0, rows, step)]


@register_jitable
def _panels(rows: int) -> int:
    return -(-rows // PANEL)


@njit(nogil=True, inline="always")
def _float(numbers: Any, index: int) -> Any:
    return widened(numbers[index])


@njit(nogil=True, inline="always")
def _pair(numbers: Any, index: int) -> Any:
    """Beside the last of an odd number is a zero."""
    second = np.int32(numbers[2 * index + 1]) if 2 * index + 1 < len(numbers) else np.int32(0)
    return np.int32((second << np.int32(16)) | (np.int32(numbers[2 * index]) & np.int32(0xFFFF)))


def _packing(of: Any) -> Any:
    """Fills every panel that `counter` gives: a step's numbers of all its rows side by side, zeros where no row is.
    `of(row, step)` is a row's number for a step."""

    @njit(nogil=True)
    def pack(counter: Any, rows: Any, panels: Any) -> None:
        count = len(rows)
        steps, panel = len(panels) // (_panels(count) * PANEL), take(counter)
        while panel < _panels(count):
            for lane in range(PANEL):
                row, at = panel * PANEL + lane, panel * steps * PANEL + lane
                if row < count:
                    for step in range(steps):
                        panels[at + step * PANEL] = of(rows[row], step)
                else:
                    for step in range(steps):
                        panels[at + step * PANEL] = 0
            panel = take(counter)

    return pack


@njit(nogil=True)
def _widen_floats(source: Any, start: int, count: int, wide: Any, at: int) -> None:
    target, numbers = wide[at : at + count], source[start : start + count]
    for index in range(count):
        target[index] = widened(numbers[index])


@njit(nogil=True)
def _widen_pairs(source: Any, start: int, count: int, wide: Any, at: int) -> None:
    """`count` pairs from pair number `start` on. What is beside the last of an odd number does not matter: it is
    multiplied by zero."""
    numbers = source[2 * start : 2 * (start + count)]
    halves = wide.view(np.int16)[2 * at : 2 * at + len(numbers)]
    for index in range(len(numbers)):
        halves[index] = np.int16(numbers[index])


def _multiplication(tile: Any, narrow_tile: Any, widen: Any, told: Any) -> Any:
    """Multiplies all rows that are in `panels` by every block of the weight that `counter` gives. `told(sum, offset,
    column)` is what `out` gets of a sum."""

    @njit(nogil=True)
    def add_up(weight: Any, base: int, rows: int, panels: Any, many: int, wide: Any, sums: Any) -> None:
        """The sums of `rows` rows of the weight from `base` on, panel by panel, row by row. `wide` is room for them.
        The panels hold `many` rows: of the last one, half may be empty."""
        steps, whole = len(panels) // (_panels(many) * PANEL), (many + PANEL - LANES - 1) // PANEL
        sums[:] = 0
        for start in range(0, steps, STEPS):
            count = min(STEPS, steps - start)
            for row in range(rows):
                widen(weight[base + row], start, count, wide, row * STRIDE)
            for panel in range(whole):
                for row in range(0, rows, TILE):
                    to = (panel * BLOCK + row) * PANEL
                    tile(wide, row * STRIDE, STRIDE, panels, (panel * steps + start) * PANEL, count, sums, to)
            for panel in range(whole, _panels(many)):
                for row in range(0, rows, NARROW_TILE):
                    to = (panel * BLOCK + row) * PANEL
                    narrow_tile(wide, row * STRIDE, STRIDE, panels, (panel * steps + start) * PANEL, count, sums, to)

    @njit(nogil=True)
    def multiply(counter: Any, weight: Any, block: int, offset: Any, panels: Any, out: Any) -> None:
        rows = len(out)
        wide = np.zeros(BLOCK * STRIDE, panels.dtype)
        sums = np.empty(_panels(rows) * BLOCK * PANEL, panels.dtype)
        base = take(counter) * block
        while base < len(weight):
            count = min(block, len(weight) - base)
            add_up(weight, base, count, panels, rows, wide, sums)
            for row in range(rows):
                at, target = (row // PANEL * BLOCK) * PANEL + row % PANEL, out[row, base : base + count]
                for column in range(count):
                    target[column] = told(sums[at + column * PANEL], offset, base + column)
            base = take(counter) * block

    return multiply


_packed_floats, _packed_pairs = _packing(_float), _packing(_pair)
_float_blocks = _multiplication(float_tile, narrow_float_tile, _widen_floats, rounded)
_pair_blocks = _multiplication(pair_tile, narrow_pair_tile, _widen_pairs, exact)


# Numba keeps the code of functions that are no closures.
@njit(nogil=True, cache=True, error_model="numpy")
def _pack_floats(counter: Any, rows: Any, panels: Any) -> None:
    _packed_floats(counter, rows, panels)


@njit(nogil=True, cache=True, error_model="numpy")
def _pack_pairs(counter: Any, rows: Any, panels: Any) -> None:
    _packed_pairs(counter, rows, panels)


@njit(nogil=True, cache=True, error_model="numpy")
def _multiply_floats(counter: Any, weight: Any, block: int, offset: Any, panels: Any, out: Any) -> None:
    _float_blocks(counter, weight, block, offset, panels, out)


@njit(nogil=True, cache=True, error_model="numpy")
def _multiply_pairs(counter: Any, weight: Any, block: int, panels: Any, out: Any) -> None:
    _pair_blocks(counter, weight, block, None, panels, out)
