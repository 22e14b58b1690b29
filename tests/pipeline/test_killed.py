"""Killed at any moment and started again with the same command: nothing is lost, nothing is done twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipeline.command_line import REPOSITORY, CommandLine, Moment
from tests.pipeline.conftest import write_rows
from tests.pipeline.jobs import output_rows, overrides, part_files
from tests.pipeline.readers import Watch, read_by_all

KILLS = 25
ROWS, NEW_TOKENS = 320, 16
OPTIONS = {
    "dataset__id_column": "name",
    "generation__max_new_tokens": NEW_TOKENS,
    "output__columns": "[label]",
    "output__part_rows": 16,
    # The clock decides how many passes lie between two saves, and how fast a machine is must not decide this test.
    "output__journal_seconds": 0.01,
    "offload__slots": 8,
}


def kill_moments(seed: int) -> list[Moment]:
    """When to kill: the same for everybody, spread over all that a run does, in random order."""
    draw = random.Random(seed)
    moments = [
        *[Moment("open", r"rows-\d\.jsonl$", draw.randint(1, 6), draw.uniform(0, 0.05)) for _ in range(4)],
        *[Moment("pass", count=draw.randint(1, 40), delay=draw.uniform(0, 0.03)) for _ in range(8)],
        *[Moment("open", "_tmp/part-", draw.choice([1, 1, 2]), draw.uniform(0, 0.005)) for _ in range(4)],
        *[Moment("os.rename", "_tmp/part-", draw.choice([1, 1, 2])) for _ in range(3)],
        *[Moment("open", "run/data$", draw.choice([1, 1, 2])) for _ in range(2)],  # renamed, the folder not synced
        Moment("os.rename", "_state/journal$"),
        Moment("open", "_state/journal$"),
        Moment("os.rename", "_state/progress.json$"),
    ]
    draw.shuffle(moments)
    return [Moment("os.rename", "_state/fingerprint.json$"), *moments]


@pytest.mark.slow
def test_a_job_killed_at_25_moments_ends_as_if_it_had_never_been(
    command_line: CommandLine, small_model: Path, tmp_path: Path
) -> None:
    dataset = write_rows(tmp_path / "rows", shards=3, rows=ROWS)
    clean, killed, counter = tmp_path / "clean", tmp_path / "run", tmp_path / "tokens"
    finished = command_line.run(*overrides(small_model, dataset, clean, **OPTIONS), cwd=tmp_path)
    assert finished.code == 0, finished.err
    expected = output_rows(clean)
    clean_tokens = sum(len(row["completion_ids"]) for row in expected)
    assert sorted(row["id"] for row in expected) == sorted(f"row {number}" for number in range(ROWS))

    moments = kill_moments(seed=2)
    assert len(moments) == KILLS
    command = overrides(small_model, dataset, killed, **OPTIONS)
    kills = 0
    with Watch(killed) as watch:
        for moment in moments:
            finished = command_line.run(*command, cwd=tmp_path, moment=moment, token_counter=str(counter))
            assert finished.code == -signal.SIGKILL, f"{moment}: exit code {finished.code}; {finished.err}"
            kills += 1
            ids = [row["id"] for row in output_rows(killed)]
            assert len(set(ids)) == len(ids)
            for reader, found in read_by_all(killed).items():
                assert found == sorted(ids), f"{reader} after {moment}"
        assert kills == KILLS
        assert len(part_files(killed)) < len(part_files(clean)), "the job ended too early to be killed so often"
        finished = command_line.run(*command, cwd=tmp_path, token_counter=str(counter))
        assert finished.code == 0, finished.err
    assert watch.failures == []
    assert watch.reads > 0
    assert output_rows(killed) == expected
    assert [path.name for path in part_files(killed)] == [path.name for path in part_files(clean)]
    assert (killed / "metrics.json").read_text() == (clean / "metrics.json").read_text()
    assert list((killed / "_tmp").iterdir()) == []
    assert int(counter.read_text()) <= 1.3 * clean_tokens


@pytest.mark.slow
def test_the_command_that_a_user_types_goes_on_after_a_kill(small_model: Path, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "rows", shards=2, rows=48)
    command = [
        sys.executable, "-m", "flexbatch",
        *overrides(small_model, dataset, Path("run"), output__part_rows=8, offload__slots=2),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not part_files(tmp_path / "run") and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    left = part_files(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in left}
    assert 0 < len(left) < 6
    finished = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "48 rows" in finished.stdout
    assert len({row["id"] for row in output_rows(tmp_path / "run")}) == 48
    assert before == {path: path.stat().st_mtime_ns for path in left}, "finished parts were written again"
