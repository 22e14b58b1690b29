"""The last decoder layer computes only what somebody reads.

Every token's keys and values are needed there as in any other layer. What attention and the products after it make of a
token goes to the head and nowhere else, and of a prompt the head reads one position, of a part of a prompt none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class ReadTokens:
    """The tokens of a call that are read, int64 `[read]`, in ascending order, and how many tokens the call has."""

    index: torch.Tensor
    of: int


_read: ContextVar[ReadTokens | None] = ContextVar("read", default=None)
"""Set from the last layer's attention on (each call of the model has a context of its own)."""


def compute_only(read: ReadTokens) -> None:
    """What comes after the last layer's attention is computed for these tokens; others are zeros from there on."""
    _read.set(read)


def narrow(last: nn.Module, is_linear: Callable[[nn.Module], bool]) -> None:
    """Lets the last decoder layer's linear layers (by `is_linear`) leave out tokens that nobody reads, once
    `compute_only` says which are. Experts in a list get tokens of a router's choice, in an order of its own, and
    compute all of them."""
    for name, module in last.named_modules():
        if is_linear(module) and not any(part.isdigit() for part in name.split(".")):
            module.forward = _narrowed(module.forward)


def _narrowed(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def narrowed(x: torch.Tensor) -> torch.Tensor:
        read = _read.get()
        if read is None or x.dim() < 2 or x.shape[-2] != read.of or x.numel() != read.of * x.shape[-1]:
            return forward(x)
        made = forward(x.index_select(-2, read.index))
        whole = made.new_zeros(*x.shape[:-1], made.shape[-1])
        return whole.index_copy_(whole.dim() - 2, read.index, made)

    return narrowed
