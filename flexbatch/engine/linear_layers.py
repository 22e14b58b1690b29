"""Linear layers in bfloat16 on a CPU, multiplied the way that is fastest on it.

Where the processor multiplies bfloat16, weights are laid out as its fastest products like them (`LaidOutLinear`): ours
in tile registers, or oneDNN's, with the results of `torch.nn.Linear`, bit for bit. Where it does not, products are our
own (`WidenedLinear`). All are summed in float32 and rounded once, ours in another order.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from flexbatch.engine.model import SteppedModel
from flexbatch.kernels import widened_products
from flexbatch.memory.blocked_weight import suits
from flexbatch.memory.float_layout import CompressedWeight, is_laid_out, lay_out, linear


class LaidOutLinear(nn.Linear):
    """A linear layer whose weight may be laid out for the products, or `compressed` besides. It `rectifies` where ReLU
    comes after it."""

    rectifies = False
    compressed: CompressedWeight | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.compressed is not None:
            return self.compressed.linear(x, self.bias, self.rectifies)
        return linear(x, self.weight, self.bias, self.rectifies)


class WidenedLinear(nn.Linear):
    """A linear layer on a CPU that does not multiply bfloat16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _widened(x, self.weight, self.bias)


def use_fastest_linears(stepped: SteppedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Makes linear layers that compute in `dtype` of the kind that is fastest here: within the decoder layers where
    weights are laid out for it, else everywhere."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return
    if suits(dtype):
        layers = [stop.module for stop in stepped.stops if stop.layer is not None]
        _become([module for layer in layers for module in layer.modules()], LaidOutLinear)
        for layer in range(stepped.num_layers):
            _rectify_within_products(stepped.layer(layer))
    elif widened_products.suit(dtype):
        _become(list(stepped.model.modules()), WidenedLinear)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer and nothing else."""
    return type(module) in (nn.Linear, LaidOutLinear, WidenedLinear)


def laid_out_for(module: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """The value of a module's parameter as the module likes it best."""
    if isinstance(module, LaidOutLinear) and name == "weight" and value.dtype == torch.bfloat16:
        return lay_out(value)
    return value


def as_multiplied(weight: torch.Tensor) -> torch.Tensor:
    """The weight `[out, in]` as the engine lays it."""
    return lay_out(weight) if weight.device.type == "cpu" and suits(weight.dtype) else weight


def product(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`inputs` `[rows, in]` times a weight that is laid so."""
    if is_laid_out(weight):
        return linear(inputs, weight, None)
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and widened_products.suit(weight.dtype):
        return _widened(inputs, weight, None)
    return functional.linear(inputs, weight)


def _become(modules: list[nn.Module], kind: type[nn.Linear]) -> None:
    for module in modules:
        # Some models keep a layer in float32 whatever type is asked for.
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.__class__ = kind


def _rectify_within_products(layer: nn.Module) -> None:
    """ReLU after a layer's first linear module, as OPT names them, becomes a part of the product: alone it reads and
    writes the widest of a layer's results once more."""
    for module in layer.modules():
        first = getattr(module, "fc1", None)
        if type(first) is LaidOutLinear and type(getattr(module, "activation_fn", None)) is nn.ReLU:
            first.rectifies, module.activation_fn = True, nn.Identity()


def _widened(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    # Some models keep a layer in float32 whatever type is asked for.
    if not x.dtype == weight.dtype == torch.bfloat16:
        return functional.linear(x, weight, bias)
    made = widened_products.float_product(rows.contiguous(), weight.contiguous(), bias)
    return made.view(*x.shape[:-1], len(weight))
