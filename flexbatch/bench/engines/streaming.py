"""flexbatch itself: the plan's policy for this machine and limit, then the engine, as the pipeline runs it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from flexbatch.bench.engines.meter import Meter
from flexbatch.bench.trial import Outcome, Prompts, Trial, digest_of, read_prompts
from flexbatch.config import OffloadConfig
from flexbatch.engine.calibration import measure_hardware
from flexbatch.engine.engine import Vocabulary
from flexbatch.engine.model_shapes import spec_from_config
from flexbatch.engine.opening import DTYPES, Checkpoint, EngineOptions, Limits, open_engine
from flexbatch.memory.safetensors_index import SafetensorsIndex
from flexbatch.plan.cost_model import Prediction
from flexbatch.plan.optimizer import choose_policy
from flexbatch.plan.policy import Policy
from flexbatch.plan.workload import Workload
from flexbatch.records import PassResult, Request, Sampling


class NumberDecoder:
    """Stands for a tokenizer: the benchmark's prompts and completions are token ids."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:  # noqa: ARG002 - the protocol
        return " ".join(map(str, token_ids))


@dataclass
class Passes:
    """What the passes of a run add up to: how many there were and how long they took, by what they did."""

    count: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    waits: dict[str, float] = field(default_factory=dict)
    bytes_moved: dict[str, int] = field(default_factory=dict)
    prefill_tokens: int = 0

    def add(self, result: PassResult) -> None:
        kind = "with prefill" if result.prefill_tokens else "decode only"
        self.count[kind] = self.count.get(kind, 0) + 1
        self.seconds[kind] = self.seconds.get(kind, 0.0) + result.seconds
        for cause, seconds in result.waits.items():
            key = f"{cause}, {kind}"
            self.waits[key] = self.waits.get(key, 0.0) + seconds
        for link, nbytes in result.bytes_moved.items():
            self.bytes_moved[link] = self.bytes_moved.get(link, 0) + nbytes
        self.prefill_tokens += result.prefill_tokens


def run(trial: Trial) -> Outcome:
    meter = Meter()
    prompts = read_prompts(Path(trial.prompts), trial.rows)
    offload = OffloadConfig(**trial.options)
    folder, scratch = Path(trial.model), Path(trial.scratch)
    config = AutoConfig.from_pretrained(folder)
    policy, prediction = plan_trial(trial, config, prompts, offload)
    longest = max(prompts.lengths)
    shared = prompts.shared_tokens if policy.prefix_sharing else 0
    engine = open_engine(
        Checkpoint(config, SafetensorsIndex.open(folder).entries, str(folder)),
        policy,
        Limits(disk_folder=scratch),
        Vocabulary(NumberDecoder(), frozenset({int(config.get_text_config().eos_token_id or 0)})),
        EngineOptions(
            span=longest + trial.new_tokens,
            own_span=longest - shared + trial.new_tokens,
            dtype=DTYPES[trial.dtype],
            reader=offload.reader,
        ),
    )
    passes, tokens = Passes(), dict[int, tuple[int, ...]]()
    meter.start()
    try:
        for result in engine.run(requests(prompts, trial.new_tokens)):
            passes.add(result)
            tokens.update((done.index, done.token_ids) for done in result.completions)
        seconds, read_bytes = meter.seconds, meter.read_bytes
    finally:
        engine.close()
    generated = [tokens[row] for row in range(len(prompts.token_ids))]
    return Outcome(
        trial.engine,
        rows=len(generated),
        batch=policy.slots,
        tokens=sum(map(len, generated)),
        seconds=seconds,
        setup_seconds=meter.setup_seconds,
        read_bytes=read_bytes,
        digest=digest_of(generated),
        details={"policy": asdict(policy), "passes": asdict(passes), "predicted": summary(prediction)},
    )


def plan_trial(trial: Trial, config: Any, prompts: Prompts, offload: OffloadConfig) -> tuple[Policy, Prediction]:
    """What the plan chooses for these prompts, on this machine, under the limit that this process is held to."""
    hardware = measure_hardware(torch.device("cpu"), Path(trial.scratch), Path(trial.cache_dir))
    spec = spec_from_config(config, stored_dtype=trial.dtype, compute_dtype=trial.dtype)
    workload = Workload.from_samples(
        len(prompts.token_ids),
        prompts.lengths,
        trial.new_tokens,
        shared_tokens=float(prompts.shared_tokens),
        rows_per_group=float(len(prompts.token_ids)) if prompts.shared_tokens else 1.0,
    )
    return choose_policy(spec, hardware, workload, offload)


def requests(prompts: Prompts, new_tokens: int) -> Iterator[Request]:
    """The prompts in windows sorted by length, as the pipeline's batcher orders them."""
    sampling = Sampling(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    for row in _longest_first(prompts.lengths):
        yield Request(row, prompts.token_ids[row], sampling, shared_tokens=prompts.shared_tokens)


def _longest_first(lengths: Iterable[int]) -> list[int]:
    return [row for row, _ in sorted(enumerate(lengths), key=lambda pair: -pair[1])]


def summary(prediction: Prediction) -> dict[str, Any]:
    return {
        "seconds": prediction.seconds,
        "passes": prediction.passes,
        "binding": prediction.binding.value,
        "peak": {tier.value: nbytes for tier, nbytes in prediction.peak.items()},
        "needs": {f"{need.what} ({need.tier.value})": need.nbytes for need in prediction.needs},
        "terms": {name: term.seconds for name, term in prediction.terms.items()},
        "planned_at": time.time(),
    }
