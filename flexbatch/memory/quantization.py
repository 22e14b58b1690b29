"""Group-wise quantisation to 4 and 8 bits: asymmetric, round to nearest, scale and minimum kept per group.

A value x of a group becomes q = round((x - minimum) / scale), 0 to 2^bits - 1, and comes back as q * scale + minimum,
at most half a scale away. Scale and minimum are rounded outwards before they are used, so the bound holds for them as
they are stored. Weights are grouped along their input dimension; keys along tokens for each channel, values along the
head dimension for each token (KIVI, arXiv 2402.02750: keys have outlier channels, values have not).

Scale and minimum are float16: on normal weights the error is that of float32 ones to four digits, where bfloat16 ones
add 0.5 % to it at 4 bits and 4 % at 8 bits. Values beyond float16's range (65504) are cut there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from flexbatch.errors import ConfigError
from flexbatch.kernels import packing
from flexbatch.kernels.expansion import RUN, expand

CHUNK = 1 << 19
"""Values that are worked on at a time: in float32 they stay in the processor's cache, which halves the time."""
CHUNK_ON_ACCELERATOR = 1 << 25
PARAMETER_DTYPE = torch.float16


@dataclass(frozen=True, slots=True)
class QuantizedLayout:
    """How a tensor of `shape` is packed: groups of `group_size` along `dimension` (-1, or -2 with a group's channels
    beside each other). An incomplete last group is filled up."""

    shape: tuple[int, ...]
    bits: int
    group_size: int
    dimension: int = -1

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(
                f"Quantisation to {self.bits} bits is asked for.", remedy="Use 4 or 8 bits, or 16 for none."
            )
        if (
            self.dimension not in (-1, -2)
            or len(self.shape) < -self.dimension
            or self.group_size < 2
            or self.group_size % 2
        ):
            raise ConfigError(
                f"The shape {self.shape} cannot have groups of {self.group_size} in dimension {self.dimension}.",
                remedy="Use an even group size and the last or the last but one dimension.",
            )

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The `parts` of a tensor of this shape, or of some of its leading rows."""
        quantized = quantize(tensor, self.bits, self.group_size, self.dimension)
        return quantized.values, quantized.scale, quantized.minimum

    @property
    def parts(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
        """Name, dtype and shape of each stored tensor."""
        return (
            ("q", torch.uint8, self.values_shape),
            ("scale", PARAMETER_DTYPE, self.parameters_shape),
            ("minimum", PARAMETER_DTYPE, self.parameters_shape),
        )

    @property
    def together(self) -> int:
        """So many trailing dimensions are packed together; slices of those before them can be packed one by one."""
        return -self.dimension

    @property
    def leading(self) -> tuple[int, ...]:
        return self.shape[: self.dimension]

    @property
    def groups(self) -> int:
        return -(-self.shape[self.dimension] // self.group_size)

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.dimension == -2 else 1

    @property
    def padded(self) -> bool:
        return self.groups * self.group_size != self.shape[self.dimension]

    @property
    def runs(self) -> bool:
        """Whether the kernel for whole runs can expand it."""
        whole = self.dimension == -1 and not self.padded
        return whole and self.group_size % RUN == 0 and self.values_shape[-1] % RUN == 0

    @property
    def values_shape(self) -> tuple[int, ...]:
        """uint8: a row's groups one after the other, for dimension -2 one row per group."""
        if self.dimension == -2:
            return (*self.leading, self.groups, self.group_size * self.channels * self.bits // 8)
        return (*self.leading, self.groups * self.group_size * self.bits // 8)

    @property
    def parameters_shape(self) -> tuple[int, ...]:
        """Of `scale` and `minimum`."""
        return (*self.leading, self.groups) if self.dimension == -1 else (*self.leading, self.groups, self.channels)


@dataclass(frozen=True)
class QuantizedTensor:
    """`values` uint8 [*leading, packed], `scale` and `minimum` float16 per group; see `QuantizedLayout` for shapes.

    With 4 bits a byte holds a value of the row's first half (low) and the one half a row further on (high), so that
    unpacking runs over long stretches.
    """

    values: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor
    layout: QuantizedLayout

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes + self.minimum.nbytes


def quantized_nbytes(layout: QuantizedLayout) -> int:
    """Bytes of a tensor in this layout, scale and minimum included."""
    return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in layout.parts)


def quantize(tensor: torch.Tensor, bits: int, group_size: int, dimension: int = -1) -> QuantizedTensor:
    """Quantises a float tensor of any shape with at least `-dimension` dimensions; see `QuantizedLayout`."""
    layout = QuantizedLayout(tuple(tensor.shape), bits, group_size, dimension)
    values = torch.empty(layout.values_shape, dtype=torch.uint8, device=tensor.device)
    scale = torch.empty(layout.parameters_shape, dtype=PARAMETER_DTYPE, device=tensor.device)
    minimum = torch.empty_like(scale)
    if dimension == -1 and packing.suits(tensor, group_size):
        rows = tensor.detach().reshape(-1, tensor.shape[-1]).contiguous()
        packing.pack(rows, *(each.view(len(rows), -1) for each in (values, scale, minimum)))
        return QuantizedTensor(values, scale, minimum, layout)
    rows = _leading_rows(tensor, layout)
    flat_values = values.view(rows.shape[0], *values.shape[len(layout.leading) :])
    flat_scale, flat_minimum = (_grouped_parameters(each, layout) for each in (scale, minimum))
    for part in _parts(rows.shape[0], rows[:1].numel(), tensor.device):
        grouped = _padded_groups(rows[part].float(), layout)
        low, step = _range(grouped, 2**bits - 1)
        flat_minimum[part].copy_(low)
        flat_scale[part].copy_(step)
        inverse = torch.where(step > 0, 1 / step, 0.0)
        integers = grouped.sub(low).mul_(inverse).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        flat_values[part].copy_(_packed(integers.reshape(*flat_values[part].shape[:-1], -1), bits))
    return QuantizedTensor(values, scale, minimum, layout)


def dequantize(quantized: QuantizedTensor, out: torch.Tensor) -> torch.Tensor:
    """Writes the values to `out` (the layout's shape, bfloat16, float16 or float32) and returns it.

    Fastest when `out` is contiguous. The arithmetic is float32 and is rounded once.
    """
    layout = quantized.layout
    if tuple(out.shape) != layout.shape:
        raise ValueError(f"a tensor of shape {layout.shape} cannot be dequantised into {tuple(out.shape)}")
    if not out.is_contiguous():
        return out.copy_(dequantize(quantized, torch.empty(layout.shape, dtype=out.dtype, device=out.device)))
    if not out.numel():
        return out
    if out.device.type == "cpu" and out.dtype == torch.bfloat16 and layout.runs:
        packed = quantized.values.reshape(-1, _packed_row(layout)).contiguous()
        scale, minimum = (each.float().reshape(-1, layout.groups) for each in (quantized.scale, quantized.minimum))
        expand(packed, scale, minimum, layout.group_size, out.view(-1, layout.shape[-1]))
        return out
    # For dimension -2 each group is a row of its own, unless padding has to be cut off.
    groups = 1 if layout.dimension == -2 and not layout.padded else layout.groups
    row = groups * layout.group_size * layout.channels
    values = quantized.values.view(-1, groups if layout.dimension == -2 else 1, _packed_row(layout))
    scale = quantized.scale.reshape(-1, groups, 1, layout.channels).float()
    minimum = quantized.minimum.reshape(-1, groups, 1, layout.channels).float()
    targets = out.view(values.shape[0], -1)
    kept = targets.shape[1]
    parts = list(_parts(values.shape[0], row, out.device))
    scratch = torch.empty(parts[0].stop, *values.shape[1:-1], _packed_row(layout) * 8 // layout.bits, device=out.device)
    for part in parts:
        numbers = scratch[: part.stop - part.start]
        _unpack(values[part], layout.bits, numbers)
        grouped = numbers.view(-1, groups, layout.group_size, layout.channels)
        # Two passes with one broadcast operand each: torch vectorises that, and not one pass with two.
        grouped.mul_(scale[part]).add_(minimum[part])
        targets[part].copy_(numbers.view(-1, row)[:, :kept])
    return out


def _leading_rows(tensor: torch.Tensor, layout: QuantizedLayout) -> torch.Tensor:
    """[product of the leading dimensions, grouped dimension, channels]."""
    return tensor.detach().reshape(math.prod(layout.leading), layout.shape[layout.dimension], layout.channels)


def _grouped_parameters(parameters: torch.Tensor, layout: QuantizedLayout) -> torch.Tensor:
    return parameters.view(math.prod(layout.leading), layout.groups, 1, layout.channels)


def _padded_groups(rows: torch.Tensor, layout: QuantizedLayout) -> torch.Tensor:
    """[rows, groups, group size, channels]; the last entry is repeated, which leaves the last group's range."""
    missing = layout.groups * layout.group_size - rows.shape[1]
    if missing:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, missing, -1)], dim=1)
    return rows.reshape(rows.shape[0], layout.groups, layout.group_size, layout.channels)


