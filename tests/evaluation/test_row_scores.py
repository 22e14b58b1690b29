from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexbatch.composition import load_config
from flexbatch.config import JobConfig
from flexbatch.data.columns import ColumnType
from flexbatch.errors import ConfigError
from flexbatch.evaluation.fields import read_target
from flexbatch.evaluation.row_scores import RowScorer, build_row_scorer
from flexbatch.evaluation.summary import Scores
from flexbatch.records import Completion

RECEIPT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "company": {"type": "string"},
        "total": {"type": "number"},
        "items": {"type": "array", "items": {"type": "string"}},
        "count": {"type": ["integer", "null"]},
        "paid": {"type": "boolean"},
        "address": {"type": "object"},
    },
    "required": ["company", "total"],
    "additionalProperties": False,
}


def scorer(**options: Any) -> RowScorer:
    made = build_row_scorer(JobConfig(**{"kind": "extract", **options}))
    assert made is not None
    return made


def values(ready: RowScorer, text: str) -> dict[str, Any]:
    return ready.values(Completion(0, (), text, "stop"))


def scored(ready: RowScorer, completions: list[str], **columns: list[Any]) -> Scores:
    rows = [
        {
            "completion": text,
            "error": "",
            **values(ready, text),
            **{name: values[place] for name, values in columns.items()},
        }
        for place, text in enumerate(completions)
    ]
    return ready.score(rows)


def means(scores: Scores) -> dict[str, float]:
    return {name: estimate.mean for name, estimate in scores.scenarios[0].estimates.items()}


def test_fields_become_typed_columns() -> None:
    ready = scorer(schema=RECEIPT)
    assert ready.columns == {
        "extracted_company": "string",
        "extracted_total": "float64",
        "extracted_items": "list<string>",
        "extracted_count": "int64",
        "extracted_paid": "bool",
        "extracted_address": "string",
        "extracted_valid": "bool",
    }
    found = values(ready, ' {"company": "Kiosk", "total": 3, "items": ["tea"], "count": null, "address": {"no": 1}}\n')
    assert found == {
        "extracted_company": "Kiosk",
        "extracted_total": 3.0,
        "extracted_items": ["tea"],
        "extracted_count": None,
        "extracted_paid": None,
        "extracted_address": '{"no": 1}',
        "extracted_valid": True,
    }
    for name, kind in ready.columns.items():
        assert found[name] is None or ColumnType.parse(kind).accepts(found[name])


@pytest.mark.parametrize(
    "completion", ["", "{", '{"company": "Kiosk"}', '{"company": "K", "total": "3"}', '{"company": "K", "total": 3} x']
)
def test_a_completion_that_does_not_validate_gives_nulls(completion: str) -> None:
    found = values(scorer(schema=RECEIPT), completion)
    assert found["extracted_valid"] is False
    assert {value for name, value in found.items() if name != "extracted_valid"} == {None}


def test_a_list_of_names_is_an_object_of_strings() -> None:
    ready = scorer(schema=["name", "city"])
    assert values(ready, '{"name": "Ada", "city": "Ghent"}')["extracted_city"] == "Ghent"
    assert values(ready, '{"name": "Ada"}')["extracted_valid"] is False
    assert values(ready, '{"name": "Ada", "city": "Ghent", "x": "y"}')["extracted_valid"] is False


def test_a_schema_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(RECEIPT))
    assert scorer(schema=str(file)).columns == scorer(schema=RECEIPT).columns


def test_choices_and_expressions_have_one_field_named_value() -> None:
    assert values(scorer(choices=["yes", "no"]), " yes") == {"extracted_value": "yes", "extracted_valid": True}
    assert values(scorer(choices=["yes", "no"]), "maybe") == {"extracted_value": None, "extracted_valid": False}
    assert values(scorer(regex="[0-9]+"), "42") == {"extracted_value": "42", "extracted_valid": True}
    assert values(scorer(regex="[0-9]+"), "42a")["extracted_valid"] is False
    assert values(scorer(regex=r"a\s+"), " a \n") == {"extracted_value": "a \n", "extracted_valid": True}


