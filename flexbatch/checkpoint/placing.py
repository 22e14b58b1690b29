"""Stored tensors against the model: every tensor gets its name there, or is named as missing, extra or mis-shaped."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from flexbatch.checkpoint.architecture import Expected
from flexbatch.checkpoint.stored import StoredTensor, StoredTensors
from flexbatch.errors import ModelError
from flexbatch.memory.tensor_names import is_leftover, some

_COMPARED_AT_ONCE = 16 * 1024 * 1024


def place(tensors: StoredTensors, expected: Expected, where: str) -> dict[str, StoredTensor]:
    """The tensors to keep, by the name to keep them under, in the model's order; tied tensors once.

    A tensor that makes a parameter together with others (one expert of a mixture, say) keeps its published name, which
    Transformers knows how to combine. ModelError names what is missing, extra or mis-shaped.
    """
    names = _Names(expected)
    kept: dict[str, tuple[str, StoredTensor]] = {}
    extra: list[str] = []
    doubles: list[tuple[str, StoredTensor]] = []
    for name in sorted(tensors, key=dot_natural_key):
        target, is_whole = names.target(name)
        if target is None:
            extra.append(name)
        elif target in expected.tied:
            doubles.append((expected.tied[target], tensors[name]))
        else:
            own = target if is_whole else name
            kept[own] = (target, tensors[name].named(own))
    for owner, tensor in doubles:
        if owner in kept:
            _check_equal(kept[owner][1], tensor)
        else:
            kept[owner] = (owner, tensor.named(owner))
    _check_names(kept, [name for name in extra if not names.is_ignored(name)], expected, where)
    _check_shapes(kept, expected)
    order = {name: number for number, name in enumerate(expected.shapes)}
    return {
        name: tensor
        for name, (_, tensor) in sorted(kept.items(), key=lambda item: (order[item[1][0]], dot_natural_key(item[0])))
    }


class _Names:
    """Published names to the model's names, by Transformers' own rules."""

    def __init__(self, expected: Expected) -> None:
        transforms = get_model_conversion_mapping(expected.model) or []
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._wanted = expected.model.state_dict()
        self._prefix = expected.model.base_model_prefix
        self._ignored = tuple(getattr(expected.model, "_keys_to_ignore_on_load_unexpected", None) or ())

    def target(self, name: str) -> tuple[str | None, bool]:
        """The model's name for a published one, and whether the tensor is that parameter, whole."""
        for candidate in (name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")):
            if candidate in self._wanted:
                return candidate, True
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._wanted)
        return (renamed, pattern is None) if renamed in self._wanted else (None, True)

    def is_ignored(self, name: str) -> bool:
        return is_leftover(name) or any(re.search(rule, name) for rule in self._ignored)


def _check_names(
    kept: Mapping[str, tuple[str, StoredTensor]], extra: list[str], expected: Expected, where: str
) -> None:
    targets = {target for target, _ in kept.values()}
    missing = [name for name in expected.shapes if name not in targets]
    if missing:
        raise ModelError(
            f"{where}: {_count(missing)} of {expected.class_name} missing: {some(missing)}."
            + (f" There are {some(extra)} instead." if extra else ""),
            remedy="The weights do not belong to this config, or a file of theirs was not fetched.",
        )
    if extra:
        raise ModelError(
            f"{where}: {_count(extra)} without a place in {expected.class_name}: {some(extra)}.",
            remedy="The weights do not belong to this config; name the right one with --config.",
        )


def _check_shapes(kept: Mapping[str, tuple[str, StoredTensor]], expected: Expected) -> None:
    parts: dict[str, int] = {}
    for name, (target, tensor) in kept.items():
        parts[target] = parts.get(target, 0) + tensor.numel
        if name == target and tensor.shape != expected.shapes[target]:
            raise _misshaped(tensor, list(tensor.shape), list(expected.shapes[target]))
    for name, (target, tensor) in kept.items():
        if parts[target] != math.prod(expected.shapes[target]):
            raise _misshaped(
                tensor,
                f"{parts[target]} numbers for {target}",
                f"{math.prod(expected.shapes[target])} ({name} is one part)",
            )


def _misshaped(tensor: StoredTensor, found: object, wanted: object) -> ModelError:
    return ModelError(
        f"{tensor.file}: tensor {tensor.name!r} has {found}; the config asks for {wanted}.",
        remedy="Weights and config do not belong together; name the right config with --config.",
    )


def _check_equal(kept: StoredTensor, double: StoredTensor) -> None:
    """A tied tensor that is stored twice must be the same twice; keeping one would else change the model."""
    same = kept.shape == double.shape
    if same:
        first, second = kept.read().reshape(-1), double.read().reshape(-1)
        blocks = range(0, first.numel(), _COMPARED_AT_ONCE)
        same = all(
            torch.equal(
                first[start : start + _COMPARED_AT_ONCE], second[start : start + _COMPARED_AT_ONCE].to(first.dtype)
            )
            for start in blocks
        )
    if not same:
        raise ModelError(
            f"{double.file}: {double.name!r} and {kept.name!r} differ, although the config ties them.",
            remedy="Set tie_word_embeddings to false in the config.json if the model has a head of its own.",
        )


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
