"""Linear layers of a decoder layer in bfloat16 on a CPU: multiplied by oneDNN's own linear, weights laid out for it.

The results are those of `torch.nn.Linear`, bit for bit (tests/memory/test_blocked_weight.py).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from flexbatch.engine.model import SteppedModel
from flexbatch.memory.blocked_weight import lay_out, linear, suits


class BlockedLinear(nn.Linear):
    """A linear layer whose weight may lie in oneDNN's blocked format."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def use_blocked_linears(stepped: SteppedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Makes every linear layer within the decoder layers a `BlockedLinear`, where that computes in `dtype` here."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not suits(dtype):
        return
    for stop in stepped.stops:
        if stop.layer is not None:
            for module in stop.module.modules():
                if type(module) is nn.Linear:
                    module.__class__ = BlockedLinear


def laid_out_for(module: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """The value of a module's parameter as the module likes it best."""
    if isinstance(module, BlockedLinear) and name == "weight" and value.dtype == torch.bfloat16:
        return lay_out(value)
    return value


def as_multiplied(weight: torch.Tensor) -> torch.Tensor:
    """The weight `[out, in]` as the engine lays it."""
    return lay_out(weight) if weight.device.type == "cpu" and suits(weight.dtype) else weight


def product(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`inputs` `[rows, in]` times a weight that is laid so."""
    return linear(inputs, weight, None) if weight.is_mkldnn else functional.linear(inputs, weight)
