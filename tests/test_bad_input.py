"""What bad input gets, through the command line on a real tiny model: a message, an exit code, nothing half-written.

The configuration's own mistakes are in test_config.py, the readers' in tests/data, a run killed at any moment in its
own test.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from flexbatch.__main__ import main
from flexbatch.data.ledger import Ledger

REPOSITORY = Path(__file__).resolve().parent.parent
ROWS = 6


@dataclass(frozen=True)
class Outcome:
    code: int
    message: str


class Job:
    """A small job that is right; each test puts one thing wrong."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.model, self._capsys = folder, model, capsys
        self.output = folder / "out"
        self.dataset = self.jsonl("good.jsonl", [{"text": f"row {number}"} for number in range(ROWS)])

    def jsonl(self, name: str, rows: list[dict[str, object]]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def arguments(self, *overrides: str) -> list[str]:
        named = {override.split("=")[0] for override in overrides}
        given = {
            "job": "generate",
            "model": "hf",
            "model.path": self.model,
            "dataset.path": self.dataset,
            "output.dir": self.output,
            "generation.max_new_tokens": 3,
            "output.part_rows": 2,
        }
        return [f"{key}={value}" for key, value in given.items() if key not in named] + list(overrides)

    def run(self, *overrides: str) -> Outcome:
        code = main(self.arguments(*overrides))
        return Outcome(code, self._capsys.readouterr().err)

    def fails(self, code: int, *overrides: str) -> str:
        """Run, expect this exit code and a message without a traceback, and no finished part."""
        outcome = self.run(*overrides)
        assert outcome.code == code, outcome.message
        assert "error: " in outcome.message
        assert "Traceback" not in outcome.message
        assert "bug" not in outcome.message
        return outcome.message

    def rows(self) -> list[dict[str, object]]:
        files = sorted((self.output / "data").glob("*.parquet"))
        return [row for file in files for row in pq.read_table(file, partitioning=None).to_pylist()]

    def changed_model(self, change: Callable[[Path], object]) -> Path:
        copy = self.folder / "model"
        shutil.copytree(self.model, copy)
        change(copy)
        return copy


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> Job:
    return Job(tmp_path, tiny_model, capsys)


def test_a_dataset_that_is_not_there(job: Job) -> None:
    message = job.fails(3, "dataset.path=nope.jsonl")
    assert "dataset.path" in message
    assert "nope.jsonl" in message
    assert not job.output.exists()


def test_an_empty_folder_as_dataset(job: Job) -> None:
    (job.folder / "empty").mkdir()
    assert "no data files" in job.fails(3, f"dataset.path={job.folder / 'empty'}")


def test_a_dataset_without_rows(job: Job) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), job.folder / "zero.parquet")
    assert "no rows" in job.fails(3, f"dataset.path={job.folder / 'zero.parquet'}")


def test_a_truncated_parquet_file(job: Job) -> None:
    path = job.folder / "cut.parquet"
    pq.write_table(pa.table({"text": ["words"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "cut.parquet" in job.fails(3, f"dataset.path={path}")


def test_a_truncated_arrow_stream_is_not_read_as_a_shorter_one(job: Job) -> None:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, pa.schema([("text", pa.string())])) as writer:
        for _ in range(3):
            writer.write_table(pa.table({"text": ["words"] * 50}))
    path = job.folder / "cut.arrow"
    path.write_bytes(sink.getvalue()[:-100])
    assert "truncated" in job.fails(3, f"dataset.path={path}")


def test_a_schema_that_changes_between_shards(job: Job) -> None:
    (job.folder / "shards").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), job.folder / "shards" / "a.parquet")
    pq.write_table(pa.table({"words": ["a"]}), job.folder / "shards" / "b.parquet")
    message = job.fails(3, f"dataset.path={job.folder / 'shards'}")
    assert "b.parquet" in message


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ text", "Correct the template"), ("{{ txet }}", "Did you mean 'text'?"), ("{% frob %}", "frob")],
)
def test_a_template_that_cannot_work(job: Job, template: str, said: str) -> None:
    message = job.fails(3, f"prompt.template={template}")
    assert "prompt.template" in message
    assert said in message


def test_a_template_that_fails_on_one_row_fails_that_row_alone(job: Job) -> None:
    rows: list[dict[str, object]] = [{"text": "a", "count": number} for number in range(ROWS)]
    outcome = job.run(f"dataset.path={job.jsonl('counts.jsonl', rows)}", "prompt.template={{ 10 // (count - 3) }}")
    assert outcome.code == 0, outcome.message
    results = {row["row"]: row for row in job.rows()}
    assert len(results) == ROWS
    assert [number for number, row in results.items() if row["finish_reason"] == "error"] == [3]
    assert "zero" in str(results[3]["error"])


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_an_over_long_prompt_is_cut(job: Job, truncation: str) -> None:
    outcome = job.run(f"prompt.truncation={truncation}", "prompt.max_tokens=4")
    assert outcome.code == 0, outcome.message
    assert {row["prompt_tokens"] for row in job.rows()} == {4}


