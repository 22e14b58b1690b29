"""FairScale's flattened parameters: one vector per wrapped module, cut into shards of equal length, padded at the end.

A shard's `shard_metadata` says what is in the vectors (fairscale, FullyShardedDataParallel.local_metadata_dict):

    param_metadata: for each wrapped module {fsdp_path, params: {vector: {names, shapes, numels, padding}}, ...}
    buffer_names

The resharded OPT files of May 2022 (`reshard-model_part-N.pt`) hold such vectors without metadata; what is in them
then follows from the order in which metaseq's modules are built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from flexbatch.checkpoint.stored import StoredTensor, from_tensor
from flexbatch.errors import ModelError


@dataclass(frozen=True)
class Shard:
    """One file of one model part: its `model` mapping and its `shard_metadata` (None: there is none)."""

    file: str
    weights: Mapping[str, torch.Tensor]
    metadata: Mapping[str, Any] | None


def is_flat(name: str) -> bool:
    return name.rsplit(".", 1)[-1].startswith("flat_param")


def unflatten(shards: Sequence[Shard], parts: int, config: PreTrainedConfig | None) -> dict[str, StoredTensor]:
    """The tensors of one model part from its shards, in order. `config` is needed for vectors without metadata."""
    first = shards[0]
    if not any(is_flat(name) for name in first.weights) and len(shards) == 1:
        return {name: from_tensor(name, tensor, first.file) for name, tensor in first.weights.items()}
    if all(shard.metadata for shard in shards):
        return _by_metadata(shards)
    if any(shard.metadata for shard in shards):
        raise ModelError(
            f"{first.file}: some shards of this checkpoint have shard_metadata and some have none.",
            remedy="Leave the files of one checkpoint in the folder.",
        )
    if config is None:
        raise ModelError(
            f"{first.file} holds flattened parameters without metadata, so the model's config is needed to cut them.",
            remedy="Name it with --config, such as --config opt-30b.",
        )
    return _by_order(shards, parts, config)


def _by_metadata(shards: Sequence[Shard]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    metadata = [shard.metadata or {} for shard in shards]
    for place, module in enumerate(metadata[0]["param_metadata"]):
        path = module["fsdp_path"]
        for vector, about in module["params"].items():
            key = f"{path}.{vector}" if path else vector
            whole_in_first = bool(module.get("no_broadcast_optim_state"))
            pieces = []
            for shard, its in zip(shards[:1] if whole_in_first else shards, metadata, strict=False):
                padding = int(its["param_metadata"][place]["params"][vector]["padding"])
                piece = _vector(shard, key)
                pieces.append(piece[: piece.numel() - padding] if padding else piece)
            names = [f"{path}.{name}" if path else name for name in about["names"]]
            shapes = [tuple(int(size) for size in shape) for shape in about["shapes"]]
            tensors.update(_cut(pieces, names, shapes, f"{shards[0].file}: {key}", exact=True))
    for name in metadata[0].get("buffer_names", ()):
        if name in shards[0].weights:
            tensors[name] = from_tensor(name, shards[0].weights[name], shards[0].file)
    return tensors


def _by_order(shards: Sequence[Shard], parts: int, config: PreTrainedConfig) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for key, value in shards[0].weights.items():
        if not is_flat(key):
            tensors[key] = from_tensor(key, value, shards[0].file)
            continue
        pieces = [_vector(shard, key) for shard in shards]
        path = key.rpartition(".")[0]
        total = sum(piece.numel() for piece in pieces)
        layout = _layer_order(parts, config) if path.startswith("decoder.layers.") else _root_order(total, config)
        names = [f"{path}.{name}" if path else name for name in layout]
        tensors.update(_cut(pieces, names, list(layout.values()), f"{shards[0].file}: {key}", exact=False))
    return tensors


def _layer_order(parts: int, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """One decoder layer of one model part, in the order in which metaseq's model-parallel layer registers it."""
    hidden, inner = config.hidden_size, config.ffn_dim // parts
    own = hidden // parts
    return {
        "self_attn.qkv_proj.weight": (3 * own, hidden),
        "self_attn.qkv_proj.bias": (3 * own,),
        "self_attn.out_proj.weight": (hidden, own),
        "self_attn.out_proj.bias": (hidden,),
        "self_attn_layer_norm.weight": (hidden,),
        "self_attn_layer_norm.bias": (hidden,),
        "fc1.weight": (inner, hidden),
        "fc1.bias": (inner,),
        "fc2.weight": (hidden, inner),
        "fc2.bias": (hidden,),
        "final_layer_norm.weight": (hidden,),
        "final_layer_norm.bias": (hidden,),
    }


def _root_order(total: int, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """What lies outside the layers; the rows of the (padded) vocabulary in this part follow from the length."""
    hidden, positions = config.hidden_size, config.max_position_embeddings + 2
    rows = (total - positions * hidden - 2 * hidden) // hidden
    return {
        "decoder.embed_tokens.weight": (rows, hidden),
        "decoder.embed_positions.weight": (positions, hidden),
        "decoder.layer_norm.weight": (hidden,),
        "decoder.layer_norm.bias": (hidden,),
    }


def _vector(shard: Shard, key: str) -> torch.Tensor:
    if key not in shard.weights:
        raise ModelError(f"{shard.file} has no {key!r}.", remedy="Fetch this shard again.")
    return shard.weights[key].detach().reshape(-1)


def _cut(
    pieces: Sequence[torch.Tensor], names: Sequence[str], shapes: Sequence[tuple[int, ...]], where: str, *, exact: bool
) -> dict[str, StoredTensor]:
    """Tensors that lie one after the other in the joined pieces. Not `exact`: up to one padded number per shard."""
    needed = sum(math.prod(shape) for shape in shapes)
    total = sum(piece.numel() for piece in pieces)
    if total < needed or total - needed >= (1 if exact else len(pieces)):
        raise ModelError(
            f"{where} has {total} numbers in {len(pieces)} shards; its {len(names)} tensors need {needed}.",
            remedy="A shard is missing or of another checkpoint, or the config does not belong to it.",
        )
    tensors = {}
    start = 0
    for name, shape in zip(names, shapes, strict=True):
        tensors[name] = _slice(pieces, start, name, shape, where)
        start += math.prod(shape)
    return tensors


def _slice(pieces: Sequence[torch.Tensor], start: int, name: str, shape: tuple[int, ...], where: str) -> StoredTensor:
    def read() -> torch.Tensor:
        begin, end, parts, place = start, start + math.prod(shape), [], 0
        for piece in pieces:
            low, high = max(begin - place, 0), min(end - place, piece.numel())
            if low < high:
                parts.append(piece[low:high])
            place += piece.numel()
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)

    return StoredTensor(name, shape, pieces[0].dtype, where, read)
