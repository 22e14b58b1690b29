"""The job's model, found and identified, with its tokenizer. Of the weights only samples are read (fingerprint)."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

from flexbatch.checkpoint.dummy import dummy_index
from flexbatch.checkpoint.resolve import ModelFolder, resolve_model
from flexbatch.composition import bundled
from flexbatch.config import Config, JobConfig
from flexbatch.engine.opening import Checkpoint, compute_dtype
from flexbatch.errors import ConfigError, ModelError
from flexbatch.memory.safetensors_header import TensorEntry

SAMPLE_BYTES = 1 << 14
SAMPLES_PER_FILE = 16
DUMMY_WARNING = "WARNING: the weights are dummies (model.weights=dummy): random numbers. What comes out means nothing."


@dataclass(frozen=True)
class Model:
    """A model that can be run. `context_tokens` is its number of positions, 0 where it has no bound."""

    found: ModelFolder
    tokenizer: Any  # a Transformers fast tokenizer; each user states the part of it that it needs as a protocol
    dtype: torch.dtype
    device: torch.device
    end_tokens: frozenset[int]
    context_tokens: int

    @property
    def config(self) -> PreTrainedConfig:
        return self.found.config

    @property
    def warnings(self) -> tuple[str, ...]:
        """What everyone who reads the results must know."""
        return () if self.found.index else (DUMMY_WARNING,)

    def checkpoint(self, cache_dir: Path) -> Checkpoint:
        """Where the weights lie; dummy ones are made now if they are not there yet."""
        index = self.found.index or dummy_index(self.config, self.dtype, cache_dir, report=say)
        return Checkpoint(self.config, index.entries, str(self.found.folder or self.found.name))

    def fingerprint(self) -> dict[str, Any]:
        """What of the model changes results: architecture, weights (by sampled content), tokenizer, arithmetic."""
        entries = self.found.index.entries if self.found.index else {}
        return {
            "config": _digest(self.config.to_dict()),
            "weights": weights_digest(entries) if entries else "dummy",
            "tokenizer": _digest(self.tokenizer.backend_tokenizer.to_str()),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def find_model(config: Config) -> Model:
    """The model that the configuration names. ModelError for anything wrong with it; ConfigError where dummy weights
    would be scored."""
    if is_scored(config.job):
        refuse_dummy_scores(config)
    found = resolve_model(config.model, report=say)
    return _described(config, found, found.require_tokenizer())


def is_scored(job: JobConfig) -> bool:
    """Whether the job ends with figures of how good the answers are."""
    return job.kind == "helm_eval" or bool(
        (job.kind == "extract" and job.gold) or (job.kind == "summarize" and job.reference)
    )


def refuse_dummy_scores(config: Config) -> None:
    """ConfigError for a scored job whose weights are dummies, unless it is allowed to be."""
    if config.model.weights == "dummy" and not config.model.allow_dummy_scores:
        raise ConfigError(
            "model.weights=dummy: the weights would be random numbers, and the scores of this job would mean nothing.",
            remedy="Bring the model's weights (docs/models.md); or, to see how fast it runs, take job=generate; or "
            "set model.allow_dummy_scores=true.",
        )


def say(line: str) -> None:
    """What is done once and takes long (an import, dummy weights), on standard error."""
    print(line, file=sys.stderr, flush=True)


def find_model_to_plan(config: Config) -> tuple[Model, tuple[str, ...]]:
    """As `find_model`, where neither weights nor tokenizer need be here; and what the plan then rests on."""
    notes = []
    try:
        found = resolve_model(config.model, report=say)
    except ModelError:
        if not config.model.config:
            raise
        found = resolve_model(replace(config.model, weights="dummy"), report=say)
        notes.append(f"no weights of {config.model.name} are here; its shapes come from the configuration")
    tokenizer = found.tokenizer
    if tokenizer is None:
        tokenizer = bundled("embedded") / "opt_tiny"
        notes.append("prompt lengths are counted with the tokenizer of opt-tiny, because the model's own is not here")
    return _described(config, found, tokenizer), tuple(notes)


def _described(config: Config, found: ModelFolder, tokenizer: Path) -> Model:
    device = compute_device(config.offload.device)
    stored = found.index.entries if found.index else {}
    choice = config.model.dtype if stored or config.model.dtype != "auto" else _stated_dtype(found.config)
    return Model(
        found,
        AutoTokenizer.from_pretrained(tokenizer),
        compute_dtype(choice, stored, device),
        device,
        end_tokens(found),
        context_tokens(found.config),
    )


def compute_device(choice: str) -> torch.device:
    """The device of `offload.device`. ConfigError where it is not there."""
    if choice == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(choice)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"offload.device is {choice!r}: {str(error).splitlines()[0]}",
            remedy="Use auto, cpu, or a device that this machine has.",
        ) from error
    return device


def end_tokens(found: ModelFolder) -> frozenset[int]:
    """The tokens that end a sequence, as `model.generate` of Transformers would take them."""
    if found.folder is not None and (found.folder / "generation_config.json").is_file():
        chosen = GenerationConfig.from_pretrained(found.folder).eos_token_id
    else:
        chosen = found.config.get_text_config().eos_token_id
    if chosen is None:
        return frozenset()
    return frozenset(chosen) if isinstance(chosen, list) else frozenset([chosen])


def context_tokens(config: PreTrainedConfig) -> int:
    """How many positions the model has; 0 for ALiBi models, which have no bound."""
    text = config.get_text_config()
    if text.model_type in ("bloom", "mpt") or getattr(text, "alibi", False):
        return 0
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        if isinstance(value := getattr(text, name, None), int):
            return value
    return 0


def weights_digest(entries: Mapping[str, TensorEntry]) -> str:
    """A hash of all names, types, shapes and places, and of samples of every file's bytes."""
    digest = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        digest.update(f"{name} {entry.dtype} {list(entry.shape)} {entry.file.name} {entry.offset}\n".encode())
    for file in sorted({entry.file for entry in entries.values()}):
        size = file.stat().st_size
        with file.open("rb") as stream:
            for number in range(SAMPLES_PER_FILE):
                stream.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES_PER_FILE - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _stated_dtype(config: PreTrainedConfig) -> str:
    stated = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return stated if stated in ("bfloat16", "float32") else "bfloat16"


def _digest(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
