"""HELM's statistics: sums over instances for each split, means over trials, and what is derived from them.

The records of `stats.json` and `per_instance_stats.json` (HELM 0.5.16, `benchmark/metrics/statistic.py` and
`metric.py`). A statistic is known by name, split and perturbation; flexbatch perturbs nothing, but HELM's web page
expects the "worst case" entries, which then repeat the plain ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexbatch.evaluation.scenarios import Scenario
from flexbatch.evaluation.scoring import InstanceScore, request_statistics
from flexbatch.evaluation.summary import calibration_statistics, perplexity_statistics

WORST_CASES = ("robustness", "fairness")
Key = tuple[str, str, str]  # name, split, perturbation


@dataclass
class Statistic:
    """Values of one name, added one by one."""

    values: list[float] = field(default_factory=list)

    def as_json(self, key: Key) -> dict[str, Any]:
        name, split, perturbation = key
        identity: dict[str, Any] = {"name": name, "split": split}
        if perturbation:
            flags = {worst: worst == perturbation for worst in WORST_CASES}
            identity["perturbation"] = {"name": perturbation, **flags, "computed_on": "worst"}
        count, total = len(self.values), sum(self.values)
        squared = sum(value * value for value in self.values)
        mean = total / count
        variance = max(0.0, squared / count - mean**2)
        return {
            "name": identity,
            "count": count,
            "sum": total,
            "sum_squared": squared,
            "min": min(self.values),
            "max": max(self.values),
            "mean": mean,
            "variance": variance,
            "stddev": math.sqrt(variance),
        }


Statistics = dict[Key, Statistic]


def instance_statistics(scenario: Scenario, score: InstanceScore) -> Statistics:
    """Of one trial and instance: a value for each request where the requests are described, else one value."""
    found: Statistics = {}
    for request in request_statistics(scenario.spec, score.answers):
        for name, value in request.items():
            found.setdefault((name, score.split, ""), Statistic()).values.append(value)
    described = {name for name, _, _ in found}
    for name, value in score.statistics.items():
        if name not in described and math.isfinite(value):
            found[name, score.split, ""] = Statistic([value])
    return found


def run_statistics(scenario: Scenario, scores: Sequence[InstanceScore]) -> Statistics:
    """Of the whole run: for each trial over its instances, then one value for each trial."""
    merged: Statistics = {}
    for trial in sorted({score.trial for score in scores}):
        chosen = [score for score in scores if score.trial == trial]
        for key, statistic in _trial_statistics(scenario, chosen).items():
            merged.setdefault(key, Statistic()).values.append(sum(statistic.values) / len(statistic.values))
    return merged


def _trial_statistics(scenario: Scenario, scores: Sequence[InstanceScore]) -> Statistics:
    found: Statistics = {}
    for score in scores:
        for key, statistic in instance_statistics(scenario, score).items():
            _extend(found, key, statistic.values)
            for worst in WORST_CASES:
                _extend(found, (key[0], key[1], worst), [min(statistic.values)])
    for split in dict.fromkeys(score.split for score in scores):
        chosen = [score for score in scores if score.split == split]
        derived = {"num_instances": float(len(chosen))}
        if not scenario.spec.scores_references:  # HELM derives nothing from scored references
            derived |= {**perplexity_statistics(chosen), **calibration_statistics(chosen)}
        for name, value in derived.items():
            _extend(found, (name, split, ""), [value])
    return found


def _extend(found: Statistics, key: Key, values: Iterable[float]) -> None:
    found.setdefault(key, Statistic()).values.extend(values)


def as_json(statistics: Statistics) -> list[dict[str, Any]]:
    return [statistic.as_json(key) for key, statistic in statistics.items()]
