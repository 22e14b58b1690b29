"""Everything that is wrong with an evaluation is said before the first token, by name and with a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexbatch.composition import load_config
from flexbatch.config import JobConfig
from flexbatch.errors import ConfigError, DataError
from flexbatch.evaluation import Limits, build_evaluation
from flexbatch.evaluation.scenarios import load_scenario
from tests.evaluation.space_tokenizer import SpaceTokenizer

DATA: dict[str, Any] = {"kind": "synthetic_reasoning", "mode": "induction", "train": 4, "valid": 0, "test": 4}
QUESTIONS = {"kind": "mmlu", "path": str(Path(__file__).parent / "golden" / "mmlu"), "subject": "invented"}


def build(**options: Any) -> None:
    build_evaluation(JobConfig(kind="helm_eval", scenarios={"mine": {"data": DATA, **options}}))


def complaint(error: type[ConfigError] | type[DataError], **options: Any) -> str:
    with pytest.raises(error) as caught:
        build(**options)
    assert caught.value.remedy
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adaptor": {}}, ("job.scenarios.mine.adaptor", "Did you mean adapter?")),
        ({"adapter": {"max_train_instance": 3}}, ("adapter.max_train_instance", "Did you mean max_train_instances?")),
        ({"adapter": {"method": "chat"}}, ("adapter.method", "'chat'", "multiple_choice_joint")),
        ({"adapter": {"max_tokens": "many"}}, ("adapter.max_tokens", "'many'", "int")),
        ({"adapter": {"max_tokens": 0}}, ("adapter.max_tokens is 0", "at least 1")),
        ({"adapter": {"temperature": -1.0}}, ("adapter.temperature is -1",)),
        ({"adapter": {"num_train_trials": 0}}, ("adapter.num_train_trials is 0",)),
        ({"adapter": {"eval_splits": ["dev"]}}, ("adapter.eval_splits", "valid and test")),
        ({"adapter": {"substitutions": [{"source": "(", "target": ""}]}}, ("'('", "not a regular expression")),
        ({"metrics": ["exact_mach"]}, ("no metric 'exact_mach'", "Did you mean exact_match?")),
        ({"metrics": ["f1_score"], "main_metric": "rouge_l"}, ("main_metric is 'rouge_l'", "f1_score")),
        ({"data": {"kind": "shard", "path": "x"}}, ("data.kind is 'shard'", "shards")),
        ({"data": {"kind": "mmlu", "path": "x"}}, ("data.subject is missing",)),
        ({"data": {"kind": "synthetic_reasoning", "mode": "inductive"}}, ("data.mode is 'inductive'", "induction")),
        ({"adapter": {"method": "multiple_choice_separate_original"}}, ("output_suffix", "instance_prefix")),
    ],
)
def test_a_wrong_setting_is_a_config_error_that_names_key_and_value(
    options: dict[str, Any], words: tuple[str, ...]
) -> None:
    message = complaint(ConfigError, **options)
    assert all(word in message for word in words), message


def test_an_empty_stop_string_is_refused() -> None:
    assert "stop_sequences holds an empty string" in complaint(ConfigError, adapter={"stop_sequences": ["\n", ""]})


@pytest.mark.parametrize("metric", ["exact_match@6", "exact_match@0", "exact_match@", "exact_match@x"])
def test_k_above_the_number_of_completions_is_refused(metric: str) -> None:
    adapter = {"num_outputs": 5, "temperature": 1.0}
    assert "adapter.num_outputs is 5" in complaint(ConfigError, adapter=adapter, metrics=[metric])


def test_several_completions_at_temperature_zero_are_refused() -> None:
    assert "would all be the same" in complaint(ConfigError, adapter={"num_outputs": 5, "temperature": 0.0})


@pytest.mark.parametrize(
    ("method", "metric"),
    [
        ("multiple_choice_joint", "rouge_l"),
        ("multiple_choice_joint", "f1_set_match"),
        ("multiple_choice_separate_original", "f1_score"),
        ("multiple_choice_separate_calibrated", "quasi_exact_match"),
    ],
)
def test_a_metric_that_does_not_fit_the_method_is_refused(method: str, metric: str) -> None:
    adapter = {"method": method, "output_suffix": ""}
    assert f"does not fit {method}" in complaint(ConfigError, data=QUESTIONS, adapter=adapter, metrics=[metric])


def test_set_metrics_are_refused_where_references_state_no_set() -> None:
    assert "set metrics compare statements" in complaint(ConfigError, metrics=["f1_set_match"])


def test_a_job_without_scenarios_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"job\.scenarios is empty"):
        build_evaluation(JobConfig(kind="helm_eval"))


def test_no_room_for_a_prompt_is_said_before_generation() -> None:
    evaluation = build_evaluation(JobConfig(scenarios={"mine": {"data": DATA, "adapter": {"max_tokens": 64}}}))
    with pytest.raises(ConfigError, match="no room for a prompt"):
        next(evaluation.prompts(SpaceTokenizer(), Limits(512, context_tokens=32)))


def shard(folder: Path, *lines: str) -> dict[str, Any]:
    file = folder / "mine.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    return {"path": str(file)}


def test_instances_without_references_are_refused(tmp_path: Path) -> None:
    data = shard(tmp_path, '{"input": "a", "references": ["b"]}', '{"input": "c", "references": []}')
    message = complaint(DataError, data=data)
    assert "1 of 2 instances have no correct reference (first: id1)" in message


def test_multiple_choice_with_the_right_answers_alone_is_refused(tmp_path: Path) -> None:
    data = shard(tmp_path, '{"input": "a", "references": ["b"]}')
    assert "needs the wrong choices" in complaint(DataError, data=data, adapter={"method": "multiple_choice_joint"})


def test_more_choices_than_letters_are_refused() -> None:
    adapter = {"method": "multiple_choice_joint", "reference_prefix": "X. "}
    assert "4 choices and there are 3 letters" in complaint(ConfigError, data=QUESTIONS, adapter=adapter)


def test_a_split_without_instances_names_the_splits_that_there_are(tmp_path: Path) -> None:
    data = shard(tmp_path, '{"input": "a", "references": ["b"], "split": "valid"}')
    message = complaint(DataError, data=data, adapter={"eval_splits": ["test"]})
    assert "no instance in test" in message
    assert "valid" in message


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (('{"text": "a", "references": ["b"]}',), ("column 'input'", "text")),
        (('{"input": "a", "references": ["b"], "correct": [true, false]}',), ("1 references but 2",)),
        (('{"id": "x", "input": "a", "references": ["b"]}',) * 2, ("'x' twice",)),
        (('{"input": "a", "references": ["b"], "split": "dev"}',), ("split 'dev'",)),
    ],
)
def test_a_shard_that_does_not_fit_says_which_row_and_why(
    tmp_path: Path, lines: tuple[str, ...], words: tuple[str, ...]
) -> None:
    message = complaint(DataError, data=shard(tmp_path, *lines))
    assert all(word in message for word in words), message


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    for data in (
        {"kind": "mmlu", "path": str(tmp_path), "subject": "law"},
        {"kind": "wikifact", "path": str(tmp_path), "property": "P31"},
        {"kind": "summarization", "path": str(tmp_path)},
        str(tmp_path / "missing.arrow"),
    ):
        message = complaint(DataError, data=data)
        assert str(tmp_path) in message
        assert "dataset.path" not in message


def test_columns_of_a_shard_may_have_other_names(tmp_path: Path) -> None:
    data = shard(tmp_path, '{"q": "2+2", "a": "4"}')
    scenario = load_scenario("mine", {"data": {**data, "columns": {"input": "q", "references": "a"}}})
    assert [(i.input, i.label, i.split) for i in scenario.evaluated] == [("2+2", "4", "test")]


def test_wikifact_files_give_the_instances_of_one_property(tmp_path: Path) -> None:
    line = '{"property": "%s", "template": "Ada is an instance of", "result_names": [["human "], ["person"]]}\n'
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text(line % "P31" + line % "P50")
    scenario = load_scenario("w", {"data": {"kind": "wikifact", "path": str(tmp_path), "property": "P31"}})
    assert [reference.text for reference in scenario.evaluated[0].references] == ["human", "person"]
    assert (len(scenario.train), [instance.split for instance in scenario.evaluated]) == (1, ["valid", "test"])


def test_xsum_files_are_cut_and_filtered_as_helm_does(tmp_path: Path) -> None:
    good, short, poor = (
        json.dumps({"document": "word " * words, "summary": "s " * summary}) + "\n"
        for words, summary in ((60, 11), (20, 3), (60, 10))
    )
    (tmp_path / "train.jsonl").write_text(good + short + poor)
    (tmp_path / "validation.jsonl").write_text(short)
    (tmp_path / "test.jsonl").write_text('{"document": "one\\ntwo  three four", "summary": "a\\nb"}\n')
    options = {"kind": "summarization", "path": str(tmp_path), "sampling_min_length": 50, "doc_max_length": 3}
    scenario = load_scenario("x", {"data": {**options, "doc_max_length": 55}})
    assert len(scenario.train) == 1
    scenario = load_scenario("x", {"data": {**options, "sampling_min_length": 2}})
    assert (scenario.evaluated[-1].input, scenario.evaluated[-1].label) == ("one two three", "a b")


def test_mmlu_answers_are_letters_or_indices_and_choices_stay_as_written(tmp_path: Path) -> None:
    for name, text in (
        ("letters", "Q?,1.50,0,x,y,B\n"),
        ("indices", "question,choice0,choice1,choice2,choice3,answer\nQ?,1.50,0,x,y,1\n"),
    ):
        (tmp_path / "test").mkdir(exist_ok=True)
        (tmp_path / "test" / f"{name}_test.csv").write_text(text)
        scenario = load_scenario("m", {"data": {"kind": "mmlu", "path": str(tmp_path), "subject": name}})
        assert [(r.text, r.correct) for r in scenario.evaluated[0].references] == [
            ("1.50", False), ("0", True), ("x", False), ("y", False)
        ]  # fmt: skip


@pytest.mark.parametrize("cells", ["Q?,a,b,E", "Q?,a,b,7", "Q?,a,b,"])
def test_an_mmlu_answer_that_is_no_choice_names_file_and_record(tmp_path: Path, cells: str) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "law_test.csv").write_text(cells + "\n")
    message = complaint(DataError, data={"kind": "mmlu", "path": str(tmp_path), "subject": "law"})
    assert "law_test.csv, record 1" in message


@pytest.mark.realdata
def test_the_two_mmlu_subjects_of_the_paper_run_as_they_are(realdata: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXBATCH_REALDATA", str(realdata))
    evaluation = build_evaluation(load_config(["job=helm_mmlu", "model=opt-125m"]).job)
    made = list(evaluation.prompts(SpaceTokenizer(), Limits()))
    assert [len(scenario.evaluated) for scenario in evaluation.scenarios] == [100, 100]
    assert all(prompt.carried["shots"] == 5 for prompt in made)
    assert (
        made[0]
        .carried["prompt"]
        .startswith("The following are multiple choice questions (with answers) about abstract algebra.\n\nQuestion: ")
    )
    assert made[0].carried["prompt"].endswith("Answer:")


def test_the_default_evaluation_builds_without_any_file_from_elsewhere() -> None:
    evaluation = build_evaluation(load_config(["job=helm_eval", "model=opt-125m"]).job)
    assert len(evaluation.scenarios) >= 5
    assert evaluation.count() == sum(len(scenario.evaluated) for scenario in evaluation.scenarios) > 0


def test_the_synthetic_job_has_no_data_files() -> None:
    scenarios = load_config(["job=helm_synthetic", "model=opt-125m"]).job.scenarios
    assert len(scenarios) == 5
    assert not any("path" in scenario["data"] for scenario in scenarios.values())


def test_a_scenario_set_to_null_is_left_out() -> None:
    config = load_config(["model=opt-125m", "job.scenarios.copying=null"])
    assert "copying" not in [scenario.name for scenario in build_evaluation(config.job).scenarios]


def test_the_flexgen_job_has_the_seven_scenarios_with_their_own_lengths() -> None:
    scenarios = load_config(["job=helm_flexgen", "model=opt-125m"]).job.scenarios
    lengths = {name: (s["prompt_tokens"], s["adapter"]["max_tokens"]) for name, s in scenarios.items()}
    assert lengths == {
        "wikifact_plaintiff": (2040, 8),
        "wikifact_instance_of": (2040, 8),
        "mmlu_abstract_algebra": (2047, 1),
        "mmlu_us_foreign_policy": (2047, 1),
        "synthetic_reasoning_pattern_match": (1998, 50),
        "synthetic_reasoning_natural_easy": (2028, 20),
        "summarization_xsum": (1984, 64),
    }
