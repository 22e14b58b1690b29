"""Every kind of scored job, killed twice and started again, leaves the files of a run that nobody disturbed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.command_line import CommandLine, Moment
from tests.pipeline.jobs import output_rows, part_files, pattern_match, scored_job

WORDS = ("apple", "river", "stone", "cloud", "tiger", "spoon", "chair", "grass")


def questions(folder: Path) -> Path:
    """Four-choice questions; the first four are examples."""
    path = folder / "questions.jsonl"
    with path.open("w") as file:
        for number in range(12):
            choices = [WORDS[(number + place) % 8] for place in range(4)]
            row = {
                "input": f"Which word is {number}?",
                "references": choices,
                "split": "train" if number < 4 else "test",
            }
            file.write(json.dumps(row | {"correct": [place == number % 4 for place in range(4)]}) + "\n")
    return path


def evaluation(folder: Path, model: Path) -> list[str]:
    """Requests of all kinds: greedy and sampled completions, scored references, a text read in windows."""
    (folder / "story.txt").write_text("Once upon a time there was a girl who counted clouds. " * 20)
    separate = {"method": "multiple_choice_separate_calibrated", "output_suffix": "", "max_train_instances": 2}
    scenarios = {
        "pattern": pattern_match(9),
        "sampled": pattern_match(4, temperature=0.7, num_outputs=3),
        "choice": {"data": str(questions(folder)), "adapter": separate},
        "story": {
            "data": {"kind": "texts", "path": str(folder / "story.txt")},
            "prompt_tokens": 100,
            "adapter": {"method": "language_modeling"},
        },
    }
    return scored_job(folder, model, scenarios)


def bundled(job: str, *options: str) -> Callable[[Path, Path], list[str]]:
    """A ready-made job over the first rows of its own data."""

    def command(_folder: Path, model: Path) -> list[str]:
        return [f"job={job}", "model=hf", f"model.path={model}", "dataset.limit=24", "prompt.max_tokens=120", *options]

    return command


JOBS = {
    "helm_eval": evaluation,
    "extract": bundled("extract", "generation.max_new_tokens=80", "job.schema=[name, city]", "job.gold={name: name}"),
    "summarize": bundled("summarize", "generation.max_new_tokens=20"),
}
MOMENTS = (Moment("os.rename", "_tmp/part-", 2), Moment("pass", count=3))


def scores(folder: Path) -> dict[str, Any]:
    """`metrics.json` and all of HELM's files, by their paths."""
    paths = [folder / "metrics.json", *sorted((folder / "helm").rglob("*.json"))]
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in paths}


def alike(left: Any, right: Any) -> bool:
    """Equal, but for the last digits of numbers: log-probabilities are sums in float32 whose order a batch decides."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(alike(value, right[name]) for name, value in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(alike, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return left == pytest.approx(right, rel=1e-4, abs=1e-5, nan_ok=True)
    return bool(left == right)


@pytest.mark.parametrize("kind", JOBS)
def test_a_job_killed_in_the_middle_ends_with_the_same_files(
    kind: str, command_line: CommandLine, small_model: Path, tmp_path: Path
) -> None:
    settings = ["offload.slots=4", "offload.reader=buffered", "offload.prefill_tokens=300", "output.part_rows=8"]
    command = [*JOBS[kind](tmp_path, small_model), *settings, "output.journal_seconds=0.01"]
    finished = command_line.run(*command, "output.dir=clean", cwd=tmp_path)
    assert finished.code == 0, finished.err
    clean, run = tmp_path / "clean", tmp_path / "run"
    for moment in MOMENTS:
        killed = command_line.run(*command, "output.dir=run", cwd=tmp_path, moment=moment)
        assert killed.code == -signal.SIGKILL, killed.err
    assert 0 < len(part_files(run)) < len(part_files(clean))
    assert not (run / "metrics.json").exists()
    resumed = command_line.run(*command, "output.dir=run", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert [path.name for path in part_files(run)] == [path.name for path in part_files(clean)]
    assert alike(output_rows(run), output_rows(clean))
    assert len(scores(clean)) == (21 if kind == "helm_eval" else 1)
    assert alike(scores(run), scores(clean))
