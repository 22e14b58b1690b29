"""Markers, and a small model. Real data is looked for, never needed: without it its tests are skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# No test has a time limit of its own: the machine may be busy.
settings.register_profile("flexbatch", deadline=None)
settings.load_profile("flexbatch")

REPOSITORY = Path(__file__).resolve().parent.parent


def realdata_folder() -> Path | None:
    """`FLEXBATCH_REALDATA`, then `../shared/realdata` beside the checkout."""
    named = os.environ.get("FLEXBATCH_REALDATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "realdata"
    return folder if folder.is_dir() else None


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_realdata = pytest.mark.skip(reason="no real data: set FLEXBATCH_REALDATA, or put it at ../shared/realdata")
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("realdata") and realdata_folder() is None:
            item.add_marker(no_realdata)
        if item.get_closest_marker("gpu") and not has_cuda():
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real data; skips the test where there is none."""
    folder = realdata_folder()
    if folder is None:
        pytest.skip("no real data: set FLEXBATCH_REALDATA, or put it at ../shared/realdata")
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OPT: three layers, 256 positions, a tokenizer of bytes, float32, a few hundred KB in several shards."""
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