def test_fields_are_scored_against_gold_columns() -> None:
    ready = scorer(schema=["company", "date"], gold={"company": "gold.company", "date": "day"})
    assert ready.source_columns == ("gold", "day")
    completions = ['{"company": "the kiosk", "date": "1 May"}', '{"company": "Kiosk Ltd", "date": ""}', "broken"]
    gold = [{"company": "Kiosk."}, {"company": "Kiosk"}, {"company": "Inn"}]
    scores = scored(ready, completions, gold=gold, day=["1 May", None, "2 May"])
    found = means(scores)
    assert found["company_exact_match"] == pytest.approx(1 / 3)
    assert found["date_exact_match"] == pytest.approx(2 / 3)
    assert found["exact_match"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["company_f1_score"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["invalid_rate"] == pytest.approx(1 / 3)
    # found: 3 values, wanted: 5, right: 2
    assert scores.scenarios[0].derived["field_f1"] == pytest.approx(2 * 2 / (3 + 5))


def test_truth_values_and_numbers_compare_as_such() -> None:
    ready = scorer(choices=["yes", "no"], gold={"value": "match"})
    assert means(scored(ready, ["yes", "no", "yes", "?"], match=[True, False, False, False]))["exact_match"] == 0.5
    ready = scorer(schema=RECEIPT, gold={"total": "amount"})
    completions = ['{"company": "K", "total": 9.00}', '{"company": "K", "total": 8}']
    assert means(scored(ready, completions, amount=[9, 9]))["exact_match"] == 0.5


def test_without_gold_the_invalid_rate_is_what_is_reported() -> None:
    scores = scored(scorer(schema=["name"]), ["{}", '{"name": "Ada"}'])
    assert means(scores) == {"invalid_rate": 0.5}
    assert scores.scenarios[0].main_metric == "invalid_rate"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "none given"),
        ({"regex": "a", "choices": ["a"]}, "regex, choices given"),
        ({"regex": "("}, "job.regex is '('"),
        ({"choices": ["yes", ""]}, "job.choices"),
        ({"schema": {"type": "objekt"}}, "not a JSON Schema"),
        ({"schema": ["a", "a"]}, "job.schema"),
        ({"schema": 3}, "job.schema is 3"),
        ({"schema": "no/such/file.json"}, "cannot read no/such/file.json"),
        ({"schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "job.schema cannot be enforced"),
        ({"schema": ["name"], "gold": {"nane": "n"}}, "job.gold.nane: there is no such field"),
    ],
)
def test_an_impossible_target_is_a_config_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_row_scorer(JobConfig(kind="extract", **options))
    assert words in str(caught.value)
    assert caught.value.remedy


def test_summaries_are_scored_by_rouge_against_the_best_reference() -> None:
    ready = build_row_scorer(JobConfig(name="s", kind="summarize", reference="gold"))
    assert ready is not None
    scores = scored(ready, ["The cat sat.", "dogs", ""], gold=[["no", "the cat sat"], "birds", None])
    assert means(scores) == {"rouge_1": 0.5, "rouge_2": 0.5, "rouge_l": 0.5}


def test_nothing_to_score_is_no_scorer() -> None:
    assert build_row_scorer(JobConfig(kind="generate")) is None
    assert build_row_scorer(JobConfig(kind="summarize")) is None


def test_the_bundled_extract_job_has_a_gold_value_for_every_field() -> None:
    job = load_config(["job=extract", "model=opt-125m"]).job
    assert set(read_target(job).fields) == set(job.gold)


def test_choices_given_on_the_command_line_are_texts() -> None:
    job = load_config(["job=extract", "model=opt-125m", "job.choices=[yes, no, 1.0, null]"]).job
    assert read_target(job).choices == ("yes", "no", "1.0", "null")
