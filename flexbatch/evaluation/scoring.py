"""From output rows to the statistics of each instance, as HELM's basic metrics define them.

A statistic is one number for each trial and instance; where an instance takes several requests (a reference each)
the request statistics are their mean. Rows that ended in an error count as empty answers, never as missing ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexbatch.errors import DataError
from flexbatch.evaluation.adapter import (
    CALIBRATED,
    CALIBRATION,
    JOINT,
    LANGUAGE_MODELING,
    ORIGINAL,
    AdapterSpec,
    letter_answers,
)
from flexbatch.evaluation.answers import Answer, read_answer
from flexbatch.evaluation.fitting import Tokenizer
from flexbatch.evaluation.metrics import TextMetric
from flexbatch.evaluation.scenarios import BITS_PER_BYTE, Scenario

OutputRow = Mapping[str, Any]
FINISH_REASONS = ("length", "stop", "endoftext", "unknown")


@dataclass(frozen=True, slots=True)
class InstanceScore:
    """`statistics` by HELM's names; `prediction` is what was compared; `answers` are all of the instance's requests."""

    trial: int
    instance: str
    split: str
    statistics: Mapping[str, float]
    prediction: str
    answers: tuple[Answer, ...]


def score_scenario(
    scenario: Scenario, rows: Sequence[OutputRow], metrics: Mapping[str, TextMetric], tokenizer: Tokenizer
) -> list[InstanceScore]:
    """One score for each (trial, instance), in the order of the rows."""
    groups: dict[tuple[int, str], list[Answer]] = {}
    for row in rows:
        groups.setdefault((int(row["trial"]), str(row["instance"])), []).append(
            read_answer(row, tokenizer, generated=scenario.spec.generates)
        )
    return [_score_instance(scenario, answers, metrics) for answers in groups.values()]


def _score_instance(scenario: Scenario, answers: list[Answer], metrics: Mapping[str, TextMetric]) -> InstanceScore:
    first, spec = answers[0], scenario.spec
    expected = _expected_requests(spec, len(first.references))
    if spec.method != LANGUAGE_MODELING and len(answers) != expected:
        raise DataError(
            f"{scenario.name}: instance {first.instance} in trial {first.trial} has {len(answers)} of {expected} rows",
            remedy="The output is not complete: run the job again with the same command to finish it.",
        )
    if spec.method == LANGUAGE_MODELING:
        prediction, judged = "", _measure_text(answers)
    elif spec.scores_references:
        prediction, judged = _rank_references(spec, answers)
    else:
        answers = sorted(answers, key=lambda answer: -answer.logprob)
        prediction, judged = _judge_texts(scenario, answers, metrics)
    statistics = {**_request_means(spec, answers), **judged}
    return InstanceScore(first.trial, first.instance, first.split, statistics, prediction, tuple(answers))


def _expected_requests(spec: AdapterSpec, references: int) -> int:
    if not spec.scores_references:
        return spec.completions
    return references * (2 if spec.method == CALIBRATED else 1)


def _judge_texts(
    scenario: Scenario, answers: Sequence[Answer], metrics: Mapping[str, TextMetric]
) -> tuple[str, dict[str, float]]:
    """Best score over the correct references: of the likeliest completion, and with `@k` of the k likeliest."""
    first, spec = answers[0], scenario.spec
    gold = [text for text, correct in zip(first.references, first.correct, strict=True) if correct]
    predictions = [answer.text.strip() for answer in answers]
    if spec.method == JOINT:
        meant = letter_answers(spec, first.references)
        predictions = [meant.get(_mapped(spec, prediction), "") for prediction in predictions]
    judged = {"max_prob": first.probability}
    for name in scenario.metrics:
        base, _, best_of = name.partition("@")
        judged[name] = _best(metrics[base], gold, predictions[: int(best_of or 1)])
        if not best_of and spec.num_outputs > 1:
            judged.setdefault(f"{base}@{spec.num_outputs}", _best(metrics[base], gold, predictions))
    told = _first_completion(answers)  # HELM's language-modelling statistics are not those of the likeliest one
    judged |= {"logprob": told.logprob, "num_perplexity_tokens": told.tokens, "num_bytes": told.bytes}
    return predictions[0], judged


def _measure_text(answers: Sequence[Answer]) -> dict[str, float]:
    """All windows of one text together. A window that failed would make the text look likelier: then nothing counts."""
    size = len(answers[0].input.encode())
    logprob = sum(answer.logprob for answer in answers)
    if not math.isfinite(logprob) or not size:
        return {"logprob": -math.inf, "num_perplexity_tokens": 0, "num_bytes": 0}
    tokens = sum(answer.tokens for answer in answers)
    bits = -logprob / size / math.log(2)
    return {"logprob": logprob, "num_perplexity_tokens": tokens, "num_bytes": size, BITS_PER_BYTE: bits}


def _best(metric: TextMetric, gold: Sequence[str], predictions: Sequence[str]) -> float:
    return max(metric(reference, prediction) for reference in gold for prediction in predictions)


def _mapped(spec: AdapterSpec, prediction: str) -> str:
    """What the pattern finds in the completion: its first group, or all of it."""
    if not spec.output_mapping_pattern:
        return prediction
    match = re.search(spec.output_mapping_pattern, prediction)
    return "" if match is None else match.group(1 if match.groups() else 0)


def _rank_references(spec: AdapterSpec, answers: Sequence[Answer]) -> tuple[str, dict[str, float]]:
    """The reference with the highest score; where several tie, `exact_match` is the share of them that is right.

    `original`: log-probability per token. `calibrated`: log-probability minus that of the reference without question.
    A reference whose row failed cannot be chosen.
    """
    by_request = {(answer.reference_index, answer.mode): answer for answer in answers}
    first = answers[0]
    scores = np.array([_reference_score(spec, by_request, index) for index in range(len(first.references))])
    if not np.isfinite(scores).any():
        return "", {"max_prob": 0.0, "exact_match": 0.0, "predicted_index": -1.0}
    chosen = np.flatnonzero(scores >= scores.max())
    right = sum(first.correct[index] for index in chosen)
    weights = np.exp(scores - scores.max())
    judged = {
        "max_prob": float((weights / weights.sum()).max()),
        "exact_match": right / len(chosen),
        "predicted_index": float(chosen[0]),
    }
    return first.references[chosen[0]], judged


def _reference_score(spec: AdapterSpec, by_request: Mapping[tuple[int, str], Answer], index: int) -> float:
    original = by_request[index, ORIGINAL]
    if not original.tokens:
        return -math.inf
    if spec.method == CALIBRATED:
        calibration = by_request[index, CALIBRATION]
        return original.logprob - calibration.logprob if calibration.tokens else -math.inf
    return original.logprob / original.tokens


def request_statistics(spec: AdapterSpec, answers: Sequence[Answer]) -> list[dict[str, float]]:
    """What HELM notes of each request: the first completion speaks for all of them, references for themselves."""
    if not spec.generates:
        return [_described(spec, answer, answer.tokens, 0) for answer in answers]
    written = sum(answer.tokens for answer in answers)
    return [_described(spec, _first_completion(answers), written, written)]


def _first_completion(answers: Sequence[Answer]) -> Answer:
    return min(answers, key=lambda answer: answer.completion_index)


def _described(spec: AdapterSpec, answer: Answer, completion_tokens: int, output_tokens: int) -> dict[str, float]:
    return {
        "num_references": len(answer.references),
        "num_train_trials": spec.num_train_trials,
        "num_prompt_tokens": answer.prompt_tokens,
        "num_completion_tokens": completion_tokens,
        "num_output_tokens": output_tokens,
        **{f"finish_reason_{reason}": int(answer.finish == reason) for reason in FINISH_REASONS},
        "num_train_instances": answer.shots,
        "prompt_truncated": int(answer.truncated),
    }


def _request_means(spec: AdapterSpec, answers: Sequence[Answer]) -> dict[str, float]:
    requests = request_statistics(spec, answers)
    return {name: sum(request[name] for request in requests) / len(requests) for name in requests[0]}