def test_an_over_long_prompt_becomes_a_row_with_an_error(job: Job) -> None:
    long: list[dict[str, object]] = [{"text": "short"}, {"text": "long " * 50}]
    outcome = job.run(f"dataset.path={job.jsonl('l.jsonl', long)}", "prompt.truncation=error", "prompt.max_tokens=20")
    assert outcome.code == 0, outcome.message
    assert {row["row"]: row["finish_reason"] for row in job.rows()} == {0: "length", 1: "error"}


def test_ids_that_are_there_twice(job: Job) -> None:
    rows: list[dict[str, object]] = [{"text": "a", "key": "x"}, {"text": "b", "key": "x"}]
    message = job.fails(3, f"dataset.path={job.jsonl('twice.jsonl', rows)}", "dataset.id_column=key")
    assert "'x'" in message


def test_a_column_to_carry_that_is_not_there(job: Job) -> None:
    assert "'titel'" in job.fails(2, "output.columns=[titel]")


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def garble(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"not safetensors " * 100)


def reconfigure(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove("config.json"), "config.json"),
        (remove("model-00002-of-00004.safetensors"), "model-00002-of-00004.safetensors"),
        (cut("model-00003-of-00004.safetensors"), "truncated"),
        (garble("model-00003-of-00004.safetensors"), "not a sound safetensors file"),
        (reconfigure(ffn_dim=80), "shape"),
        (reconfigure(model_type="t5", architectures=["T5ForConditionalGeneration"]), "encoder-decoder"),
        (reconfigure(model_type="optt"), "opt"),
        (remove("tokenizer.json"), "tokenizer"),
    ],
    ids=[
        "no-config",
        "missing-shard",
        "cut-shard",
        "corrupt-shard",
        "shape",
        "encoder-decoder",
        "unknown",
        "tokenizer",
    ],
)
def test_a_model_folder_with_something_wrong(job: Job, change: Callable[[Path], object], said: str) -> None:
    message = job.fails(4, f"model.path={job.changed_model(change)}")
    assert said in message
    assert str(job.folder) in message or "model " in message


def test_a_model_that_is_neither_here_nor_to_be_had(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = job.fails(4, "model.path=nobody/nothing", f"model.cache_dir={job.folder / 'cache'}")
    assert "nobody/nothing" in message
    assert "model.path=FOLDER" in message


def test_a_folder_that_belongs_to_another_run_is_left_as_it_is(job: Job) -> None:
    assert job.run().code == 0
    before = {path: path.read_bytes() for path in sorted(job.output.rglob("*")) if path.is_file()}
    message = job.fails(6, "generation.seed=5")
    assert "generation.seed" in message
    assert "lock" in {path.name for path in before}
    now = {path: path.read_bytes() for path in before if path.name != "lock"}
    assert now == {path: content for path, content in before.items() if path.name != "lock"}


def test_a_second_run_on_a_live_folder(job: Job) -> None:
    with Ledger.open(job.output, {}, part_rows=2):
        message = job.fails(6)
    assert str(os.getpid()) in message
    assert str(job.output) in message


def test_an_output_folder_that_cannot_be_made(job: Job) -> None:
    assert "output.dir" in job.fails(6, f"output.dir={job.dataset}/below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission(job: Job) -> None:
    closed = job.folder / "closed"
    closed.mkdir(mode=0o500)
    assert "output.dir" in job.fails(6, f"output.dir={closed}/out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB, where this machine lets us have one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system to fill needs the right to mount one")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_stops_the_run_and_space_lets_it_go_on(job: Job, small_disk: Path) -> None:
    job.output = small_disk / "out"
    job.dataset = job.jsonl("forty.jsonl", [{"text": f"row {number}"} for number in range(40)])
    assert job.run().code == 0
    expected = job.rows()
    shutil.rmtree(job.output)

    # Room for the folder's own files and a few of the twenty parts.
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (512 - 100) * 1024)
    message = job.fails(5)
    assert "disk is full" in message
    finished = job.rows()
    assert 0 < len(finished) < len(expected)
    assert [row for row in expected if row in finished] == finished, "what is there is whole and right"

    filler.unlink()
    assert job.run().code == 0
    assert job.rows() == expected


def test_control_c_stops_cleanly_and_the_same_command_goes_on(job: Job) -> None:
    rows: list[dict[str, object]] = [{"text": f"a longer row, number {number} " * 3} for number in range(100)]
    overrides = [f"dataset.path={job.jsonl('many.jsonl', rows)}", "generation.max_new_tokens=24", "offload.slots=4"]
    command = [sys.executable, "-m", "flexbatch", *job.arguments(*overrides)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while not list(job.output.glob("data/*.parquet")):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=60)
    assert process.returncode == 130, message
    assert "Traceback" not in message
    stopped = job.rows()
    assert 0 < len(stopped) < len(rows)
    assert job.run(*overrides).code == 0
    resumed = job.rows()
    assert len({row["id"] for row in resumed}) == len(resumed) == len(rows)
    assert [row for row in resumed if row in stopped] == stopped
