"""Linear layers in bfloat16 by tile registers (AMX): summed in float32 and rounded once.

A weight may lie as it is stored, or be compressed (`exponent_codes`). Its columns are then laid out, or expanded, where
they are multiplied, by the thread that multiplies them, in memory that stays in the second cache; expanded before, they
would go out to memory and come back (docs/benchmarks.md). The result has the same bits however the weight lies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from flexbatch.kernels import exponent_codes
from flexbatch.kernels.exponent_codes import expand_record
from flexbatch.kernels.flat_memory import bits
from flexbatch.kernels.result_memory import result
from flexbatch.kernels.tile_products import (
    Kind,
    as_it_is,
    as_it_lies,
    column_place,
    multiplication,
    multiply_rows,
    row_place,
)
from flexbatch.kernels.tile_registers import ROWS, SIDE, STEP
from flexbatch.kernels.tile_squares import FLOATS
from flexbatch.kernels.transposition import transpose
from flexbatch.kernels.vectors import add, fill, larger, load, store_narrowed

MOST_ROWS = 1024
"""At a time: a compressed weight is expanded for all of them."""
NUMBER_BYTES = 2
RECORD_STEPS = exponent_codes.CHUNK * NUMBER_BYTES // STEP
"""Steps of a square of columns that a record has."""
RECORD_INPUTS = exponent_codes.CHUNK // SIDE
"""Inputs whose weights for 32 outputs are in a record."""


def suits(outputs: int, inputs: int) -> bool:
    """Whether a weight of this shape is multiplied without anything missing."""
    return outputs % SIDE == 0 and inputs % SIDE == 0


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rectified: bool = False) -> torch.Tensor:
    """`rows` bfloat16 `[rows, in]` times a tiled weight bfloat16, plus `bias` float32 `[out]`, all contiguous, as
    bfloat16 `[rows, out]`; with `rectified`, zero where it is below."""
    return _multiplied(_linear, rows, (weight.view(torch.int8).numpy(),), bias, rectified)


def stored_linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rectified: bool = False
) -> torch.Tensor:
    """The same of a weight `[out, in]` as it is stored, contiguous, from an address on that is a multiple of 4."""
    return _multiplied(_stored_linear, rows, (weight.view(torch.uint32).view(-1).numpy(),), bias, rectified)


def compressed_linear(
    rows: torch.Tensor, records: torch.Tensor, exceptions: int, bias: torch.Tensor, rectified: bool = False
) -> torch.Tensor:
    """The same of the records that a tiled weight was compressed to, with room for so many exceptions; `in` is a
    multiple of `RECORD_INPUTS`."""
    return _multiplied(_compressed_linear, rows, (records.numpy(), exceptions), bias, rectified)


def _multiplied(
    kernel: Any, rows: torch.Tensor, weight: tuple[Any, ...], bias: torch.Tensor, rectified: bool
) -> torch.Tensor:
    out = result((len(rows), len(bias)), torch.bfloat16)
    given = *weight, bias.numpy(), np.float32(0 if rectified else -np.inf)
    pairs = rows.shape[1] * len(bias) // 2
    multiply_rows(kernel, rows.view(torch.int8).numpy(), MOST_ROWS, pairs, given, bits(out))
    return out


@njit(nogil=True)
def _tell(
    sums: Any, count: int, first: int, many: int, _scale: Any, columns: Any, base: int, out: Any, width: int
) -> None:
    """The numbers of `many` rows of the result from row `first` and column `base` on, of `count` squares, as
    bfloat16."""
    bias, least = columns
    lowest = fill(least)
    for row in range(first, first + many):
        at, to = row_place(row - first, count), row * width + base
        for column in range(0, count * SIDE, ROWS):
            own = add(load(sums, at + column_place(column)), load(bias, base + column))
            store_narrowed(out, to + column, larger(lowest, own))  # NaN stays


@njit(nogil=True)
def _expand(weight: Any, square: int, count: int, start: int, steps: int, whole: int, room: Any) -> Any:
    """The records of each square from `square` on, side by side."""
    records, exceptions = weight
    numbers = room.view(np.uint16)
    for each in range(count):
        to = numbers[each * exponent_codes.CHUNK :][: exponent_codes.CHUNK]
        expand_record(records[((square + each) * whole + start) // steps], exceptions, to)
    return room.view(np.int8), 0


@njit(nogil=True)
def _turn(weight: Any, square: int, count: int, start: int, steps: int, whole: int, room: Any) -> Any:
    """The same of a weight as it is stored, uint32 in one dimension, two numbers of a column's each."""
    numbers, length = room.view(np.uint32), whole * ROWS
    for each in range(count):
        for half in range(0, SIDE, ROWS):
            at = ((square + each) * SIDE + half) * length + start * ROWS
            to = each * steps * ROWS * SIDE + half
            for unit in range(0, steps * ROWS, ROWS):
                transpose(weight, at + unit, length, numbers, to + unit * SIDE, SIDE)
    return room.view(np.int8), 0


_plain_product = multiplication(Kind(FLOATS, np.float32, as_it_is, as_it_lies, _tell))
_turned_product = multiplication(Kind(FLOATS, np.float32, as_it_is, _turn, _tell, RECORD_STEPS))
_compressed_product = multiplication(Kind(FLOATS, np.float32, as_it_is, _expand, _tell, RECORD_STEPS))


# Numba keeps the code of functions that are no closures.
@njit(nogil=True, cache=True, error_model="numpy")
def _linear(
    counter: Any, rows: Any, left: Any, scale: Any, state: Any, weight: Any, bias: Any, least: Any, out: Any
) -> None:
    _plain_product(counter, rows, left, scale, state, weight, (bias, least), out, rows.shape[1])


@njit(nogil=True, cache=True, error_model="numpy")
def _stored_linear(
    counter: Any, rows: Any, left: Any, scale: Any, state: Any, weight: Any, bias: Any, least: Any, out: Any
) -> None:
    _turned_product(counter, rows, left, scale, state, weight, (bias, least), out, rows.shape[1])


@njit(nogil=True, cache=True, error_model="numpy")
def _compressed_linear(
    counter: Any,
    rows: Any,
    left: Any,
    scale: Any,
    state: Any,
    records: Any,
    exceptions: int,
    bias: Any,
    least: Any,
    out: Any,
) -> None:
    weight = records, exceptions
    _compressed_product(counter, rows, left, scale, state, weight, (bias, least), out, rows.shape[1])
