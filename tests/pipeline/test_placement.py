"""Where tensors live changes the time that a job takes, never its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.command_line import CommandLine
from tests.pipeline.conftest import write_rows
from tests.pipeline.jobs import output_rows, overrides, pattern_match, scored_job

PLACEMENTS: dict[str, dict[str, Any]] = {
    "all on the device": {"offload__percent": "[100,0,100,0,100,0]", "offload__slots": 5},
    "all in main memory": {"offload__percent": "[0,100,0,100,0,100]", "offload__slots": 3},
    "all on disk": {"offload__percent": "[0,0,0,0,0,0]", "offload__slots": 4, "offload__reader": "direct"},
    "mixed": {"offload__percent": "[20,40,50,25,30,30]", "offload__slots": 7, "offload__prefill_tokens": 100},
    "FlexGen's own": {"offload__percent": "[20,80,0,100,0,100]", "offload__slots": 2, "offload__prefill_tokens": 1},
}


@pytest.fixture(scope="module")
def by_the_plan(
    command_line: CommandLine, small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """The dataset, and the rows that `offload.policy=auto` gives."""
    folder = tmp_path_factory.mktemp("placement")
    dataset = write_rows(folder / "data", shards=2, rows=24)
    finished = command_line.run(*overrides(small_model, dataset, folder / "run", **JOB), cwd=folder)
    assert finished.code == 0, finished.err
    rows = output_rows(folder / "run")
    assert len({tuple(row["completion_ids"]) for row in rows}) > 12, "the model says the same to every prompt"
    return dataset, rows


JOB = {"generation__max_new_tokens": 10, "output__part_rows": 10, "generation__logprobs": "true"}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_completions_are_the_same_under_every_placement(
    placement: str,
    command_line: CommandLine,
    small_model: Path,
    by_the_plan: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    dataset, expected = by_the_plan
    options = {**JOB, "offload__policy": "manual", **PLACEMENTS[placement]}
    finished = command_line.run(*overrides(small_model, dataset, tmp_path / "run", **options), cwd=tmp_path)
    assert finished.code == 0, finished.err
    rows = output_rows(tmp_path / "run")
    for row, want in zip(rows, expected, strict=True):
        assert row.pop("logprobs") == pytest.approx(want["logprobs"], abs=1e-4)
        assert row == {name: value for name, value in want.items() if name != "logprobs"}


def figures(metrics: Any, prefix: str = "") -> dict[str, float]:
    """All numbers of `metrics.json` by their dotted path."""
    if not isinstance(metrics, dict):
        return {prefix: metrics} if isinstance(metrics, int | float) else {}
    inner = (figures(value, f"{prefix}.{name}" if prefix else name) for name, value in metrics.items())
    return {name: value for found in inner for name, value in found.items()}


@pytest.mark.slow
def test_scores_are_the_same_under_every_placement(
    command_line: CommandLine, small_model: Path, tmp_path: Path
) -> None:
    job = scored_job(tmp_path, small_model, {"pattern": pattern_match(9)})
    found: list[dict[str, float]] = []
    for number, placement in enumerate(["all on the device", "mixed"]):
        chosen = {"offload__policy": "manual", **PLACEMENTS[placement]}
        options = [f"{name.replace('__', '.')}={value}" for name, value in chosen.items()]
        finished = command_line.run(*job, *options, f"output.dir=run{number}", cwd=tmp_path)
        assert finished.code == 0, finished.err
        found.append(figures(json.loads((tmp_path / f"run{number}" / "metrics.json").read_text())))
    assert found[0]["scenarios.pattern.metrics.exact_match.mean"] >= 0
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6)  # log-probabilities are sums in float32
