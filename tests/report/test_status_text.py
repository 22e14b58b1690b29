"""What `status` prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexbatch.data.progress import Attempt, Status, read_status
from flexbatch.report.status_text import MEANING, status_text

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def status(**changes: object) -> Status:
    values: dict[str, object] = {
        "folder": "outputs/generate/opt-tiny",
        "state": "running",
        "alive": True,
        "pid": 42,
        "host": "night",
        "rows_done": 250,
        "rows_total": 1000,
        "parts_done": 3,
        "tokens": 8000,
        "rows_per_second": 0.5,
        "tokens_per_second": 16.0,
        "started": 1000.0,
        "updated": 1500.0,
        "finish": 3000.0,
        "attempts": (Attempt(1, 42, "night", 1000.0, None, "running", ""),),
        "last_error": "",
        **changes,
    }
    return Status(**values)  # type: ignore[arg-type]


def test_a_running_job_says_how_far_how_fast_and_until_when() -> None:
    text = status_text(status(), now=1503.0)
    for part in (
        "250 of 1,000 (25.0%)",
        "3 parts",
        "16 tokens/s",
        "process 42 on night",
        "24 min 57 s left",
        "3 s ago",
    ):
        assert part in text


def test_a_dead_job_says_that_the_same_command_goes_on() -> None:
    text = status_text(status(state="killed", alive=False, finish=None), now=1503.0)
    assert "killed" in text
    assert "same command" in text
    assert "left" not in text


def test_a_failed_job_shows_its_error() -> None:
    text = status_text(status(state="failed", alive=False, finish=None, last_error="no space left"), now=1503.0)
    assert "no space left" in text


def test_a_job_that_does_not_know_its_length_makes_none_up() -> None:
    assert "not known yet" in status_text(status(rows_total=None, finish=None), now=1503.0)


@pytest.mark.parametrize("state", sorted(MEANING))
def test_every_state_has_words(state: str) -> None:
    assert MEANING[state] in status_text(status(state=state), now=1503.0)


def test_the_verb_reads_files_alone_and_loads_no_torch(tmp_path: Path) -> None:
    state = tmp_path / "_state"
    state.mkdir()
    snapshot = {"state": "running", "attempt": 1, "started": 1.0, "updated": 11.0, "rows_done": 5, "rows_total": 10}
    tokens = {"tokens": 160, "attempt_rows": 0, "attempt_tokens": 0}
    (state / "progress.json").write_text(json.dumps(snapshot | tokens))
    (state / "events.jsonl").write_text('{"event": "start", "attempt": 1, "time": 1.0, "pid": 1, "host": "h"}\n')
    assert read_status(tmp_path).rows_done == 5
    code = (
        "import sys; from flexbatch.__main__ import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, "status", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "5 of 10" in finished.stdout
    assert "16 tokens/s" in finished.stdout