def _range(grouped: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and scale of each group (float32 with float16 values): minimum + steps * scale covers the group."""
    lowest, highest = grouped.amin(dim=2, keepdim=True), grouped.amax(dim=2, keepdim=True)
    low = -_rounded_up(-lowest)
    return low, _rounded_up((highest - low) / steps)


def _rounded_up(values: torch.Tensor) -> torch.Tensor:
    """The least float16 values not below `values`, as float32."""
    limit = torch.finfo(PARAMETER_DTYPE).max
    rounded = values.clamp(-limit, limit).to(PARAMETER_DTYPE)
    bits = rounded.view(torch.int16)
    # The next number up: bits count away from zero, and 1 stands for the smallest positive number.
    above = torch.where(rounded > 0, bits + 1, torch.where(rounded < 0, bits - 1, 1)).to(torch.int16)
    needed = (rounded.float() < values) & (rounded < limit)
    return torch.where(needed, above.view(PARAMETER_DTYPE), rounded).float()


def _packed_row(layout: QuantizedLayout) -> int:
    return layout.values_shape[-1]


def _packed(integers: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return integers
    low, high = integers.chunk(2, dim=-1)
    return low | (high << 4)


def _unpack(values: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    if bits == 8:
        out.copy_(values)
        return
    half = values.shape[-1]
    out[..., :half].copy_(values & 15)
    out[..., half:].copy_(values >> 4)


def _parts(rows: int, row: int, device: torch.device) -> Iterator[slice]:
    """Runs of rows, together about CHUNK values."""
    step = max(1, (CHUNK if device.type == "cpu" else CHUNK_ON_ACCELERATOR) // max(1, row))
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))


def quantizable(shape: Sequence[int], group_size: int) -> bool:
    """Whether a weight of this shape is worth packing: a matrix (or a stack of them) of whole groups."""
    return len(shape) >= 2 and shape[-1] % group_size == 0 and math.prod(shape) >= 32 * group_size
