"""Matrix products of a few rows on a CPU with AVX2: the weight goes from memory straight into registers.

Where rows are few, laying them side by side and widening the weight into a cache (panel_products.py) takes longer than
the product itself. Sums of bfloat16 are float32, eight side by side that are added up at the end; those of int8 are
exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from flexbatch.kernels.flat_memory import bits
from flexbatch.kernels.row_tiles import BFLOATS, BYTES, Numbers, tile
from flexbatch.kernels.sums import exact, rounded
from flexbatch.kernels.threads import share_out, take

BLOCK = 24
"""Rows of the weight that a thread takes at a time."""
GROUP = 12
"""Rows of the weight that stay in a cache while all inputs pass."""
READING = 7
"""Multiplications that take as long as reading a number."""
TOGETHER = {1: 4, 2: 4, 3: 3, 4: 3, 5: 2, 6: 2}
"""Rows of the weight at a time, with so many inputs: twelve sums keep two units busy, one input waits for memory."""


def float_product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `panel_products.float_product`, summed in another order; `in` is a multiple of 8."""
    out = torch.empty(len(rows), len(weight), dtype=torch.bfloat16)
    offset = np.zeros(len(weight), np.float32) if bias is None else bias.float().numpy()
    given, operations = rows.float().contiguous().numpy(), _operations(rows, weight)
    share_out(_multiply_floats, bits(weight), given, offset, bits(out), operations=operations)
    return out


def integer_sums(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `panel_products.integer_sums`; `in` is a multiple of 16."""
    out = torch.empty(len(values), len(weight), dtype=torch.int32)
    given, operations = values.short().contiguous().numpy(), _operations(values, weight)
    share_out(_multiply_bytes, weight.numpy(), given, out.numpy(), operations=operations)
    return out


def _operations(rows: torch.Tensor, weight: torch.Tensor) -> int:
    """Multiplications of this product; reading a number of the weight from memory counts as some."""
    return (READING + len(rows)) * weight.numel()


def _all_rows(numbers: Numbers, inputs: int) -> Any:
    """The products of `inputs` rows of inputs and any number of rows of the weight."""
    together = TOGETHER[inputs]
    several, one = tile(numbers, inputs, together, BLOCK), tile(numbers, inputs, 1, BLOCK)
    step = numbers.step

    @njit(nogil=True)
    def products(weight: Any, base: int, many: int, given: Any, first: int, sums: Any, to: int) -> None:
        stride = given.shape[1]
        whole = many - many % together
        for row in range(0, whole, together):
            several(weight, (base + row) * stride, given, first * stride, stride, stride // step, sums, to + row)
        for row in range(whole, many):
            one(weight, (base + row) * stride, given, first * stride, stride, stride // step, sums, to + row)

    return products


def _all_inputs(numbers: Numbers) -> Any:
    """The products of all rows of inputs and `many` rows of the weight: four rows of inputs at a time, up to six at the
    end."""
    one, two, three, four, five, six = (_all_rows(numbers, inputs) for inputs in sorted(TOGETHER))

    @njit(nogil=True)
    def add_up(weight: Any, base: int, many: int, given: Any, sums: Any, to: int) -> None:
        first, left = 0, len(given)
        while left > 6 or left == 4:
            four(weight, base, many, given, first, sums, first * BLOCK + to)
            first, left = first + 4, left - 4
        if left == 6:
            six(weight, base, many, given, first, sums, first * BLOCK + to)
        elif left == 5:
            five(weight, base, many, given, first, sums, first * BLOCK + to)
        elif left == 3:
            three(weight, base, many, given, first, sums, first * BLOCK + to)
        elif left == 2:
            two(weight, base, many, given, first, sums, first * BLOCK + to)
        elif left == 1:
            one(weight, base, many, given, first, sums, first * BLOCK + to)

    return add_up


def _multiplication(numbers: Numbers, number: Any, told: Any) -> Any:
    """Multiplies all of `given` by every block of the weight that `counter` gives, with sums of type `number`."""
    add_up = _all_inputs(numbers)

    @njit(nogil=True)
    def multiply(counter: Any, weight: Any, given: Any, offset: Any, out: Any) -> None:
        sums = np.empty(len(given) * BLOCK, number)
        base = take(counter) * BLOCK
        while base < len(weight):
            count = min(BLOCK, len(weight) - base)
            for group in range(0, count, GROUP):
                add_up(weight, base + group, min(GROUP, count - group), given, sums, group)
            for row in range(len(out)):
                target = out[row, base : base + count]
                for column in range(count):
                    target[column] = told(sums[row * BLOCK + column], offset, base + column)
            base = take(counter) * BLOCK

    return multiply


_float_blocks = _multiplication(BFLOATS, np.float32, rounded)
_byte_blocks = _multiplication(BYTES, np.int32, exact)


# Numba keeps the code of functions that are no closures.
@njit(nogil=True, cache=True, error_model="numpy")
def _multiply_floats(counter: Any, weight: Any, given: Any, offset: Any, out: Any) -> None:
    _float_blocks(counter, weight, given, offset, out)


@njit(nogil=True, cache=True, error_model="numpy")
def _multiply_bytes(counter: Any, weight: Any, given: Any, out: Any) -> None:
    _byte_blocks(counter, weight, given, None, out)
