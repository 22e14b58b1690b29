"""A trial as a job of flexbatch's own: the same configuration, model and work that the pipeline's steps take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from flexbatch.bench.trial import Prompts, Trial, read_prompts
from flexbatch.checkpoint.resolve import resolve_model
from flexbatch.config import Config, HardwareConfig, ModelConfig, OffloadConfig
from flexbatch.engine.opening import DTYPES
from flexbatch.records import Prompt, Request, Row, Sampling
from flexbatch.stages.model import Model, context_tokens, end_tokens
from flexbatch.stages.work import Work


class NumberDecoder:
    """Stands for a tokenizer: the benchmark's prompts and completions are token ids."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:  # noqa: ARG002 - the protocol
        return " ".join(map(str, token_ids))


def trial_config(trial: Trial) -> Config:
    """The options that matter here: the model, the user's `offload.*` and `hardware.*`."""
    return Config(
        model=ModelConfig(name=Path(trial.model).name, path=trial.model, dtype=trial.dtype, cache_dir=trial.cache_dir),
        offload=OffloadConfig(**trial.options["offload"]),
        hardware=HardwareConfig(**trial.options["hardware"]),
    )


def trial_model(config: Config) -> Model:
    found = resolve_model(config.model)
    ends, context = end_tokens(found), context_tokens(found.config)
    return Model(found, NumberDecoder(), DTYPES[config.model.dtype], torch.device("cpu"), ends, context)


def trial_work(trial: Trial, config: Config) -> Work:
    """The trial's prompts, in windows sorted by length as in any job."""
    prompts = read_prompts(Path(trial.prompts), trial.rows)
    return Work(
        prompts=lambda: _prompts(prompts, trial.new_tokens),
        total=len(prompts.token_ids),
        longest_prompt=max(prompts.lengths),
        longest_new=trial.new_tokens,
        carried={},
        identity={},
        window=config.prompt.window,
        part_rows=config.output.part_rows,
    )


def trial_requests(work: Work) -> Iterator[tuple[int, Request]]:
    """The row's number in the prompts, and the request for it."""
    for item in work.placed():
        prompt = item.prompt
        yield (
            prompt.row.row,
            Request(item.index, prompt.token_ids, prompt.sampling, shared_tokens=prompt.shared_tokens),
        )


def _prompts(prompts: Prompts, new_tokens: int) -> Iterator[Prompt]:
    sampling = Sampling(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    for number, token_ids in enumerate(prompts.token_ids):
        yield Prompt(Row(str(number), "", number, {}), token_ids, sampling, shared_tokens=prompts.shared_tokens)
