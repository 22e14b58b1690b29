"""Measures matrix products of a machine by their rows, as the engine makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from flexbatch.engine.linear_layers import as_multiplied, product
from flexbatch.engine.rehearsal import half_type, random_values
from flexbatch.engine.timing import Work, medians, seconds_of
from flexbatch.memory.int8_layout import int8_layout
from flexbatch.memory.int8_linear import int8_linear

ROWS = (1, 4, 16, 64, 256, 1024)
"""Of the products that are measured; an accelerator gains by more."""
MOST_ROWS = 2048
LAPS = 3
"""Over all of them in a round."""
HIDDEN = 4096


def gemm_curves(device: torch.device) -> Iterator[tuple[str, dict[int, float]]]:
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    for dtype in kinds if device.type != "cpu" else kinds[:2]:
        yield type_name(dtype), _gemm_curve(device, dtype)
    if device.type == "cpu":
        yield "int8", _int8_curve()


@torch.inference_mode()
def _gemm_curve(device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    """FLOP/s of a linear layer by rows, as the engine has it. Weights come from memory: two in turn, larger than a
    cache."""
    weights = _weights(dtype, device)
    rows = ROWS if device.type == "cpu" else (*ROWS, MOST_ROWS)
    return _curve(
        {many: partial(products, random_values((many, HIDDEN), dtype, device), weights) for many in rows},
        len(weights),
        device,
    )


def gemm_work(device: torch.device, rows: int) -> Work:
    """Products of so many rows in the 16-bit type, as for the curve, in FLOP."""
    dtype = half_type(device)
    weights = _weights(dtype, device)
    run = partial(products, random_values((rows, HIDDEN), dtype, device), weights)
    return Work(torch.inference_mode()(run), 2.0 * len(weights) * HIDDEN * HIDDEN * rows, device)


def _weights(dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    return [as_multiplied(random_values((HIDDEN, HIDDEN), dtype, device)) for _ in range(2)]


@torch.inference_mode()
def _int8_curve() -> dict[int, float]:
    """The same of the engine's own 8-bit linear layer, its weights laid as they are kept, rounding of the activations
    included."""
    cpu, layers = torch.device("cpu"), _Int8Layers(4)
    inputs = {many: random_values((many, HIDDEN), torch.bfloat16, cpu) for many in ROWS}
    return _curve({many: partial(layers.run, rows) for many, rows in inputs.items()}, len(layers.weights), cpu)


def int8_work(rows: int) -> Work:
    """The same of 8-bit linear layers."""
    cpu, layers = torch.device("cpu"), _Int8Layers(2)
    run = partial(layers.run, random_values((rows, HIDDEN), torch.bfloat16, cpu))
    return Work(torch.inference_mode()(run), 2.0 * len(layers.weights) * HIDDEN * HIDDEN * rows, cpu)


class _Int8Layers:
    """Linear layers of random 8-bit weights, laid as they are kept."""

    def __init__(self, count: int) -> None:
        layout = int8_layout((HIDDEN, HIDDEN))
        values = (random_values((HIDDEN, HIDDEN), torch.bfloat16, torch.device("cpu")) for _ in range(count))
        self._stored = [layout.pack(each) for each in values]  # what a weight lies in must outlive it
        self.weights = [(layout.weight(values), scale) for values, scale in self._stored]

    def run(self, inputs: torch.Tensor) -> None:
        for weight in self.weights:
            int8_linear(inputs, *weight)


def _curve(works: Mapping[int, Callable[[], None]], weights: int, device: torch.device) -> dict[int, float]:
    """FLOP/s by rows, given what multiplies so many rows by so many `weights`: in turn, so that a slow moment is no
    slow number of rows."""
    flop = 2.0 * weights * HIDDEN * HIDDEN  # of a row
    laps = [{rows: flop * rows / seconds_of(work, device, 0.02) for rows, work in works.items()} for _ in range(LAPS)]
    return medians(laps)


def products(inputs: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
    for weight in weights:
        product(inputs, weight)


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
