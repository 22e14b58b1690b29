"""The automatic policy beside hand-made ones: how near it comes to the best that could have been found by trying."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from flexbatch.bench.comparison import OWN
from flexbatch.bench.trial import Outcome, Trial
from flexbatch.errors import EngineError

TURNS = 3
"""Runs of the automatic policy: before, amid and after the others, because a machine is not the same for an hour."""


@dataclass(frozen=True)
class PolicyRun:
    """One policy: its `offload` options (none for the automatic one), seconds predicted and measured."""

    options: Mapping[str, Any]
    predicted: float
    outcome: Outcome


@dataclass(frozen=True)
class PolicyGrid:
    """`automatic` are the runs of the automatic policy, `hand_made` one run of each other."""

    automatic: tuple[PolicyRun, ...]
    hand_made: tuple[PolicyRun, ...]

    @property
    def best(self) -> PolicyRun:
        """The hand-made policy with the highest throughput."""
        return max(self.hand_made, key=lambda run: run.outcome.rate)

    @property
    def reached(self) -> float:
        """The automatic policy's throughput (the median of its runs) as a part of the best hand-made one's."""
        return median(run.outcome.rate for run in self.automatic) / self.best.outcome.rate

    def record(self) -> dict[str, Any]:
        return {
            "automatic": [dataclasses.asdict(run) for run in self.automatic],
            "hand_made": [dataclasses.asdict(run) for run in self.hand_made],
            "reached": self.reached,
        }


def measure_policies(trial: Trial, count: int, run: Callable[[Trial], Outcome]) -> PolicyGrid:
    """Runs the trial under the automatic policy and under `count` hand-made ones, or as many as fit."""
    listed = run(dataclasses.replace(trial, engine="policies"))
    if listed.error:
        raise EngineError(f"The hand-made policies could not be listed: {listed.error}")
    chosen = spread(listed.details["policies"], count)
    automatic, hand_made = [_measured(trial, {}, run)], []
    for number, policy in enumerate(chosen, start=1):
        hand_made.append(_measured(trial, policy, run))
        if number * (TURNS - 1) % len(chosen) < TURNS - 1:
            automatic.append(_measured(trial, {}, run))
    return PolicyGrid(tuple(automatic), tuple(hand_made))


def spread(policies: Sequence[Any], count: int) -> list[Any]:
    """`count` of them at even distances, the first and the last among them; all if there are no more."""
    if len(policies) <= count:
        return list(policies)
    return [policies[round(number * (len(policies) - 1) / max(1, count - 1))] for number in range(count)]


def _measured(trial: Trial, options: Mapping[str, Any], run: Callable[[Trial], Outcome]) -> PolicyRun:
    offload = {**trial.options["offload"], **options}
    outcome = run(dataclasses.replace(trial, engine=OWN, options={**trial.options, "offload": offload}))
    return PolicyRun(options, outcome.details["predicted"]["seconds"] if not outcome.error else 0.0, outcome)
