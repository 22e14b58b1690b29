"""Scores follow from the output's rows alone, by HELM's definitions."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.config import JobConfig
from flexbatch.errors import DataError
from flexbatch.evaluation import COLUMNS, Evaluation, Limits, build_evaluation
from flexbatch.evaluation.summary import Scores, estimate_mean
from flexbatch.records import Prompt
from tests.evaluation.space_tokenizer import SpaceTokenizer

DATA: dict[str, Any] = {"kind": "synthetic_reasoning", "mode": "induction", "train": 4, "valid": 0, "test": 6}
QUESTIONS = {"kind": "mmlu", "path": str(Path(__file__).parent / "golden" / "mmlu"), "subject": "invented"}
TOKENIZER = SpaceTokenizer(special=True)


def evaluation(trials: int = 1, **options: Any) -> Evaluation:
    return build_evaluation(JobConfig(trials=trials, scenarios={"mine": {"data": DATA, **options}}))


def prompts(ready: Evaluation) -> list[Prompt]:
    return list(ready.prompts(TOKENIZER, Limits()))


def row(prompt: Prompt, text: str, logprob: float = -0.1, ending: str = "\n more", **changes: Any) -> dict[str, Any]:
    """An output row as the writer stores it: each token has the log-probability `logprob`, those of the end too."""
    ids = TOKENIZER([text + ending], add_special_tokens=False)["input_ids"][0]
    return {
        **prompt.carried,
        "id": prompt.row.id,
        "shard": prompt.row.shard,
        "row": prompt.row.row,
        "prompt_tokens": len(prompt.token_ids),
        "completion": text,
        "completion_ids": ids,
        "finish_reason": "stop" if ending else "length",
        "error": "",
        "logprobs": [logprob] * len(ids),
    } | changes


def scored_row(prompt: Prompt, logprob: float) -> dict[str, Any]:
    """A row that scored its reference: the sum of log-probabilities is `logprob`."""
    tokens = prompt.score_tokens
    values = {"completion_ids": list(prompt.token_ids[-tokens:]), "logprobs": [logprob / tokens] * tokens}
    return row(prompt, "", ending="") | values


def right(prompt: Prompt) -> str:
    references, correct = prompt.carried["references"], prompt.carried["correct"]
    return str(references[correct.index(True)])


def mean(scores: Scores, metric: str) -> float:
    return scores.scenarios[0].estimates[metric].mean


def test_generation_is_scored_on_stripped_text() -> None:
    ready = evaluation(metrics=["exact_match", "f1_score"])
    made = prompts(ready)
    rows = [row(prompt, f" {right(prompt)} " if place < 4 else " wrong") for place, prompt in enumerate(made)]
    scores = ready.score(rows, TOKENIZER)
    assert mean(scores, "exact_match") == 4 / 6
    assert scores.scenarios[0].instances == 6


def test_order_of_rows_does_not_matter() -> None:
    ready = evaluation(trials=2)
    rows = [row(prompt, random.Random(prompt.row.id).choice([right(prompt), "no"])) for prompt in prompts(ready)]
    expected = ready.score(rows, TOKENIZER)
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert ready.score(rows, TOKENIZER) == expected


def test_an_instance_whose_row_failed_counts_as_wrong_and_is_reported() -> None:
    ready = evaluation(metrics=["exact_match", "prefix_exact_match", "rouge_l"])
    made = prompts(ready)
    failed = {"completion": "", "completion_ids": [], "logprobs": [], "finish_reason": "error", "error": "out of luck"}
    rows = [row(made[0], "") | failed, *(row(prompt, right(prompt)) for prompt in made[1:])]
    scores = ready.score(rows, TOKENIZER)
    assert mean(scores, "exact_match") == mean(scores, "rouge_l") == 5 / 6
    assert scores.scenarios[0].errors == 1
    json.dumps(scores.metrics(), allow_nan=False)


def test_null_columns_are_read_as_empty() -> None:
    ready = evaluation()
    empty = {"completion": None, "completion_ids": None, "logprobs": None, "finish_reason": "error", "error": "x"}
    rows = [row(prompt, "") | empty for prompt in prompts(ready)]
    assert mean(ready.score(rows, TOKENIZER), "exact_match") == 0


def test_a_letter_stands_for_its_reference() -> None:
    ready = evaluation(data=QUESTIONS, adapter={"method": "multiple_choice_joint", "max_tokens": 1})
    made = prompts(ready)
    letters = ["ABCD"[prompt.carried["correct"].index(True)] for prompt in made]
    assert (
        mean(ready.score([row(p, f" {x}") for p, x in zip(made, letters, strict=True)], TOKENIZER), "exact_match") == 1
    )
    assert mean(ready.score([row(p, " M") for p in made], TOKENIZER), "exact_match") == 0
    assert mean(ready.score([row(p, right(p)) for p in made], TOKENIZER), "exact_match") == 0


def test_a_pattern_finds_the_letter_in_the_completion() -> None:
    adapter = {"method": "multiple_choice_joint", "output_mapping_pattern": r"answer is ([A-D])"}
    ready = evaluation(data=QUESTIONS, adapter=adapter)
    rows = [row(p, f"So the answer is {'ABCD'[p.carried['correct'].index(True)]}, I think") for p in prompts(ready)]
    assert mean(ready.score(rows, TOKENIZER), "exact_match") == 1


def test_at_k_takes_the_best_of_the_likeliest_completions() -> None:
    adapter = {"num_outputs": 3, "temperature": 1.0}
    ready = evaluation(adapter=adapter, metrics=["exact_match", "exact_match@2"])
    likelihood = [-3.0, -1.0, -2.0]  # the right answer is the third completion, second in likelihood
    rows = []
    for prompt in prompts(ready):
        number = prompt.completion_index
        one_token = {"completion_ids": [1], "logprobs": [likelihood[number]]}
        rows.append(row(prompt, right(prompt) if number == 2 else "no", ending="") | one_token)
    scores = ready.score(rows, TOKENIZER)
    assert [mean(scores, name) for name in ("exact_match", "exact_match@2", "exact_match@3")] == [0, 1, 1]


def test_separate_choices_are_ranked_by_logprob_per_token() -> None:
    ready = evaluation(data=QUESTIONS, adapter={"method": "multiple_choice_separate_original", "output_suffix": ""})
    made = prompts(ready)

    def rows(best_is_right: bool) -> list[dict[str, Any]]:
        return [
            scored_row(
                p,
                p.score_tokens
                * (-1.0 if p.carried["correct"][p.carried["reference_index"]] == best_is_right else -2.0),
            )
            for p in made
        ]

    assert mean(ready.score(rows(True), TOKENIZER), "exact_match") == 1
    assert mean(ready.score(rows(False), TOKENIZER), "exact_match") == 0


def test_calibrated_choices_subtract_the_unconditional_logprob() -> None:
    ready = evaluation(data=QUESTIONS, adapter={"method": "multiple_choice_separate_calibrated", "output_suffix": ""})
    rows = []
    for prompt in prompts(ready):
        correct = prompt.carried["correct"][prompt.carried["reference_index"]]
        original = prompt.carried["request_mode"] == "original"
        rows.append(scored_row(prompt, (-9.0 if correct else -8.0) if original else (-5.0 if correct else -1.0)))
    assert mean(ready.score(rows, TOKENIZER), "exact_match") == 1


def test_ties_count_by_the_share_that_is_right() -> None:
    ready = evaluation(data=QUESTIONS, adapter={"method": "multiple_choice_separate_original", "output_suffix": ""})
    rows = [scored_row(prompt, -1.0 * prompt.score_tokens) for prompt in prompts(ready)]
    expected = np.mean([sum(i.correct for i in x.references) / 4 for x in ready.scenarios[0].evaluated])
    assert mean(ready.score(rows, TOKENIZER), "exact_match") == pytest.approx(expected)


def test_the_probability_of_an_answer_leaves_out_stop_string_and_end_token() -> None:
    ready = evaluation()
    first = prompts(ready)[0]
    others = [row(p, "x", ending="") for p in prompts(ready)[1:]]
    answer = row(first, "a b", ending="") | {"finish_reason": "stop"}
    answer["completion_ids"] = [*answer["completion_ids"], 0]  # the end token, as generated
    answer["logprobs"] = [-1.0, -2.0, -7.0]
    [(_, scores)] = ready.instance_scores([answer, *others], TOKENIZER)
    assert scores[0].statistics["logprob"] == -3.0
    assert scores[0].statistics["max_prob"] == math.exp(-3.0)
    assert scores[0].statistics["finish_reason_endoftext"] == 1
    stopped = row(first, "a b", ending=" ###") | {"logprobs": [-1.0, -2.0, -7.0]}
    [(_, scores)] = ready.instance_scores([stopped, *others], TOKENIZER)
    assert scores[0].statistics["logprob"] == -3.0
    assert scores[0].statistics["finish_reason_stop"] == 1


def test_perplexity_and_bits_per_byte_come_from_all_completions_together() -> None:
    ready = evaluation()
    rows = [row(prompt, "ab cd", logprob=-0.5, ending="") for prompt in prompts(ready)]
    derived = ready.score(rows, TOKENIZER).scenarios[0].derived
    assert derived["perplexity"] == pytest.approx(math.exp(0.5))
    assert derived["bits_per_byte"] == pytest.approx(0.5 * 2 / 5 / math.log(2))


def test_calibration_is_that_of_answers_and_their_real_probabilities() -> None:
    ready = evaluation()
    rows = [row(p, right(p), logprob=0.0) if n < 3 else row(p, "no", logprob=0.0) for n, p in enumerate(prompts(ready))]
    derived = ready.score(rows, TOKENIZER).scenarios[0].derived
    assert derived["ece_1_bin"] == pytest.approx(0.5)


def test_trials_are_averaged_and_instances_are_what_is_resampled() -> None:
    ready = evaluation(trials=3)
    rows = [row(p, right(p) if p.carried["trial"] == 0 else "no") for p in prompts(ready)]
    estimate = ready.score(rows, TOKENIZER).scenarios[0].estimates["exact_match"]
    assert (estimate.mean, estimate.count) == (pytest.approx(1 / 3), 6)


def test_missing_rows_are_an_error_and_not_a_score() -> None:
    ready = evaluation(adapter={"num_outputs": 2, "temperature": 1.0})
    rows = [row(prompt, "x") for prompt in prompts(ready)]
    with pytest.raises(DataError, match="has 1 of 2 rows"):
        ready.score(rows[:-1], TOKENIZER)


def test_rows_of_another_job_are_refused() -> None:
    ready = evaluation()
    rows = [row(prompt, "x") | {"scenario": "other"} for prompt in prompts(ready)]
    with pytest.raises(DataError, match="'other'"):
        ready.score(rows, TOKENIZER)


def test_the_carried_columns_have_the_types_that_are_declared() -> None:
    kinds = {"string": str, "int32": int, "bool": bool, "list<string>": list, "list<bool>": list}
    for prompt in prompts(evaluation()):
        assert list(prompt.carried) == list(COLUMNS)
        for name, kind in COLUMNS.items():
            assert type(prompt.carried[name]) is kinds[kind], name


def test_the_table_begins_with_the_main_metric() -> None:
    ready = evaluation(metrics=["exact_match", "f1_score"], main_metric="f1_score")
    table = ready.score([row(prompt, "x") for prompt in prompts(ready)], TOKENIZER).table()
    assert [(line.metric, line.main) for line in table] == [("f1_score", True), ("exact_match", False)]


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=40))
def test_the_confidence_interval_holds_the_mean_and_repeats(values: list[float]) -> None:
    estimate = estimate_mean(np.array(values))
    assert estimate.low - 1e-12 <= estimate.mean <= estimate.high + 1e-12
    assert estimate == estimate_mean(np.array(values))


def test_the_confidence_interval_is_as_wide_as_theory_says() -> None:
    values = np.array([0.0, 1.0] * 200)
    estimate = estimate_mean(values)
    half = 1.96 * 0.5 / math.sqrt(400)
    assert estimate.high - estimate.low == pytest.approx(2 * half, rel=0.15)
