"""Dummy weights are said loudly and never scored by accident."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pipeline.command_line import CommandLine
from tests.pipeline.conftest import write_rows
from tests.pipeline.jobs import overrides

LOUD = "WARNING: the weights are dummies"
SUMMARIES = {"job": "summarize", "job__reference": "label", "output__columns": None}
EXTRACTION = {
    "job": "extract",
    "job__schema": "[name]",
    "job__gold": "{name: name}",
    "prompt__template": "{{ text }}",
}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows", 1, 3)


def dummy_job(model: Path, dataset: Path, folder: Path, **options: object) -> list[str]:
    dummies = {"model__weights": "dummy", "model__cache_dir": folder / "cache", "generation__max_new_tokens": 2}
    return overrides(model, dataset, folder / "out", **{**dummies, **options})


def test_a_run_on_dummy_weights_says_so_before_and_after_and_in_its_metrics(
    command_line: CommandLine, small_model: Path, dataset: Path, tmp_path: Path
) -> None:
    done = command_line.run(*dummy_job(small_model, dataset, tmp_path), cwd=tmp_path)
    assert done.code == 0, done.err
    assert LOUD in done.err
    assert LOUD in done.out
    assert "dummy weights: " in done.err  # that they are made, which takes long for a large model
    assert LOUD in json.loads((tmp_path / "out" / "metrics.json").read_text())["warnings"][0]


@pytest.mark.parametrize("job", [SUMMARIES, EXTRACTION, {"job": "helm_eval"}], ids=lambda job: job["job"])
def test_a_scored_job_on_dummy_weights_is_refused_before_anything_is_made(
    command_line: CommandLine, small_model: Path, dataset: Path, tmp_path: Path, job: dict[str, object]
) -> None:
    done = command_line.run(*dummy_job(small_model, dataset, tmp_path, **job), cwd=tmp_path)
    assert done.code == 2, done.err
    assert "model.weights=dummy" in done.err
    assert "model.allow_dummy_scores=true" in done.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_a_scored_job_on_dummy_weights_runs_where_it_is_allowed(
    command_line: CommandLine, small_model: Path, dataset: Path, tmp_path: Path
) -> None:
    job = dummy_job(small_model, dataset, tmp_path, **EXTRACTION, job__constrain="false")
    done = command_line.run(*job, "model.allow_dummy_scores=true", cwd=tmp_path)
    assert done.code == 0, done.err
    assert LOUD in done.out


def test_a_checkpoint_is_not_warned_of(
    command_line: CommandLine, small_model: Path, dataset: Path, tmp_path: Path
) -> None:
    done = command_line.run(
        *overrides(small_model, dataset, tmp_path / "out", generation__max_new_tokens=2), cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert "WARNING" not in done.out + done.err
    assert "warnings" not in json.loads((tmp_path / "out" / "metrics.json").read_text())
