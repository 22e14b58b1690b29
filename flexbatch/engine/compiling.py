"""Kernels are compiled before a run begins, by another process: the compiler leaves 120 MiB behind where it has worked.

That process runs a small model under the run's policy, and so compiles for the very types that the run will ask for.
What it has not met is compiled by the run itself.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import torch
from llvmlite import binding
from transformers import AutoConfig

from flexbatch.engine.growing import Vocabulary
from flexbatch.engine.model import build
from flexbatch.engine.opening import Checkpoint, EngineOptions, Limits, open_engine
from flexbatch.engine.rehearsal import NoText, save_random
from flexbatch.kernels import CODE_FOLDER
from flexbatch.kernels.float_tile_products import RECORD_INPUTS
from flexbatch.kernels.small_products import HAS_TILES
from flexbatch.memory.own_process import WorkFailed, in_own_process
from flexbatch.plan.policy import ALL_DEVICE, Policy, Shares
from flexbatch.records import Request, Sampling

logger = logging.getLogger(__name__)

COMPILER_BYTES = 192 << 20
"""That a run must have left to compile for itself."""

HEADS, WIDTH, LAYERS, TOKENS = 4, 256, 2, 512
SHARED, LONG, NEW = 48, 150, 40
"""Tokens that prompts share, those of prompts that enter in parts, and new ones: more than the arena's columns last."""


def compile_ahead(policy: Policy, dtype: torch.dtype) -> None:
    """Sees to it that the code of the kernels that a run on a CPU uses is kept on disk, for this processor."""
    rehearsed = replace(
        policy,
        weights=_halved(policy.weights),
        kv=_halved(policy.kv),
        hidden=ALL_DEVICE,
        slots=4,
        prefill_tokens=96,
        prefetch_bytes=0,
    )
    told = (binding.get_host_cpu_name(), HAS_TILES, str(dtype), rehearsed)
    mark = CODE_FOLDER / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.rehearsed"
    if mark.exists():
        return
    logger.info("Compiling this run's kernels once (some ten seconds)")
    try:
        in_own_process(rehearse_policy, rehearsed, dtype)
    except WorkFailed as failure:
        logger.warning("The run compiles its kernels itself: %s", failure)
        return
    with suppress(OSError):
        mark.touch()


def _halved(shares: Shares) -> Shares:
    """All on the device, or half of it and the rest where that is."""
    if shares.device >= 1.0 - 1e-9:
        return ALL_DEVICE
    return Shares(0.5, 0.5 if shares.host > shares.disk else 0.0)


def rehearse_policy(policy: Policy, dtype: torch.dtype) -> None:
    """Runs some requests of every kind through a small model under `policy`."""
    with tempfile.TemporaryDirectory(prefix="flexbatch-rehearse-") as made:
        folder = Path(made)
        options = EngineOptions(
            span=SHARED + LONG + NEW, own_span=LONG + NEW, dtype=dtype, packed_folder=folder / "packed"
        )
        limits = Limits(disk_folder=folder, one_memory=True)
        vocabulary = Vocabulary(NoText(), frozenset())
        with closing(open_engine(_checkpoint(folder, dtype), policy, limits, vocabulary, options)) as engine:
            for _ in engine.run(_requests()):
                pass


def _checkpoint(folder: Path, dtype: torch.dtype) -> Checkpoint:
    """A small OPT with random weights."""
    config = AutoConfig.for_model(
        "opt",
        num_hidden_layers=LAYERS,
        vocab_size=TOKENS,
        hidden_size=WIDTH,
        ffn_dim=RECORD_INPUTS,  # products by compressed weights as they are, and by expanded ones
        num_attention_heads=HEADS,
        word_embed_proj_dim=WIDTH,
        max_position_embeddings=SHARED + LONG + NEW,
    )
    entries = save_random(build(config, dtype).model, folder / "model.safetensors")
    return Checkpoint(config, entries, str(folder))


def _requests() -> Iterator[Request]:
    """Prompts that share their beginning, some alone, and some that are scored."""
    sampling = Sampling(max_new_tokens=NEW)
    for index in range(12):
        shared = SHARED if index < 6 else 0
        own = tuple((7 * index + step) % TOKENS for step in range(24 if shared else LONG - index))
        yield Request(index, (*range(shared), *own), sampling, score_tokens=8 * (index % 6 == 5), shared_tokens=shared)
