"""A small random model, small datasets, and the command line, for jobs from one end to the other."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.command_line import CommandLine


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OPT of three layers with a tokenizer of bytes, in float32, a few hundred KB in several shards."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "small"
    vocabulary = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>"])}
    vocabulary |= {letter: number + 3 for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    config = OPTConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        word_embed_proj_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=128,
        max_position_embeddings=256,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)  # spread the logits, so that greedy choices are clear
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def write_rows(folder: Path, shards: int, rows: int, longest: int = 60, seed: int = 0) -> Path:
    """JSON lines with an id, a text of random length and a label, spread over `shards` files."""
    letters = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with (folder / f"rows-{shard}.jsonl").open("w") as file:
            for number in range(shard, rows, shards):
                text = "".join(letters.choices("abcdefgh ", k=letters.randint(5, longest)))
                file.write(json.dumps({"name": f"row {number}", "text": text, "label": number % 3}) + "\n")
    return folder


@pytest.fixture(scope="session")
def command_line() -> Iterator[CommandLine]:
    """A warm process that runs commands as `python -m flexbatch` would."""
    running = CommandLine()
    assert running.ready
    yield running
    running.close()
