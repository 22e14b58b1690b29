"""Scores of a run: means with bootstrap confidence intervals, and what is derived from all instances at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexbatch.evaluation.calibration import calibration_metrics
from flexbatch.evaluation.scenarios import Scenario
from flexbatch.evaluation.scoring import InstanceScore

CONFIDENCE = 0.95
RESAMPLES = 1000
SEED = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over instances with the ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class TableRow:
    """One line of the printed table."""

    scenario: str
    metric: str
    estimate: Estimate
    main: bool


@dataclass(frozen=True)
class ScenarioScores:
    """`estimates` by metric; `derived` has perplexity and calibration; `errors` counts requests that failed."""

    scenario: str
    main_metric: str
    instances: int
    trials: int
    requests: int
    errors: int
    truncated: int
    estimates: dict[str, Estimate]
    derived: dict[str, float]


@dataclass(frozen=True)
class Scores:
    scenarios: tuple[ScenarioScores, ...]

    def table(self) -> list[TableRow]:
        """The main metric of each scenario first, then its others."""
        rows = []
        for scores in self.scenarios:
            names = sorted(scores.estimates, key=lambda name: name != scores.main_metric)
            rows += [
                TableRow(scores.scenario, name, scores.estimates[name], name == scores.main_metric) for name in names
            ]
        return rows

    def metrics(self) -> dict[str, Any]:
        """The content of `metrics.json`; every number is finite."""
        return {"scenarios": {scores.scenario: _as_json(scores) for scores in self.scenarios}}


def _as_json(scores: ScenarioScores) -> dict[str, Any]:
    return {
        "main_metric": scores.main_metric,
        "main_score": scores.estimates[scores.main_metric].mean if scores.main_metric in scores.estimates else None,
        "instances": scores.instances,
        "trials": scores.trials,
        "requests": scores.requests,
        "errors": scores.errors,
        "truncated": scores.truncated,
        "metrics": {
            name: {"mean": value.mean, "low": value.low, "high": value.high, "count": value.count}
            for name, value in scores.estimates.items()
        },
        "derived": {name: value for name, value in scores.derived.items() if math.isfinite(value)},
    }


def summarize(scored: Sequence[tuple[Scenario, Sequence[InstanceScore]]]) -> Scores:
    return Scores(tuple(_scenario_scores(scenario, scores) for scenario, scores in scored if scores))


def _scenario_scores(scenario: Scenario, scores: Sequence[InstanceScore]) -> ScenarioScores:
    names = dict.fromkeys(name for score in scores for name in score.statistics)
    judged = [name for name in names if _is_reported(name, scenario)]
    answers = [answer for score in scores for answer in score.answers]
    return ScenarioScores(
        scenario=scenario.name,
        main_metric=scenario.main_metric,
        instances=len({score.instance for score in scores}),
        trials=len({score.trial for score in scores}),
        requests=len(answers),
        errors=sum(bool(answer.error) for answer in answers),
        truncated=sum(answer.truncated for answer in answers),
        estimates={name: estimate_mean(_by_instance(scores, name)) for name in judged},
        derived=_mean_over_trials(scores),
    )


def _is_reported(name: str, scenario: Scenario) -> bool:
    """HELM's files also have `@k` where there is one completion (multiple choice); that says nothing new."""
    base, _, best_of = name.partition("@")
    return name in scenario.metrics or (base in scenario.metrics and (not best_of or scenario.spec.completions > 1))


def _by_instance(scores: Sequence[InstanceScore], name: str) -> NDArray[np.float64]:
    """One value for each instance, its mean over the trials: instances are what is resampled."""
    values: dict[str, list[float]] = {}
    for score in scores:
        if name in score.statistics:  # a text of which a window failed has no score
            values.setdefault(score.instance, []).append(score.statistics[name])
    return np.array([np.mean(value) for value in values.values()], dtype=np.float64)


def estimate_mean(values: NDArray[np.float64]) -> Estimate:
    """Mean of `values` float64 (n,) and its percentile bootstrap interval (Efron, 1979), with a fixed seed."""
    mean = float(values.mean())
    if values.min() == values.max():
        return Estimate(mean, mean, mean, len(values))
    from scipy.stats import bootstrap  # slow to import, so only once there is something to score

    result = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    return Estimate(mean, float(result.confidence_interval.low), float(result.confidence_interval.high), len(values))


def _mean_over_trials(scores: Sequence[InstanceScore]) -> dict[str, float]:
    """HELM derives statistics for each trial and then takes their mean."""
    trials = sorted({score.trial for score in scores})
    derived = [derived_statistics([score for score in scores if score.trial == trial]) for trial in trials]
    names = dict.fromkeys(name for statistics in derived for name in statistics)
    return {name: float(np.mean([statistics[name] for statistics in derived if name in statistics])) for name in names}


def derived_statistics(scores: Sequence[InstanceScore]) -> dict[str, float]:
    """Perplexity of what was generated, and calibration where answers are right or wrong; of one trial."""
    return {**perplexity_statistics(scores), **calibration_statistics(scores)}


def perplexity_statistics(scores: Sequence[InstanceScore]) -> dict[str, float]:
    """Over all completions together: e to the mean negative log-probability of a token, and bits for each byte."""
    written = [score.statistics for score in scores if math.isfinite(score.statistics.get("logprob", math.nan))]
    logprob = sum(statistics["logprob"] for statistics in written)
    tokens = sum(statistics["num_perplexity_tokens"] for statistics in written)
    size = sum(statistics["num_bytes"] for statistics in written)
    derived = {"perplexity": math.exp(min(700.0, -logprob / tokens))} if tokens else {}
    if size:
        derived |= {"bits_per_byte": -logprob / size / math.log(2), "logprob_per_byte": logprob / size}
    return derived


def calibration_statistics(scores: Sequence[InstanceScore]) -> dict[str, float]:
    """Empty where there is no `exact_match`, or where the model gave no probabilities at all."""
    judged = [score.statistics for score in scores if "exact_match" in score.statistics]
    if not judged or not any(answer.logprobs for score in scores for answer in score.answers):
        return {}
    confidence = np.array([statistics["max_prob"] for statistics in judged], dtype=np.float64)
    correct = np.array([int(statistics["exact_match"]) for statistics in judged], dtype=np.int64)
    return calibration_metrics(confidence, correct)
