"""The experts of a mixture, each with linear layers of its own.

Transformers keeps the matrices of all experts of a layer in two stacks, while most checkpoints hold them one by one. A
stack would be put together anew in every pass, from parts that are in memory at the same time. Apart, each matrix is
used where it was read to, and is packed, laid out and multiplied like any other linear layer's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.initialization import no_init_weights

from flexbatch.memory.safetensors_header import TensorEntry

STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The parameters of Transformers' experts, and the layers whose weights are in them, one below the other."""

_PLAIN = re.compile(r"[\w.]*\*[\w.]*")
"""A pattern of stored names that differ in one number."""


class Expert(nn.Module):
    """A gated feed-forward network. `gate` takes the outputs of both first layers side by side."""

    def __init__(self, hidden: int, inner: int, gate: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype):
        super().__init__()
        self.gate_proj, self.up_proj = (_linear(hidden, inner, dtype) for _ in range(2))
        self.down_proj = _linear(inner, hidden, dtype)
        self._gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, hidden]."""
        if not len(x):
            return x
        return self.down_proj(self._gate(torch.cat([self.gate_proj(x), self.up_proj(x)], dim=-1)))  # type: ignore[no-any-return]


class Experts(nn.ModuleList):
    """In the place of Transformers' stacked experts, and called as they are."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden_states` [tokens, hidden]; for each token its experts and their weights, both [tokens, chosen].

        Sums are float32, in the order of the experts. Every expert is called, if only with no token: the weights of the
        next one may not come before its own have been asked for.
        """
        made = torch.zeros(hidden_states.shape, device=hidden_states.device)
        chosen, share = top_k_index.flatten(), top_k_weights.flatten()[:, None].float()
        counts = chosen.bincount(minlength=len(self)).tolist()
        for expert, places in zip(self, torch.split(chosen.argsort(stable=True), counts), strict=True):
            tokens = places // top_k_index.shape[-1]
            made.index_add_(0, tokens, expert(hidden_states[tokens]).float() * share[places])
        return made.to(hidden_states.dtype)


@dataclass(frozen=True, slots=True)
class Stack:
    """Where the weights of a parameter of Transformers' experts belong: those of `layers` of the experts at `path`."""

    path: str
    layers: tuple[str, ...]

    def parameter(self, expert: int, layer: str) -> str:
        return f"{self.path}.{expert}.{layer}.weight"

    def of_part(self, key: str, pattern: str, converter: WeightConverter) -> str:
        """The name of the parameter that a tensor stored as `key` is, which matched one of the converter's patterns."""
        number = re.search(r"(\d+)" + re.escape(pattern.partition("*")[2]), key)
        assert number is not None
        return self.parameter(int(number.group(1)), self.layers[converter.source_patterns.index(pattern)])

    def slices(self, whole: TensorEntry) -> Iterator[TensorEntry]:
        """The parameters that are in a stored stack, each where it lies there."""
        experts, rows, columns = whole.shape
        shape = rows // len(self.layers), columns
        nbytes = whole.nbytes // (experts * len(self.layers))
        names = [self.parameter(expert, layer) for expert in range(experts) for layer in self.layers]
        for index, name in enumerate(names):
            yield TensorEntry(name, whole.file, whole.offset + index * nbytes, nbytes, whole.dtype, shape)


def stacks(model: PreTrainedModel) -> dict[str, Stack]:
    """By the names that the parameters have in Transformers."""
    paths = [path for path, module in model.named_modules() if isinstance(module, Experts)]
    return {f"{path}.{name}": Stack(path, layers) for path in paths for name, layers in STACKS.items()}


def routers(module: nn.Module) -> list[nn.Module]:
    """The modules that choose among experts that are apart: beside them, with a row for each. Few numbers on which much
    depends: they are never packed."""
    families = [list(parent.children()) for parent in module.modules()]
    mixtures = [(siblings, each) for siblings in families for each in siblings if isinstance(each, Experts)]
    return [
        router
        for siblings, experts in mixtures
        for sibling in siblings
        if sibling is not experts
        for router in sibling.modules()
        if getattr(router, "weight", torch.empty(0)).shape[:-1] == (len(experts),)
    ]


def take_apart(model: PreTrainedModel) -> None:
    """Replaces the stacked experts of a meta-device model, where a checkpoint has their matrices one by one, or in
    stacks that are the parameters as they are."""
    converters = [each for each in get_model_conversion_mapping(model) or [] if isinstance(each, WeightConverter)]
    if not all(_lines_up(name, converters) for name in STACKS):
        return
    with no_init_weights():
        for path, module in list(model.named_modules()):
            if _is_stacked(module):
                model.set_submodule(path, _apart(module))


def _is_stacked(module: nn.Module) -> bool:
    """Whether the module is of the kind that `use_experts_implementation` of Transformers describes, without biases."""
    has = {name: getattr(module, name, False) for name in ("has_gate", "is_concatenated")}
    lacks = {name: getattr(module, name, False) for name in ("has_bias", "is_transposed", "has_post_expert_norm")}
    parameters = dict(module.named_parameters(recurse=False))
    return all(has.values()) and not any(lacks.values()) and parameters.keys() == STACKS.keys()


def _lines_up(name: str, converters: list[WeightConverter]) -> bool:
    """Whether what makes such a parameter of a checkpoint's tensors lines them up and changes nothing."""
    operations = [("MergeModulelist", 0), ("Concatenate", 1)][: len(STACKS[name])]
    mine = [each for each in converters if any(name in target for target in each.target_patterns)]
    return all(
        [_kind(each) for each in converter.operations] == operations
        and len(converter.source_patterns) == len(STACKS[name])
        and all(_PLAIN.fullmatch(pattern) for pattern in converter.source_patterns)
        for converter in mine
    )


def _kind(operation: object) -> tuple[str, int]:
    return type(operation).__name__, getattr(operation, "dim", 0)


def _apart(stacked: nn.Module) -> Experts:
    count, hidden, inner = stacked.down_proj.shape  # type: ignore[misc]
    gate, dtype = stacked._apply_gate, stacked.down_proj.dtype
    return Experts(Expert(hidden, inner, gate, dtype) for _ in range(count))  # type: ignore[arg-type]


def _linear(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, device="meta", dtype=dtype)
