"""flexbatch itself: its own plan for this machine and limit, then its engine, by the pipeline's own steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexbatch.bench.engines.meter import Meter
from flexbatch.bench.engines.own_job import trial_config, trial_model, trial_requests, trial_work
from flexbatch.bench.trial import Outcome, Trial, digest_of
from flexbatch.plan.cost_model import Prediction
from flexbatch.records import PassResult
from flexbatch.stages.opening import open_for
from flexbatch.stages.planning import plan_run


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
    config = trial_config(trial)
    model, work = trial_model(config), trial_work(trial, config)
    plan = plan_run(config, model, work)
    ordered = list(trial_requests(work))
    engine = open_for(config, model, work, plan, Path(trial.scratch))
    passes, tokens = Passes(), dict[int, tuple[int, ...]]()
    meter.start()
    try:
        for result in engine.run(request for _, request in ordered):
            passes.add(result)
            tokens.update((done.index, done.token_ids) for done in result.completions)
        seconds, read_bytes, processor = meter.seconds, meter.read_bytes, meter.processor_seconds
    finally:
        engine.close()
    generated = [tokens[request.index] for _, request in sorted(ordered, key=lambda pair: pair[0])]
    policy = plan.prediction.policy
    return Outcome(
        trial.engine,
        rows=len(generated),
        batch=policy.slots,
        tokens=sum(map(len, generated)),
        seconds=seconds,
        setup_seconds=meter.setup_seconds,
        read_bytes=read_bytes,
        processor_seconds=processor,
        digest=digest_of(generated),
        details={"policy": asdict(policy), "passes": asdict(passes), "predicted": predicted(plan.prediction)},
    )


def predicted(prediction: Prediction) -> dict[str, Any]:
    """What the plan said beforehand: seconds, passes, bytes at the peak, seconds of each kind of work."""
    return {
        "seconds": prediction.seconds,
        "passes": prediction.passes,
        "binding": prediction.binding.value,
        "peak": {tier.value: nbytes for tier, nbytes in prediction.peak.items()},
        "needs": {f"{need.what} ({need.tier.value})": need.nbytes for need in prediction.needs},
        "terms": {name: term.seconds for name, term in prediction.terms.items()},
    }
