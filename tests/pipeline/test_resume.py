"""Going on with a run: what may change, what may not, who may run, and how Ctrl-C leaves it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.command_line import Command, CommandLine, Finished, Moment
from tests.pipeline.conftest import write_rows
from tests.pipeline.jobs import output_rows, overrides, part_files, pattern_match, scored_job

OPTIONS: dict[str, Any] = {
    "generation__max_new_tokens": 12,
    "output__part_rows": 8,
    "output__columns": "[name]",
    "offload__slots": 4,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("dataset") / "rows", shards=2, rows=40)


@pytest.fixture(scope="module")
def clean(
    command_line: CommandLine, small_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output of a run that nobody disturbed."""
    output = tmp_path_factory.mktemp("clean") / "run"
    finished = command_line.run(*overrides(small_model, dataset, output, **OPTIONS), cwd=output.parent)
    assert finished.code == 0, finished.err
    assert len(output_rows(output)) == 40
    return output


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in `data/`, to compare."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in part_files(folder)}


def score_lines(finished: Finished) -> str:
    """The table of scores, as it was printed."""
    table = finished.out[finished.out.index("scenario ") :]
    return table[: table.index("\n\n")]


def stop_reasons(folder: Path) -> list[str]:
    events = map(json.loads, (folder / "_state" / "events.jsonl").read_text().splitlines())
    return [event["reason"] for event in events if event["event"] == "stop"]


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for this signal."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def wait_until_under_way(command: Command, folder: Path, parts: int = 1) -> None:
    command.wait_for(folder / "data" / f"part-{parts - 1:05d}.parquet")


def test_a_finished_job_run_again_does_nothing_and_says_the_same(
    command_line: CommandLine, small_model: Path, clean: Path, dataset: Path, tmp_path: Path
) -> None:
    before, metrics = state_of(clean), (clean / "metrics.json").read_bytes()
    counter = tmp_path / "tokens"
    command = overrides(small_model, dataset, clean, **OPTIONS)
    again = command_line.run(*command, cwd=tmp_path, token_counter=str(counter))
    assert again.code == 0, again.err
    assert state_of(clean) == before
    assert (clean / "metrics.json").read_bytes() == metrics
    assert counter.read_text() == "", "a pass was made"
    assert "40 rows, 480 tokens generated" in again.out


@pytest.mark.slow
def test_a_scored_job_run_again_prints_the_same_scores(
    command_line: CommandLine, small_model: Path, tmp_path: Path
) -> None:
    job = scored_job(tmp_path, small_model, {"pattern": pattern_match(12)})
    command = [*job, "output.dir=run", "output.part_rows=16"]
    first = command_line.run(*command, cwd=tmp_path, moment=Moment("pass", count=3))
    assert first.code == -signal.SIGKILL, first.err
    second = command_line.run(*command, cwd=tmp_path)
    assert second.code == 0, second.err
    metrics = (tmp_path / "run" / "metrics.json").read_bytes()
    third = command_line.run(*command, cwd=tmp_path)
    assert "exact_match" in score_lines(second)
    assert score_lines(third) == score_lines(second)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == metrics


@pytest.mark.parametrize(
    "changed",
    [
        {"offload__policy": "manual", "offload__percent": "[0,0,0,0,0,0]"},
        {"offload__policy": "manual", "offload__percent": "[30,40,50,20,0,50]", "offload__slots": 3},
        {"offload__slots": 7, "offload__prefill_tokens": 64, "output__journal_seconds": 0.5},
        {"offload__reader": "auto", "offload__host_memory": "2GiB", "offload__disk_dir": "elsewhere"},
    ],
)
def test_what_does_not_change_results_may_change_between_runs(
    changed: dict[str, Any], command_line: CommandLine, small_model: Path, clean: Path, dataset: Path, tmp_path: Path
) -> None:
    first = overrides(small_model, dataset, tmp_path / "run", **OPTIONS)
    moment = Moment("pass", count=30)
    assert command_line.run(*first, cwd=tmp_path, moment=moment).code == -signal.SIGKILL
    assert 0 < len(part_files(tmp_path / "run")) < 5
    second = overrides(small_model, dataset, tmp_path / "run", **(OPTIONS | changed))
    finished = command_line.run(*second, cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert output_rows(tmp_path / "run") == output_rows(clean)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"generation__max_new_tokens": 13, "generation__stop": "[x]"}, ["generation.max_new_tokens", "stop"]),
        ({"generation__temperature": 0.5, "generation__seed": 3}, ["generation.temperature: 0.0 there, 0.5 now"]),
        ({"prompt__template": "{{ text }}!"}, ["prompt.template"]),
        ({"prompt__window": 3, "output__part_rows": 9}, ["window", "part_rows"]),
        ({"output__columns": "[name,label]"}, ["columns"]),
        ({"dataset__limit": 10}, ["dataset.limit"]),
        ({"model__dtype": "bfloat16"}, ["model.dtype"]),
    ],
)
def test_what_changes_results_is_refused_by_name(
    changed: dict[str, Any],
    named: list[str],
    command_line: CommandLine,
    small_model: Path,
    clean: Path,
    dataset: Path,
    tmp_path: Path,
) -> None:
    before = state_of(clean)
    finished = command_line.run(*overrides(small_model, dataset, clean, **(OPTIONS | changed)), cwd=tmp_path)
    assert finished.code == 6, finished.err
    assert f"'{clean}' belongs to another run" in finished.err
    for key in named:
        assert key in finished.err
    assert "choose another output.dir" in finished.err
    assert "Traceback" not in finished.err
    assert state_of(clean) == before


