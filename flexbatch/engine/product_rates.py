"""Measures matrix products of a machine by their rows, as the engine makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from typing import TypeVar

import torch

from flexbatch.engine.linear_layers import as_multiplied, product
from flexbatch.engine.rehearsal import random_values
from flexbatch.engine.timing import Work, medians
from flexbatch.kernels.exponent_codes import CHUNK, most_exceptions
from flexbatch.memory.compressed_weight import CompressedLayout
from flexbatch.memory.float_layout import CompressedWeight, TiledLayout, float_layout, lay_out
from flexbatch.memory.int8_layout import int8_layout
from flexbatch.memory.int8_linear import int8_linear

ROWS = (1, 4, 16, 64, 256, 1024)
"""Of the products that are measured; an accelerator gains by more."""
MOST_ROWS = 2048
LAPS = 3
"""Over all of them in a round."""
WEIGHT_BYTES = 384 << 20
"""Of the weights that are multiplied by in turn. Those of a model come from memory, and some processors' last cache,
which others may leave to us while we measure, keeps hundreds of megabytes: from there products of few rows took half as
long (docs/benchmarks.md)."""
AT_ONCE = 2
"""Weights of a call."""
HIDDEN = 4096
CPU = torch.device("cpu")

Weight = TypeVar("Weight")


def gemm_curves(device: torch.device) -> Iterator[tuple[str, dict[int, float]]]:
    """FLOP/s of linear layers by rows, by number format."""
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    rows = ROWS if device.type == "cpu" else (*ROWS, MOST_ROWS)
    for dtype in kinds if device.type != "cpu" else kinds[:2]:
        yield type_name(dtype), _curve(gemm_works(device, dtype, rows))
    if device.type == "cpu":
        yield "int8", _curve(int8_works(rows))
    if device.type == "cpu" and CompressedWeight.suits(float_layout((HIDDEN, HIDDEN))):
        yield "compressed", _curve(compressed_works(rows))


def gemm_works(
    device: torch.device, dtype: torch.dtype, rows: Sequence[int], weight_bytes: int = WEIGHT_BYTES
) -> dict[int, Work]:
    """Products of so many rows by a linear layer's weights as the engine has them, in FLOP, in turn by so many bytes of
    weights."""
    first = as_multiplied(random_values((HIDDEN, HIDDEN), dtype, device))
    count = weight_bytes // (HIDDEN * HIDDEN * dtype.itemsize)
    weights = [first, *(first.clone() for _ in range(count - 1))]
    return _works(product, weights, {many: random_values((many, HIDDEN), dtype, device) for many in rows})


def int8_works(rows: Sequence[int], weight_bytes: int = WEIGHT_BYTES) -> dict[int, Work]:
    """The same of the engine's own 8-bit linear layer, its weights laid as they are kept, rounding of the activations
    included."""
    layout = int8_layout((HIDDEN, HIDDEN))
    values, scale = layout.pack(random_values((HIDDEN, HIDDEN), torch.bfloat16, CPU))
    stored = [values, *(values.clone() for _ in range(weight_bytes // values.nbytes - 1))]
    weights = [(layout.weight(each), each) for each in stored]  # the values outlive the weight
    return _works(lambda inputs, weight: int8_linear(inputs, weight[0], scale), weights, _bfloat_inputs(rows))


def compressed_works(rows: Sequence[int]) -> dict[int, Work]:
    """The same of weights that are compressed without loss, and expanded within the product."""
    weight = random_values((HIDDEN, HIDDEN), torch.bfloat16, CPU)
    layout = CompressedLayout(TiledLayout((HIDDEN, HIDDEN)), most_exceptions(lay_out(weight).view(-1, CHUNK)))
    (records,) = layout.pack(weight)
    stored = [records, *(records.clone() for _ in range(WEIGHT_BYTES // records.nbytes - 1))]
    weights = [CompressedWeight(each, layout.exceptions, HIDDEN) for each in stored]
    return _works(lambda inputs, weight: weight.linear(inputs, None), weights, _bfloat_inputs(rows))


def _bfloat_inputs(rows: Sequence[int]) -> dict[int, torch.Tensor]:
    return {many: random_values((many, HIDDEN), torch.bfloat16, CPU) for many in rows}


def _works(
    multiply: Callable[[torch.Tensor, Weight], object], weights: Iterable[Weight], inputs: Mapping[int, torch.Tensor]
) -> dict[int, Work]:
    """Given what multiplies the rows by a weight."""
    in_turn = cycle(weights)

    @torch.inference_mode()
    def run(rows: torch.Tensor) -> None:
        for weight in islice(in_turn, AT_ONCE):
            multiply(rows, weight)

    flop = 2.0 * AT_ONCE * HIDDEN * HIDDEN  # of a row
    return {many: Work(partial(run, rows), flop * many, rows.device) for many, rows in inputs.items()}


def _curve(works: Mapping[int, Work]) -> dict[int, float]:
    """FLOP/s by rows, taken in turn, so that a slow moment is no slow number of rows."""
    return medians([{rows: work.rate(0.02) for rows, work in works.items()} for _ in range(LAPS)])


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
