"""How the weights of 8-bit linear layers lie: as the products like them that are fastest on this machine.

Weights have one scale per output channel, symmetric: Dettmers et al., arXiv 2208.07339, section 2.1 (vector-wise
quantisation), without its separate path for outliers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flexbatch.kernels import dot_products, tile_products, tile_registers, widened_products
from flexbatch.kernels.int8_rows import round_rows
from flexbatch.memory.blocked_weight import BlockedForm, blocked_bytes, blocked_form, lay_out, suits

LARGEST = 127
CHUNK = 1 << 19


@dataclass(frozen=True, slots=True)
class IntegerLayout(ABC):
    """How a weight [..., out, in] is kept: int8, laid in some way, and float32 scale [..., out]."""

    shape: tuple[int, ...]

    @property
    def together(self) -> int:
        """So many trailing dimensions are packed together; slices of those before them can be packed one by one."""
        return 2

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The `parts` of a weight of this shape, or of some slices of its leading dimension."""
        values, scale = quantize_rows(tensor)
        return self._laid(values), scale

    @property
    def parts(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
        """Name, dtype and shape of each stored tensor."""
        return (("q", torch.int8, self._laid_shape), ("scale", torch.float32, self.shape[:-1]))

    def weight(self, values: torch.Tensor) -> torch.Tensor:
        """The weight for `int8_linear` over its stored values, which must outlive it."""
        return values

    @abstractmethod
    def _laid(self, values: torch.Tensor) -> torch.Tensor:
        """The values [..., out, in] as they are stored."""

    @property
    @abstractmethod
    def _laid_shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Int8Layout(IntegerLayout):
    """Turned over, int8 [..., in, out].

    `int8_linear` takes the stored values as `q.mT`: with 8 rows that is 1.3 to 2 times as fast as the other way round.
    """

    def weight(self, values: torch.Tensor) -> torch.Tensor:
        return values.mT

    def _laid(self, values: torch.Tensor) -> torch.Tensor:
        return values.mT.contiguous()

    @property
    def _laid_shape(self) -> tuple[int, ...]:
        *leading, rows, columns = self.shape
        return (*leading, columns, rows)


@dataclass(frozen=True, slots=True)
class BlockedInt8Layout(IntegerLayout):
    """Where oneDNN's blocked format is at hand: int8 [bytes] in that format. `form` is the format's key: where another
    one is wanted, other bytes are."""

    form: str

    def weight(self, values: torch.Tensor) -> torch.Tensor:
        return self._form.over(values)

    def _laid(self, values: torch.Tensor) -> torch.Tensor:
        return blocked_bytes(lay_out(values)).view(torch.int8)

    @property
    def _laid_shape(self) -> tuple[int, ...]:
        return (self._form.nbytes,)

    @property
    def _form(self) -> BlockedForm:
        return blocked_form(self.shape, torch.int8)


@dataclass(frozen=True, slots=True)
class RowInt8Layout(IntegerLayout):
    """For our own products with AVX2: as it is."""

    def _laid(self, values: torch.Tensor) -> torch.Tensor:
        return values

    @property
    def _laid_shape(self) -> tuple[int, ...]:
        return self.shape


@dataclass(frozen=True, slots=True)
class TiledInt8Layout(IntegerLayout):
    """For our own products in tile registers: int8 [bytes]."""

    def _laid(self, values: torch.Tensor) -> torch.Tensor:
        return tile_products.tiled(values)

    @property
    def _laid_shape(self) -> tuple[int, ...]:
        rows, columns = self.shape
        return (tile_products.tiled_bytes(rows, columns),)


@dataclass(frozen=True, slots=True)
class DottedInt8Layout(IntegerLayout):
    """For our own products by vectors of AVX512: int8 [bytes]."""

    def _laid(self, values: torch.Tensor) -> torch.Tensor:
        return dot_products.dotted(values)

    @property
    def _laid_shape(self) -> tuple[int, ...]:
        rows, columns = self.shape
        return (dot_products.dotted_bytes(rows, columns),)


def int8_layout(shape: tuple[int, ...]) -> IntegerLayout:
    """The layout that this machine multiplies fastest."""
    if len(shape) == 2 and tile_registers.are_ours():
        return TiledInt8Layout(shape)
    if len(shape) == 2 and dot_products.are_ours():
        return DottedInt8Layout(shape)
    if len(shape) == 2 and suits(torch.int8):
        return BlockedInt8Layout(shape, blocked_form(shape, torch.int8).key)
    return RowInt8Layout(shape) if widened_products.suit(torch.int8) else Int8Layout(shape)


def quantize_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values of the tensor's shape and float32 scales [...], one for each row of the last dimension."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    if suits_kernels(rows):
        values, scale = round_rows(rows.contiguous())
        return values.view(tensor.shape), scale.view(tensor.shape[:-1])
    values = torch.empty(rows.shape, dtype=torch.int8, device=tensor.device)
    scale = torch.empty(rows.shape[0], device=tensor.device)
    for part in row_runs(*rows.shape):
        numbers = rows[part].float()
        # Not `aminmax`, which torch does not vectorise along a row: twenty times slower.
        largest = torch.maximum(-numbers.amin(dim=-1), numbers.amax(dim=-1))
        torch.clamp_min(largest.div_(LARGEST), torch.finfo(torch.float32).tiny, out=scale[part])
        values[part].copy_(numbers.mul(scale[part].reciprocal().unsqueeze(-1)).round_())
    return values.view(tensor.shape), scale.view(tensor.shape[:-1])


def suits_kernels(tensor: torch.Tensor) -> bool:
    """Whether our kernels, which know bfloat16 alone, take a tensor of this kind."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def row_runs(rows: int, row: int) -> Iterator[slice]:
    """Runs of rows that stay in the processor's cache as float32 while they are scaled and rounded."""
    step = max(1, CHUNK // max(1, row))
    for first in range(0, rows, step):
        yield slice(first, first + step)
