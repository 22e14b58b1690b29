"""How the weights of linear layers in bfloat16 lie on a CPU: as the products like them that are fastest on it.

With tile registers (AMX) products are our own; elsewhere oneDNN's, of its blocked format (`blocked_weight.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexbatch.kernels import float_tile_products, tile_products, tile_registers
from flexbatch.memory import blocked_weight
from flexbatch.memory.blocked_weight import BlockedLayout, blocked_layout


@dataclass(frozen=True, slots=True)
class TiledLayout:
    """How a weight `[out, in]` is kept in bfloat16 for tile registers, uint8 `[bytes]`."""

    shape: tuple[int, ...]

    @property
    def together(self) -> int:
        """So many trailing dimensions are packed together."""
        return 2

    @property
    def nbytes(self) -> int:
        rows, columns = self.shape
        return tile_products.tiled_bytes(rows, columns * torch.bfloat16.itemsize)

    @property
    def parts(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
        """Name, dtype and shape of each stored tensor."""
        return (("tiled", torch.uint8, (self.nbytes,)),)

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The `parts` of a weight of this shape."""
        return (tile_products.tiled(tensor.to(torch.bfloat16)).view(torch.uint8),)

    def weight(self, stored: torch.Tensor) -> torch.Tensor:
        """The weight for `linear` over its stored bytes, which must outlive it."""
        return stored.view(torch.bfloat16)


def float_layout(shape: tuple[int, ...]) -> TiledLayout | BlockedLayout:
    """The layout of a weight `[out, in]` on this machine, which must suit bfloat16 (`blocked_weight.suits`)."""
    return TiledLayout(shape) if _is_for_tiles(shape) else blocked_layout(shape)


def lay_out(weight: torch.Tensor) -> torch.Tensor:
    """The weight `[out, in]` in that layout."""
    return tile_products.tiled(weight) if _is_for_tiles(tuple(weight.shape)) else blocked_weight.lay_out(weight)


def is_laid_out(weight: torch.Tensor) -> bool:
    return weight.is_mkldnn or weight.dim() == 1


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rectified: bool = False) -> torch.Tensor:
    """`x` `[..., in]` bfloat16 times a weight as it was laid out, or a plain one `[out, in]`, plus `bias` `[out]`:
    summed in float32 and rounded once. With `rectified`, what ReLU makes of it."""
    if weight.dim() == 1:
        multiply, outputs = float_tile_products.linear, weight.numel() // x.shape[-1]
    elif not weight.is_mkldnn and _is_for_tiles(tuple(weight.shape)) and _is_whole(weight):
        multiply, outputs = float_tile_products.stored_linear, len(weight)
    else:
        return blocked_weight.linear(x, weight, bias, rectified)
    return multiply(_rows(x), weight, _added(bias, outputs), rectified).view(*x.shape[:-1], outputs)


@dataclass(frozen=True, slots=True)
class CompressedWeight:
    """A weight of so many `outputs` in the records that it was compressed to (`float_tile_products`)."""

    records: torch.Tensor
    exceptions: int
    outputs: int

    @staticmethod
    def suits(layout: object) -> bool:
        """Whether one of this layout is multiplied as its records, which are of whole columns."""
        return isinstance(layout, TiledLayout) and layout.shape[1] % float_tile_products.RECORD_INPUTS == 0

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None, rectified: bool = False) -> torch.Tensor:
        """`linear` of the weight."""
        made = float_tile_products.compressed_linear(
            _rows(x), self.records, self.exceptions, _added(bias, self.outputs), rectified
        )
        return made.view(*x.shape[:-1], self.outputs)


def _is_for_tiles(shape: tuple[int, ...]) -> bool:
    return tile_registers.are_ours() and len(shape) == 2 and float_tile_products.suits(*shape)


def _is_whole(weight: torch.Tensor) -> bool:
    """Whether two numbers of a stored weight can be read at once."""
    return weight.is_contiguous() and weight.data_ptr() % 4 == 0


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _added(bias: torch.Tensor | None, outputs: int) -> torch.Tensor:
    return torch.zeros(outputs) if bias is None else bias.float()
