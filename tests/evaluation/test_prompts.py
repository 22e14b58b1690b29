"""Prompt for prompt the text that HELM 0.5.16 makes: golden digests from HELM's own scenarios and adapters."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flexbatch.config import JobConfig
from flexbatch.evaluation import Evaluation, Limits, build_evaluation
from flexbatch.records import Prompt
from tests.evaluation.space_tokenizer import SpaceTokenizer

GOLDEN = Path(__file__).parent / "golden"
RECORDED = json.loads((GOLDEN / "prompts.json").read_text())["scenarios"]

PATTERN = {"instructions": "Please solve the following problem.\n", "input_prefix": "", "output_prefix": "Target: "}
NATURAL = {"instructions": "Please solve the following problem.\n", "input_prefix": "Rules:\n", "output_prefix": ""}
JOINT = {
    "method": "multiple_choice_joint",
    "instructions": "The following are multiple choice questions (with answers) about invented.\n",
    "input_prefix": "Question: ",
    "output_prefix": "Answer: ",
    "max_tokens": 1,
}
SEPARATE = {
    "input_prefix": "Q: ",
    "output_prefix": "A: ",
    "output_suffix": "",
    "max_train_instances": 2,
    "max_tokens": 0,
}
INVENTED = {"kind": "mmlu", "path": str(GOLDEN / "mmlu"), "subject": "invented"}


def scenario(name: str) -> dict[str, Any]:
    if name.startswith("synthetic_reasoning_natural_"):
        data = {"kind": "synthetic_reasoning_natural", "difficulty": name.rsplit("_", 1)[1]}
        return {"data": data, "adapter": {**NATURAL, "max_train_instances": 3, "max_tokens": 20}}
    if name.startswith("synthetic_reasoning_"):
        data = {"kind": "synthetic_reasoning", "mode": name.removeprefix("synthetic_reasoning_")}
        return {"data": data, "adapter": {**PATTERN, "max_tokens": 50}}
    if name == "joint":
        return {"data": INVENTED, "adapter": JOINT}
    return {"data": INVENTED, "adapter": {**SEPARATE, "method": name}}


@cache
def built(name: str) -> Evaluation:
    options = scenario(name)
    options["adapter"] = {**options["adapter"], "max_eval_instances": 100}
    return build_evaluation(JobConfig(kind="helm_eval", trials=3, scenarios={name: options}))


@cache
def prompts(case: str) -> list[Prompt]:
    name, limit = case.split("/")
    evaluation = built(name)
    [ready] = evaluation.scenarios
    fitting = replace(evaluation, scenarios=(replace(ready, prompt_tokens=int(limit) - ready.spec.max_tokens),))
    return list(fitting.prompts(SpaceTokenizer(), Limits()))


@pytest.mark.parametrize("case", RECORDED)
def test_every_prompt_has_the_text_that_helm_makes(case: str) -> None:
    golden, made = RECORDED[case], prompts(case)
    assert made[0].carried["prompt"] == golden["first"]
    digests = "".join(hashlib.sha256(prompt.carried["prompt"].encode()).hexdigest()[:12] for prompt in made)
    assert digests == golden["digests"]


@pytest.mark.parametrize("case", RECORDED)
def test_instances_shots_and_truncation_are_those_of_helm(case: str) -> None:
    golden, made = RECORDED[case], prompts(case)
    ids = " ".join(prompt.carried["instance"] for prompt in made)
    assert hashlib.sha256(ids.encode()).hexdigest() == golden["ids"]
    assert "".join(str(prompt.carried["shots"]) for prompt in made) == golden["shots"]
    assert "".join(str(int(prompt.carried["truncated"])) for prompt in made) == golden["truncated"]


def test_the_golden_cases_drop_shots_and_truncate() -> None:
    assert len(set(RECORDED["synthetic_reasoning_pattern_match/120"]["shots"])) > 1
    assert "1" in RECORDED["synthetic_reasoning_natural_easy/75"]["truncated"]


def test_prompts_of_a_trial_share_their_shots_and_trials_do_not() -> None:
    made = prompts("synthetic_reasoning_pattern_match/2048")
    starts = {prompt.carried["trial"]: set() for prompt in made}
    for prompt in made:
        starts[prompt.carried["trial"]].add(prompt.carried["prompt"].rsplit("\n\n", 1)[0])
    assert [len(texts) for texts in starts.values()] == [1, 1, 1]
    assert len(set.union(*starts.values())) == 3


def test_ids_and_rows_name_every_request_once() -> None:
    made = [prompt for case in ("multiple_choice_separate_calibrated/2048", "joint/60") for prompt in prompts(case)]
    assert len({prompt.row.id for prompt in made}) == len(made)
    assert len({(prompt.row.shard, prompt.row.row) for prompt in made}) == len(made)


def test_scored_tokens_are_those_of_the_reference() -> None:
    tokenizer = SpaceTokenizer()
    evaluation = build_evaluation(
        JobConfig(kind="helm_eval", scenarios={"s": scenario("multiple_choice_separate_original")})
    )
    for prompt in evaluation.prompts(tokenizer, Limits()):
        reference = prompt.carried["references"][prompt.carried["reference_index"]]
        assert prompt.sampling.max_new_tokens == 0
        assert tokenizer.decode(prompt.token_ids[-prompt.score_tokens :], skip_special_tokens=False) == f" {reference}"


def test_a_prompt_never_exceeds_the_jobs_limit_nor_the_models_positions() -> None:
    for special in (False, True):
        for limits, longest in ((Limits(60, 0), 60), (Limits(512, 99), 50), (Limits(64, 2048), 64)):
            evaluation = build_evaluation(JobConfig(kind="helm_eval", scenarios={"s": small("pattern_match")}))
            for prompt in evaluation.prompts(SpaceTokenizer(special), limits):
                assert len(prompt.token_ids) <= longest


def test_scored_prompts_that_would_lose_their_reference_become_error_rows() -> None:
    evaluation = build_evaluation(
        JobConfig(kind="helm_eval", scenarios={"s": scenario("multiple_choice_separate_original")})
    )
    made = list(evaluation.prompts(SpaceTokenizer(), Limits(prompt_tokens=6)))
    assert all("would lose its reference" in prompt.error for prompt in made)
    assert all(prompt.dropped_tokens > 0 for prompt in made)


def test_completions_of_one_prompt_differ_in_seed_and_id_alone() -> None:
    options = small("induction")
    options["adapter"] |= {"num_outputs": 3, "temperature": 1.0}
    made = list(build_evaluation(JobConfig(scenarios={"s": options})).prompts(SpaceTokenizer(), Limits()))
    first = made[:3]
    assert [prompt.completion_index for prompt in first] == [0, 1, 2]
    assert len({prompt.token_ids for prompt in first}) == 1
    assert len({prompt.sampling.seed for prompt in first}) == len({prompt.row.id for prompt in first}) == 3


def test_seeds_depend_on_the_jobs_seed_and_the_row_alone() -> None:
    options = small("induction")
    options["adapter"] |= {"num_outputs": 2, "temperature": 1.0}
    job = JobConfig(scenarios={"s": options})

    def seeds(seed: int) -> list[int]:
        return [p.sampling.seed for p in build_evaluation(job, seed=seed).prompts(SpaceTokenizer(), Limits())]

    assert seeds(1) == seeds(1)
    assert not set(seeds(1)) & set(seeds(2))


@pytest.mark.parametrize("case", RECORDED)
def test_the_number_of_prompts_is_known_before_any_is_made(case: str) -> None:
    assert built(case.split("/", maxsplit=1)[0]).count() == len(prompts(case))


def test_the_digest_changes_with_data_and_settings_and_with_nothing_else() -> None:
    base = build_evaluation(JobConfig(scenarios={"s": small("induction")})).digest
    other = small("induction")
    other["adapter"]["max_tokens"] = 7
    assert build_evaluation(JobConfig(scenarios={"s": small("induction")})).digest == base
    assert build_evaluation(JobConfig(scenarios={"s": other})).digest != base
    assert build_evaluation(JobConfig(scenarios={"s": small("pattern_match")})).digest != base


def small(mode: str) -> dict[str, Any]:
    data = {"kind": "synthetic_reasoning", "mode": mode, "train": 8, "valid": 0, "test": 6}
    return {"data": data, "adapter": {**PATTERN, "max_tokens": 50}}
