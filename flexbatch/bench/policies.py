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
"""Runs of the automatic policy and of the best of the others, in turn: the best time of many is lucky, and a machine is
not the same for an hour."""


@dataclass(frozen=True)
class PolicyRun:
    """One policy: its `offload` options (none for the automatic one), seconds predicted and measured."""

    options: Mapping[str, Any]
    predicted: float
    outcome: Outcome


@dataclass(frozen=True)
class PolicyGrid:
    """`hand_made` is one run of each policy; `best` are further runs of the fastest of them, `automatic` runs of the
    automatic policy beside those."""

    hand_made: tuple[PolicyRun, ...]
    best: tuple[PolicyRun, ...]
    automatic: tuple[PolicyRun, ...]

    @property
    def reached(self) -> float:
        """The automatic policy's throughput as a part of the best hand-made one's, medians of runs in turn."""
        own, best = (median(run.outcome.rate for run in runs) for runs in (self.automatic, self.best))
        return own / best

    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"reached": self.reached}


def measure_policies(trial: Trial, count: int, run: Callable[[Trial], Outcome]) -> PolicyGrid:
    """Runs the trial under `count` hand-made policies (or as many as fit), then under the fastest of them and the
    automatic one in turn."""
    listed = run(dataclasses.replace(trial, engine="policies"))
    if listed.error:
        raise EngineError(f"The hand-made policies could not be listed: {listed.error}")
    hand_made = [_measured(trial, options, run) for options in spread(listed.details["policies"], count)]
    fastest = max(hand_made, key=lambda made: made.outcome.rate, default=None)
    if fastest is None or fastest.outcome.error:
        raise EngineError(f"No hand-made policy ran: {fastest.outcome.error if fastest else 'none fits the limit'}.")
    turns = [(_measured(trial, {}, run), _measured(trial, fastest.options, run)) for _ in range(TURNS)]
    return PolicyGrid(tuple(hand_made), tuple(best for _, best in turns), tuple(own for own, _ in turns))


def spread(policies: Sequence[Any], count: int) -> list[Any]:
    """`count` of them at even distances, the first and the last among them; all if there are no more."""
    if len(policies) <= count:
        return list(policies)
    return [policies[round(number * (len(policies) - 1) / max(1, count - 1))] for number in range(count)]


def _measured(trial: Trial, options: Mapping[str, Any], run: Callable[[Trial], Outcome]) -> PolicyRun:
    offload = {**trial.options["offload"], **options}
    outcome = run(dataclasses.replace(trial, engine=OWN, options={**trial.options, "offload": offload}))
    return PolicyRun(options, outcome.details["predicted"]["seconds"] if not outcome.error else 0.0, outcome)
