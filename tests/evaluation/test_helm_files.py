"""HELM's files of a run: its own metrics, on the scenario states written here, give the statistics written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexbatch.evaluation.helm_files import run_files
from tests.evaluation.helm_run import SCENARIOS, TOKENIZER, helm_run, write

GOLDEN = json.loads((Path(__file__).parent / "golden" / "statistics.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("run")
    write(made)
    return made / "helm" / "runs" / "flexbatch"


def read(folder: Path, run: str, name: str) -> Any:
    return json.loads((folder / run / name).read_text())


@pytest.mark.parametrize("run", GOLDEN["runs"])
def test_statistics_are_those_of_helms_own_metrics(folder: Path, run: str) -> None:
    stats = read(folder, run, "stats.json")
    found = {
        (stat["name"]["name"], stat["name"]["split"], stat["name"].get("perturbation", {}).get("name", "")): stat
        for stat in stats
    }
    for name, split, perturbation, count, mean in GOLDEN["runs"][run]:
        stat = found.pop((name, split, perturbation))
        assert (stat["count"], stat["mean"]) == (count, pytest.approx(mean, rel=1e-6, abs=1e-9)), name
    assert not found


def test_every_scenario_has_a_run(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(GOLDEN["runs"])
    assert len(GOLDEN["runs"]) == len(SCENARIOS)


def test_a_run_has_the_five_files_that_helm_expects(folder: Path) -> None:
    expected = ["per_instance_stats.json", "run_spec.json", "scenario.json", "scenario_state.json", "stats.json"]
    for run in folder.iterdir():
        assert sorted(path.name for path in run.iterdir()) == expected


def test_completions_of_one_prompt_are_one_request_in_the_order_they_were_made(folder: Path) -> None:
    states = read(folder, "induction,model=opt-tiny", "scenario_state.json")["request_states"]
    assert {len(state["result"]["completions"]) for state in states} == {3}
    _, rows = helm_run()
    texts = [row["completion"] for row in rows if row["scenario"] == "induction"]
    assert [completion["text"] for state in states for completion in state["result"]["completions"]] == texts


def test_a_failed_row_is_a_result_without_success() -> None:
    evaluation, rows = helm_run()
    failed = {"completion": "", "completion_ids": [], "logprobs": [], "finish_reason": "error", "error": "no luck"}
    rows = [row | failed if row["scenario"] == "natural" and row["row"] == 0 else row for row in rows]
    for scenario, scores in evaluation.instance_scores(rows, TOKENIZER):
        files = run_files(scenario, scores, TOKENIZER, "flexbatch/opt-tiny")
        json.dumps(files, allow_nan=False)
        if scenario.name == "natural":
            result = files["scenario_state.json"]["request_states"][0]["result"]
            assert (result["success"], result["error"]) == (False, "no luck")
