"""Predicts a run: seconds of a pass as the largest of what each resource must do in it, seconds of a job as the sum
over its passes, peak bytes of each tier. Every term has a name and a unit.

After FlexGen (arXiv 2303.06865, section 4.3), for a different schedule: see docs/cost_model.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.memory_need import logits_of_guesses, needs
from flexbatch.plan.model_spec import ModelSpec
from flexbatch.plan.need import Need, peak_bytes
from flexbatch.plan.policy import Policy, Tier
from flexbatch.plan.rows_in_flight import GuessRoom, guessed_tokens, usual_rows
from flexbatch.plan.terms import Resource, Term, by_resource, first_terms, pass_seconds, pass_terms
from flexbatch.plan.workload import Schedule, Workload, schedule


@dataclass(frozen=True)
class Prediction:
    """What a run will take. Seconds and bytes are for the whole job; `terms` are summed over its passes.

    `seconds` = sum over passes of the busiest resource; `tokens_per_second` counts generated tokens;
    `row_seconds` is how long one row is in flight. `binding` is the resource that limits most of the passes' time.
    `prefill_seconds` and `decode_seconds` split `seconds` by the arithmetic that each causes. `ramp_seconds` pass until
    the slots are full. In `joining_passes`, which take `joining_seconds`, `prompt_tokens` go through the model.
    """

    policy: Policy
    seconds: float
    passes: float
    generated_tokens: float
    prefill_seconds: float
    decode_seconds: float
    ramp_seconds: float
    joining_seconds: float
    joining_passes: float
    prompt_tokens: float
    row_seconds: float
    binding: Resource
    terms: Mapping[str, Term]
    resource_seconds: Mapping[Resource, float]
    needs: tuple[Need, ...]
    peak: Mapping[Tier, int]

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.seconds

    @property
    def token_seconds(self) -> float:
        """Of arithmetic that one more token in a pass takes: its products with matrices."""
        matrices = self.terms.get("prefill matrices")
        return matrices.seconds / self.prompt_tokens if matrices and self.prompt_tokens else 0.0

    @property
    def pass_seconds(self) -> float:
        return self.seconds / max(1.0, self.passes)


def predict(spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy) -> Prediction:
    """The whole job under `policy`. Pure; says nothing about limits (the optimiser compares `peak` with them)."""
    shown = workload.as_run(policy.prefix_sharing)
    plan = schedule(shown, usual_rows(shown, policy), policy.prefill_tokens, policy.shortest_part)
    totals = _Totals()
    for load, count in plan.loads.items():
        seconds = totals.add(pass_terms(spec, hardware, shown, policy, load), count, plan.ramp.get(load, 0))
        if load.joining:
            tokens = load.joining * shown.own_tokens + load.groups * shown.shared_tokens
            totals.join(seconds, count, count * tokens)
    items = needs(spec, hardware, workload, policy)
    totals.join(totals.add(list(first_terms(hardware, items)), 1, 1), 0, 0)
    return totals.prediction(plan, shown, policy, items)


def guess_room(spec: ModelSpec, workload: Workload, prediction: Prediction) -> GuessRoom:
    """What the plan has room for in a pass, of guesses."""
    policy = prediction.policy
    return GuessRoom(
        guessed_tokens(spec, workload, policy), logits_of_guesses(spec, workload, policy), prediction.token_seconds
    )


class _Totals:
    """Adds up the passes of a schedule."""

    def __init__(self) -> None:
        self.seconds = self.ramp_seconds = 0.0
        self.joining_seconds = self.joining_passes = self.prompt_tokens = 0.0
        self.bound, self.busy = dict.fromkeys(Resource, 0.0), dict.fromkeys(Resource, 0.0)
        self.terms: dict[str, Term] = {}

    def add(self, terms: list[Term], count: float, ramp: float) -> float:
        """`count` passes of these terms, `ramp` of them while the slots fill. Gives their seconds."""
        resources = by_resource(terms)
        longest = pass_seconds(resources)
        self.seconds += longest * count
        self.ramp_seconds += longest * ramp
        self.bound[max(resources, key=lambda resource: resources[resource])] += longest * count
        for resource, seconds in resources.items():
            self.busy[resource] += seconds * count
        for term in terms:
            before = self.terms.get(term.what)
            seconds = term.seconds * count + (before.seconds if before else 0.0)
            amount = term.amount * count + (before.amount if before else 0.0)
            self.terms[term.what] = replace(term, seconds=seconds, amount=amount)
        return longest * count

    def join(self, seconds: float, passes: float, prompt_tokens: float) -> None:
        """Of what was added, so much is prompts' entering."""
        self.joining_seconds += seconds
        self.joining_passes += passes
        self.prompt_tokens += prompt_tokens

    def prediction(self, plan: Schedule, workload: Workload, policy: Policy, items: tuple[Need, ...]) -> Prediction:
        prefill = sum(term.seconds for what, term in self.terms.items() if what.startswith("prefill"))
        share = prefill / max(self.busy[Resource.COMPUTE], 1e-12)
        return Prediction(
            policy=policy,
            seconds=self.seconds,
            passes=plan.passes,
            generated_tokens=workload.generated_tokens,
            prefill_seconds=self.seconds * share,
            decode_seconds=self.seconds * (1.0 - share),
            ramp_seconds=self.ramp_seconds,
            joining_seconds=self.joining_seconds,
            joining_passes=self.joining_passes,
            prompt_tokens=self.prompt_tokens,
            row_seconds=workload.new_tokens * self.seconds / max(1.0, plan.passes),
            binding=max(self.bound, key=lambda resource: self.bound[resource]),
            terms=self.terms,
            resource_seconds=self.busy,
            needs=items,
            peak=peak_bytes(items),
        )