def test_another_dataset_or_model_or_template_file_under_the_same_name_is_refused(
    command_line: CommandLine, small_model: Path, tmp_path: Path
) -> None:
    dataset = write_rows(tmp_path / "rows", shards=2, rows=12)
    model, template = tmp_path / "model", tmp_path / "prompt.jinja"
    shutil.copytree(small_model, model)
    template.write_text("{{ text }}")
    options = OPTIONS | {"dataset__limit": 8, "prompt__template_file": template}
    command = overrides(model, dataset, tmp_path / "run", **options)

    def refused(named: str) -> None:
        finished = command_line.run(*command, cwd=tmp_path)
        assert finished.code == 6, finished.err
        assert named in finished.err
        assert finished.err.count("there, ") == 1, finished.err

    assert command_line.run(*command, cwd=tmp_path).code == 0
    template.write_text("{{ text }}?")
    refused("template")
    template.write_text("{{ text }}")
    shard = next(model.glob("*1-of-*.safetensors"))
    weights = shard.read_bytes()
    shard.write_bytes(weights[:-4] + b"\1\2\3\4")
    refused("model.weights")
    shard.write_bytes(weights)
    assert command_line.run(*command, cwd=tmp_path).code == 0
    lines = (dataset / "rows-0.jsonl").read_text().splitlines()
    (dataset / "rows-0.jsonl").write_text("\n".join([lines[0].upper(), *lines[1:]]))
    finished = command_line.run(*command, cwd=tmp_path)
    assert finished.code == 6
    assert "rows-0.jsonl" in finished.err


@pytest.mark.slow
def test_a_second_run_on_a_live_folder_is_refused_and_the_first_goes_on(
    command_line: CommandLine, small_model: Path, tmp_path: Path
) -> None:
    dataset = write_rows(tmp_path / "many", shards=2, rows=200)
    command = overrides(small_model, dataset, tmp_path / "run", **OPTIONS)
    first = command_line.start(*command, cwd=tmp_path)
    wait_until_under_way(first, tmp_path / "run")
    first.signal(signal.SIGSTOP)  # or a slow machine might see it end before the others have begun
    second = command_line.run(*command, cwd=tmp_path)
    other = command_line.run(*command, "generation.max_new_tokens=3", cwd=tmp_path)
    assert first.is_running()
    for refused in (second, other):
        assert refused.code == 6
        assert f"in use by process {first.pid}" in refused.err
        assert "Traceback" not in refused.err
    status = command_line.run("status", "run", cwd=tmp_path)
    assert "running" in status.out
    first.signal(signal.SIGCONT)
    finished = first.wait()
    assert finished.code == 0, finished.err
    assert len({row["id"] for row in output_rows(tmp_path / "run")}) == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_cleanly_and_the_same_command_goes_on(
    number: signal.Signals, command_line: CommandLine, small_model: Path, clean: Path, dataset: Path, tmp_path: Path
) -> None:
    command = overrides(small_model, dataset, tmp_path / "run", **OPTIONS)
    counter = tmp_path / "tokens"
    running = command_line.start(*command, cwd=tmp_path, token_counter=str(counter))
    wait_until_under_way(running, tmp_path / "run")
    running.signal(number)
    stopped = running.wait()
    assert stopped.code == 130, stopped.err
    assert "once more to stop at once" in stopped.err
    assert "The same command goes on" in stopped.err
    assert "Traceback" not in stopped.err
    assert stop_reasons(tmp_path / "run") == ["interrupted"]
    assert list((tmp_path / "run" / "_tmp").iterdir()) == []
    status = command_line.run("status", "run", cwd=tmp_path)
    assert "stopped on request" in status.out
    finished = command_line.run(*command, cwd=tmp_path, token_counter=str(counter))
    assert finished.code == 0, finished.err
    assert output_rows(tmp_path / "run") == output_rows(clean)
    decoded, needed = int(counter.read_text()), sum(len(row["completion_ids"]) for row in output_rows(clean))
    assert decoded == needed, "a clean stop loses no token"


def test_the_second_ctrl_c_ends_at_once(command_line: CommandLine, small_model: Path, tmp_path: Path) -> None:
    """Both come while the dataset is inspected: the first waits for the end of a pass, which is far away."""
    dataset = write_rows(tmp_path / "rows", shards=1, rows=40)
    big = dataset / "rows-0.jsonl"
    big.write_text(big.read_text() * 250)
    command = overrides(small_model, dataset, tmp_path / "run", **OPTIONS, dataset__limit=40)
    running = command_line.start(*command, cwd=tmp_path)
    wait_until(lambda: catches(running.pid, signal.SIGTERM))
    running.signal(signal.SIGINT)
    wait_until(lambda: "Stopping after" in running.err)
    assert running.is_running()
    running.signal(signal.SIGINT)
    stopped = running.wait()
    assert stopped.code == 130
    assert "Stopped at once." in stopped.err
    assert command_line.run(*command, cwd=tmp_path).code == 0
    assert len(output_rows(tmp_path / "run")) == 40
