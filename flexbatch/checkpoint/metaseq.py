"""metaseq checkpoints: consolidated (`restored.pt`), model parts (`reshard-model_part-N.pt`), and their shards.

Facts of the form (facebookresearch/metaseq, scripts and `distributed/stitch_fsdp_ckpt.py`):

* A file is `{"model": tensors, "shard_metadata": ..., "cfg": ..., ...}`. Names are `{stem}.pt`,
  `{stem}-model_part-{part}.pt`, or `{stem}-model_part-{part}-shard{shard}.pt`.
* Model parts split `fc1` and the attention inputs by output rows, `fc2` and `out_proj` by input columns, and the
  vocabulary by rows (padded, so that it divides evenly). Norms, positions and the other biases are in every part.
* `qkv_proj` fuses keys, values and queries **in this order**, within each part.
* metaseq's `decoder.layer_norm` is Transformers' `final_layer_norm`; the output projection is the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, PreTrainedConfig

from flexbatch.checkpoint.flat_parameters import Shard, unflatten
from flexbatch.checkpoint.stored import StoredTensor
from flexbatch.checkpoint.torch_files import load_pickle
from flexbatch.errors import ModelError

_FILE = re.compile(r"(?P<stem>.*?)(-model_part-(?P<part>\d+))?(-shard(?P<shard>\d+))?\.pt")

_COLUMN_PARALLEL = ("fc1", "q_proj", "k_proj", "v_proj")
_ROW_PARALLEL = ("fc2", "out_proj")
_VOCABULARY = ("embed_tokens.weight", "output_projection.weight", "lm_head.weight")
_MOST_PADDING_ROWS = 1024

_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\.")
_RENAMED = (
    (re.compile(r"^(model\.)?decoder\.layer_norm\."), "decoder.final_layer_norm."),
    (re.compile(r"^(model\.)?decoder\.output_projection\."), "lm_head."),
    (re.compile(r"\bproject_(in|out)_dim\."), r"project_\1."),
)
_NO_WEIGHTS = re.compile(r"(^|\.)(version|_float_tensor)$")

# Heads do not show in any shape; these are the published models' (hidden size: heads).
_HEADS = {768: 12, 1024: 16, 2048: 32, 2560: 32, 4096: 32, 5120: 40, 7168: 56, 9216: 72, 12288: 96}


@dataclass(frozen=True)
class MetaseqFiles:
    """The files of one checkpoint: `parts[part][shard]`."""

    parts: Sequence[Sequence[Path]]


def find_files(source: Path) -> MetaseqFiles | None:
    """The checkpoint that `source` (a folder, one of its files, or the common start of their names) names.

    None where there is none. ModelError: several checkpoints in the folder, a part or shard that is missing.
    """
    folder = source if source.is_dir() else source.parent
    if not folder.is_dir():
        return None
    groups: dict[str, dict[tuple[int, int], Path]] = {}
    for file in folder.glob("*.pt"):
        match = _FILE.fullmatch(file.name)
        if match:
            place = (int(match["part"] or 0), int(match["shard"] or 0))
            groups.setdefault(match["stem"], {})[place] = file
    if source.is_dir():
        if len(groups) > 1:
            raise ModelError(
                f"{source} holds several checkpoints: {', '.join(sorted(groups))}.",
                remedy=f"Name one of them: {source / min(groups)}.",
            )
        stem = next(iter(groups), None)
    else:
        match = _FILE.fullmatch(source.name)
        stem = match["stem"] if match else source.name
    return _complete(folder, stem, groups[stem]) if stem is not None and stem in groups else None


def _complete(folder: Path, stem: str, files: Mapping[tuple[int, int], Path]) -> MetaseqFiles:
    part_count = 1 + max(part for part, _ in files)
    shard_count = 1 + max(shard for _, shard in files)
    for part in range(part_count):
        for shard in range(shard_count):
            if (part, shard) not in files:
                raise ModelError(
                    f"{folder}: {stem} has {part_count} model parts of {shard_count} shards, but part {part} "
                    f"shard {shard} is missing.",
                    remedy="Fetch the missing file; every part has as many shards as the others.",
                )
    return MetaseqFiles([[files[part, shard] for shard in range(shard_count)] for part in range(part_count)])


def read_metaseq(files: MetaseqFiles, config: PreTrainedConfig | None) -> dict[str, StoredTensor]:
    """The whole model's tensors under Transformers' names for OPT, each put together when it is read."""
    parts = [unflatten([_shard(file) for file in shards], len(files.parts), config) for shards in files.parts]
    merged: dict[str, StoredTensor] = {}
    for name in parts[0]:
        lost = [number for number, part in enumerate(parts) if name not in part]
        if lost:
            raise ModelError(
                f"Model part {lost[0]} lacks {name!r}, which part 0 has.",
                remedy="The parts are of different checkpoints.",
            )
        clean = _WRAPPERS.sub("", name)
        if not _NO_WEIGHTS.search(clean):
            merged[clean] = _merge(clean, [part[name] for part in parts])
    return to_transformers_names(merged)


def to_transformers_names(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """metaseq's (and so Alpa's and FlexGen's) names to those of Transformers' OPT; fused qkv is taken apart."""
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if _NO_WEIGHTS.search(name):
            continue
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        for new in _separate(tensor.named(name)) if ".qkv_proj." in name else [tensor.named(name)]:
            renamed[new.name] = new
    return renamed


def fit_vocabulary(tensors: Mapping[str, StoredTensor], vocab_size: int) -> dict[str, StoredTensor]:
    """Embedding and head with exactly `vocab_size` rows: rows of padding are cut off, or zero rows added."""
    return {
        name: _fit_rows(tensor, vocab_size) if name.endswith(_VOCABULARY) else tensor
        for name, tensor in tensors.items()
    }


def derive_config(tensors: Mapping[str, StoredTensor]) -> OPTConfig:
    """The OPT config of tensors under Transformers' names, read off their shapes. ModelError where that cannot be."""
    shapes = {name.removeprefix("model."): tensor.shape for name, tensor in tensors.items()}
    layers = {int(match.group(1)) for name in shapes if (match := re.match(r"decoder\.layers\.(\d+)\.", name))}
    try:
        vocabulary, projected = shapes["decoder.embed_tokens.weight"]
        positions, hidden = shapes["decoder.embed_positions.weight"]
        inner = shapes["decoder.layers.0.fc1.weight"][0]
        heads = _HEADS[hidden]
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"The model's config cannot be read off this checkpoint (no {error}).",
            remedy="Name it with --config: a model of conf/model (such as opt-175b), or a folder with config.json.",
        ) from error
    return OPTConfig(
        vocab_size=min(vocabulary, 50272) if vocabulary - 50272 in range(_MOST_PADDING_ROWS) else vocabulary,
        hidden_size=hidden,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        ffn_dim=inner,
        max_position_embeddings=positions - 2,
        word_embed_proj_dim=projected,
        do_layer_norm_before="decoder.final_layer_norm.weight" in shapes,
        enable_bias="decoder.layers.0.fc1.bias" in shapes,
        layer_norm_elementwise_affine="decoder.layers.0.final_layer_norm.weight" in shapes,
        architectures=["OPTForCausalLM"],
    )


