"""Small models in exactly the layouts in which OPT weights were published; written from the layouts' descriptions."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 16, 48, 3, 4, 101


def small_opt(**changes: Any) -> OPTForCausalLM:
    """A random OPT with distinct, non-trivial values in every tensor (norms and biases too)."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "ffn_dim": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 40,
        "word_embed_proj_dim": HIDDEN,
    }
    return scramble(OPTForCausalLM(OPTConfig(**(fields | changes))))


def scramble(model: PreTrainedModel) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model.eval()


def metaseq_state(model: OPTForCausalLM) -> dict[str, torch.Tensor]:
    """metaseq's names, qkv fused in the order keys, values, queries."""
    state: dict[str, torch.Tensor] = {"decoder.version": torch.tensor([3.0])}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.").replace("decoder.final_layer_norm", "decoder.layer_norm")
        name = name.replace("project_in.", "project_in_dim.").replace("project_out.", "project_out_dim.")
        state[name] = tensor.clone()
    del state["lm_head.weight"]
    for layer in range(model.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            prefix = f"decoder.layers.{layer}.self_attn."
            pieces = [state.pop(f"{prefix}{letter}_proj.{kind}") for letter in "kvq"]
            state[f"{prefix}qkv_proj.{kind}"] = torch.cat(pieces)
    return state


def separate_state(model: OPTForCausalLM) -> dict[str, torch.Tensor]:
    """As `convert_to_singleton` leaves it: metaseq's names, keys, values and queries apart."""
    state = metaseq_state(model)
    for name in [name for name in state if "qkv_proj" in name]:
        for letter, piece in zip("kvq", state.pop(name).chunk(3), strict=True):
            state[name.replace("qkv_proj", f"{letter}_proj")] = piece.clone()
    return state


def model_part(state: Mapping[str, torch.Tensor], part: int, parts: int) -> dict[str, torch.Tensor]:
    """One of `parts` pieces in Megatron's way of splitting; the vocabulary is padded so that it divides evenly."""

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(parts, dim=0)[part].clone()

    piece = {}
    for name, tensor in state.items():
        if "qkv_proj" in name:
            piece[name] = torch.cat([rows(third) for third in tensor.chunk(3, dim=0)])
        elif ".fc1." in name:
            piece[name] = rows(tensor)
        elif name.endswith((".fc2.weight", ".out_proj.weight")):
            piece[name] = tensor.chunk(parts, dim=1)[part].clone()
        elif name.endswith("embed_tokens.weight"):
            padding = -tensor.shape[0] % (parts * 4)
            piece[name] = rows(torch.cat([tensor, tensor.new_full((padding, tensor.shape[1]), 9.0)]))
        else:
            piece[name] = tensor.clone()
    return piece


def flat_modules(piece: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors by the module that FSDP wraps (each layer; the root), in the order in which modules register them."""
    layer_order = ("qkv_proj", "out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
    root_order = ("embed_tokens", "embed_positions", "decoder.layer_norm")
    modules: dict[str, dict[str, torch.Tensor]] = {"": {}}
    for owner in root_order:
        for kind in ("weight", "bias"):
            modules[""].update(
                (name, piece[name]) for name in piece if name.endswith(f"{owner}.{kind}") and ".layers." not in name
            )
    layers = sorted({int(name.split(".")[2]) for name in piece if ".layers." in name})
    for layer in layers:
        path = f"decoder.layers.{layer}"
        modules[path] = {}
        for owner in layer_order:
            for kind in ("weight", "bias"):
                name = next(name for name in piece if name.startswith(f"{path}.") and name.endswith(f"{owner}.{kind}"))
                modules[path][name.removeprefix(f"{path}.")] = piece[name]
    return modules


def fsdp_shards(piece: Mapping[str, torch.Tensor], count: int, *, metadata: bool) -> list[dict[str, Any]]:
    """`count` shard files of one model part: one vector per wrapped module, chunked and padded as FairScale does."""
    shards: list[dict[str, Any]] = [{"model": {"decoder.version": piece["decoder.version"]}} for _ in range(count)]
    described: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    for path, tensors in flat_modules(piece).items():
        key = f"{path}.flat_param_0" if path else "flat_param_0"
        vector = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        chunks = list(vector.chunk(count))
        chunks += [vector.new_empty(0)] * (count - len(chunks))
        for number, chunk in enumerate(chunks):
            padding = chunks[0].numel() - chunk.numel()
            shards[number]["model"][key] = torch.nn.functional.pad(chunk, [0, padding]).clone()
            about = {
                "names": list(tensors),
                "shapes": [tensor.shape for tensor in tensors.values()],
                "numels": [tensor.numel() for tensor in tensors.values()],
                "padding": padding,
            }
            described[number].append(
                {
                    "fsdp_path": path,
                    "params": {"flat_param_0": about},
                    "no_broadcast_optim_state": False,
                    "shared_param_info": [],
                }
            )
    for shard, modules in zip(shards, described, strict=True):
        shard |= training_options()
        if metadata:
            shard["shard_metadata"] = {"param_metadata": modules, "buffer_names": ["decoder.version"]}
    return shards


def training_options() -> dict[str, Any]:
    """What metaseq keeps beside the weights: OmegaConf and argparse objects, plain counters."""
    return {
        "cfg": OmegaConf.create(
            {"model": {"arch": "transformer_lm_megatron", "decoder_layers": LAYERS}, "steps": [1, 2]}
        ),
        "args": argparse.Namespace(arch="transformer_lm"),
        "extra_state": {"epoch": 1},
        "optimizer_history": [{"num_updates": 10}],
    }


def save_numpy_folder(model: OPTForCausalLM, folder: Path) -> None:
    """FlexGen's folder: files named like tensors, without `model.`, the last norm renamed, the embedding twice."""
    folder.mkdir()
    for name, tensor in model.state_dict().items():
        name = name.replace("model.", "").replace("decoder.final_layer_norm", "decoder.layer_norm")
        with (folder / name).open("wb") as stream:
            np.save(stream, tensor.numpy())


def save_bin_shards(model: PreTrainedModel, folder: Path, names: Sequence[Sequence[str]], *, index: bool) -> None:
    """`names[i]` of the model's tensors in shard i, with their names as on the hub for OPT: without `model.`."""
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    state = model.state_dict()
    weight_map = {}
    for number, group in enumerate(names, start=1):
        file = f"pytorch_model-{number:05d}-of-{len(names):05d}.bin"
        torch.save({name.removeprefix("model."): state[name] for name in group}, folder / file)
        weight_map.update({name.removeprefix("model."): file for name in group})
    if index:
        import json

        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
