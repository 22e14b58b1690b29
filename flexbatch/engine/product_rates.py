"""Measures matrix products of a machine by their rows, as the engine makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from flexbatch.engine.linear_layers import as_multiplied, product
from flexbatch.engine.rehearsal import random_values
from flexbatch.engine.timing import Work, medians
from flexbatch.memory.int8_layout import int8_layout
from flexbatch.memory.int8_linear import int8_linear

ROWS = (1, 4, 16, 64, 256, 1024)
"""Of the products that are measured; an accelerator gains by more."""
MOST_ROWS = 2048
LAPS = 3
"""Over all of them in a round."""
HIDDEN = 4096


def gemm_curves(device: torch.device) -> Iterator[tuple[str, dict[int, float]]]:
    """FLOP/s of linear layers by rows, by number format."""
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    rows = ROWS if device.type == "cpu" else (*ROWS, MOST_ROWS)
    for dtype in kinds if device.type != "cpu" else kinds[:2]:
        yield type_name(dtype), _curve(gemm_works(device, dtype, rows))
    if device.type == "cpu":
        yield "int8", _curve(int8_works(rows))


def gemm_works(device: torch.device, dtype: torch.dtype, rows: Sequence[int]) -> dict[int, Work]:
    """Products of so many rows by a linear layer's weights as the engine has them, in FLOP. Weights come from memory:
    two in turn, larger than a cache."""
    weights = [as_multiplied(random_values((HIDDEN, HIDDEN), dtype, device)) for _ in range(2)]
    inputs = {many: random_values((many, HIDDEN), dtype, device) for many in rows}
    return _works({many: partial(products, each, weights) for many, each in inputs.items()}, len(weights), device)


def int8_works(rows: Sequence[int]) -> dict[int, Work]:
    """The same of the engine's own 8-bit linear layer, its weights laid as they are kept, rounding of the activations
    included."""
    cpu, layout = torch.device("cpu"), int8_layout((HIDDEN, HIDDEN))
    stored = [layout.pack(random_values((HIDDEN, HIDDEN), torch.bfloat16, cpu)) for _ in range(4)]
    laid = [(layout.weight(values), scale, values) for values, scale in stored]  # the values outlive the weight

    def layers(inputs: torch.Tensor) -> None:
        for weight, scale, _ in laid:
            int8_linear(inputs, weight, scale)

    inputs = {many: random_values((many, HIDDEN), torch.bfloat16, cpu) for many in rows}
    return _works({many: partial(layers, each) for many, each in inputs.items()}, len(stored), cpu)


def _works(runs: Mapping[int, Callable[[], None]], weights: int, device: torch.device) -> dict[int, Work]:
    """Given what multiplies so many rows by so many `weights`."""
    flop = 2.0 * weights * HIDDEN * HIDDEN  # of a row
    return {rows: Work(torch.inference_mode()(run), flop * rows, device) for rows, run in runs.items()}


def _curve(works: Mapping[int, Work]) -> dict[int, float]:
    """FLOP/s by rows, taken in turn, so that a slow moment is no slow number of rows."""
    return medians([{rows: work.rate(0.02) for rows, work in works.items()} for _ in range(LAPS)])


def products(inputs: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
    for weight in weights:
        product(inputs, weight)


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