def _shard(file: Path) -> Shard:
    content = load_pickle(file, options_inside=True)
    model = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise ModelError(
            f"{file} is no metaseq checkpoint: it has no mapping of tensors under `model`.",
            remedy="Give the checkpoint's own files, such as restored.pt or reshard-model_part-0.pt.",
        )
    metadata: Any = content.get("shard_metadata")
    weights = {str(name): value for name, value in model.items() if isinstance(value, torch.Tensor)}
    return Shard(str(file), weights, metadata if isinstance(metadata, dict) and metadata else None)


def _merge(name: str, parts: Sequence[StoredTensor]) -> StoredTensor:
    """One tensor of the whole model from its model parts."""
    owner, kind = [*name.split(".")[-2:]] if "." in name else ["", name]
    if len(parts) == 1:
        return parts[0].named(name)
    if owner == "qkv_proj" or owner in _COLUMN_PARALLEL or name.endswith(_VOCABULARY):
        # Keys, values and queries are fused within each part: thirds are joined across the parts, third by third.
        return _joined(name, parts, axis=0, groups=3 if owner == "qkv_proj" else 1)
    if owner in _ROW_PARALLEL and kind == "weight":
        return _joined(name, parts, axis=1, groups=1)
    return parts[0].named(name)


def _joined(name: str, parts: Sequence[StoredTensor], axis: int, groups: int) -> StoredTensor:
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)

    def read() -> torch.Tensor:
        pieces = [part.read() for part in parts]
        if groups == 1:
            return torch.cat(pieces, dim=axis)
        chunked = [piece.chunk(groups, dim=axis) for piece in pieces]
        return torch.cat([chunks[group] for group in range(groups) for chunks in chunked], dim=axis)

    return StoredTensor(name, tuple(shape), parts[0].dtype, parts[0].file, read)


def _separate(fused: StoredTensor) -> list[StoredTensor]:
    """Keys, values, queries: the thirds of a fused tensor of the whole model, in metaseq's order."""
    rows = fused.shape[0] // 3

    def third(number: int) -> StoredTensor:
        return StoredTensor(
            fused.name.replace("qkv_proj", ("k_proj", "v_proj", "q_proj")[number]),
            (rows, *fused.shape[1:]),
            fused.dtype,
            fused.file,
            lambda: fused.read()[number * rows : (number + 1) * rows],
        )

    return [third(number) for number in range(3)]


def _fit_rows(tensor: StoredTensor, vocab_size: int) -> StoredTensor:
    extra = tensor.shape[0] - vocab_size
    if extra == 0 or abs(extra) > _MOST_PADDING_ROWS:
        return tensor  # Too far off for padding: left for the check of shapes to name.
    shape = (vocab_size, *tensor.shape[1:])

    def read() -> torch.Tensor:
        rows = tensor.read()
        return rows[:vocab_size] if extra > 0 else torch.cat([rows, rows.new_zeros((-extra, *shape[1:]))])

    return StoredTensor(tensor.name, shape, tensor.dtype, tensor.file, read)
