"""What a mistake gets: the key or file, the value and the remedy in a few lines, an exit code, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.stages.work import SCANNED_ROWS
from tests.pipeline.command_line import CommandLine, Finished
from tests.pipeline.conftest import write_rows
from tests.pipeline.jobs import output_rows, overrides, part_files

CONFIG, DATA, MODEL, CAPACITY, OUTPUT, ENGINE = 2, 3, 4, 5, 6, 7  # exit codes, see errors.py
SHORT = {"generation__max_new_tokens": 4, "output__part_rows": 8, "offload__slots": 4}


def assert_refused(finished: Finished, code: int, *said: str) -> None:
    assert finished.code == code, finished.err
    for text in said:
        assert text in finished.err, finished.err
    assert "Traceback" not in finished.err
    assert "a bug in flexbatch" not in finished.err
    last = finished.err[finished.err.index("error: ") :].splitlines()  # a run under way has said other things before
    assert 2 <= len(last) <= 4, finished.err  # what is wrong, and what to do


# The dataset


def rows_file(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def truncated_arrow(folder: Path) -> Path:
    folder.mkdir()
    table = pa.table({"text": [f"row {number}" for number in range(500)]})
    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    content = (folder / "a.arrow").read_bytes()
    (folder / "a.arrow").write_bytes(content[: len(content) // 2])
    return folder


def no_rows(folder: Path) -> Path:
    folder.mkdir()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "a.parquet")
    return folder


def changed_schema(folder: Path) -> Path:
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), folder / "a.parquet")
    pq.write_table(pa.table({"text": ["b"], "label": ["one"]}), folder / "b.parquet")
    return folder


def doubled_ids(folder: Path) -> Path:
    return rows_file(folder, "a.jsonl", '{"text": "x", "name": "one"}\n{"text": "y", "name": "one"}\n')


DATASETS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "missing": (lambda folder: folder / "nowhere.jsonl", ["dataset.path", "nowhere.jsonl"]),
    "empty folder": (lambda folder: folder.mkdir() or folder, ["dataset.path", "data"]),
    "empty file": (lambda folder: rows_file(folder, "a.jsonl", ""), ["dataset.path", "a.jsonl"]),
    "truncated": (truncated_arrow, ["dataset.path", "a.arrow", "truncated"]),
    "ragged": (lambda folder: rows_file(folder, "a.csv", "text,label\nx,1\ny\n"), ["a.csv", "line 3"]),
    "malformed line": (lambda folder: rows_file(folder, "a.jsonl", '{"text": "x"}\n{"text": \n'), ["line 2"]),
    "no such format": (lambda folder: rows_file(folder, "a.docx", "x"), ["dataset.path", "a.docx"]),
    "no rows": (no_rows, ["dataset.path", "no rows"]),
    "changed schema": (changed_schema, ["label", "a.parquet", "b.parquet"]),
}


@pytest.mark.parametrize("case", DATASETS)
def test_a_dataset_that_cannot_be_read(case: str, command_line: CommandLine, small_model: Path, tmp_path: Path) -> None:
    make, said = DATASETS[case]
    path = make(tmp_path / "data")
    finished = command_line.run(*overrides(small_model, path, tmp_path / "run", **SHORT), cwd=tmp_path)
    assert_refused(finished, DATA, *said)
    assert not (tmp_path / "run").exists()


def test_ids_that_are_not_unique(command_line: CommandLine, small_model: Path, tmp_path: Path) -> None:
    command = overrides(small_model, doubled_ids(tmp_path / "data"), tmp_path / "run", dataset__id_column="name")
    assert_refused(command_line.run(*command, cwd=tmp_path), DATA, "dataset.id_column", "one")
    assert part_files(tmp_path / "run") == []


OPTIONS: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "template syntax": ({"prompt__template": "{{ text"}, DATA, ["prompt.template"]),
    "unknown column": ({"prompt__template": "{{ txet }}"}, DATA, ["prompt.template", "txet", "text"]),
    "missing template file": ({"prompt__template_file": "no.jinja"}, DATA, ["prompt.template_file", "no.jinja"]),
    "id column": ({"dataset__id_column": "nme"}, DATA, ["dataset.id_column", "nme", "name"]),
    "carried column": ({"output__columns": "[labl]"}, CONFIG, ["output.columns", "labl", "label"]),
    "five percentages": (
        {"offload__policy": "manual", "offload__percent": "[1,2,3,4,5]"},
        CONFIG,
        ["offload.percent", "5"],
    ),
    "percentages over 100": (
        {"offload__policy": "manual", "offload__percent": "[0,0,70,31,0,0]"},
        CONFIG,
        ["offload.percent", "70", "31"],
    ),
    "no percentages": ({"offload__policy": "manual"}, CONFIG, ["offload.percent"]),
    "no room for a prompt": (
        {"generation__max_new_tokens": 256},
        CONFIG,
        ["generation.max_new_tokens", "256"],
    ),
    "empty stop string": ({"generation__stop": "['']"}, CONFIG, ["generation.stop"]),
    "no disk folder": ({"offload__disk_dir": "/proc/nowhere"}, CONFIG, ["offload.disk_dir", "/proc/nowhere"]),
    "no cache folder": ({"model__cache_dir": "/proc/nowhere"}, CONFIG, ["model.cache_dir", "/proc/nowhere"]),
    "no column of references": (
        {"job": "summarize", "job__reference": "summery", "prompt__template": "{{ text }}"},
        CONFIG,
        ["job.reference", "summery", "text"],
    ),
    "data for scenarios": ({"job": "helm_eval"}, CONFIG, ["dataset.path", "job=helm_eval", "job.scenarios"]),
    "no such device": ({"offload__device": "cuda:9"}, CONFIG, ["offload.device", "cuda:9"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_does_not_fit(case: str, command_line: CommandLine, small_model: Path, tmp_path: Path) -> None:
    changed, code, said = OPTIONS[case]
    dataset = write_rows(tmp_path / "data", shards=1, rows=3)
    finished = command_line.run(*overrides(small_model, dataset, tmp_path / "run", **changed), cwd=tmp_path)
    assert_refused(finished, code, *said)
    assert not (tmp_path / "run").exists()


# Rows that cannot be run


def test_a_template_that_fails_on_one_row_fails_that_row_only(
    command_line: CommandLine, small_model: Path, tmp_path: Path
) -> None:
    lines = [{"text": "abc", "number": 4}, {"text": "abc", "number": 0}, {"text": "abd", "number": 2}]
    dataset = rows_file(tmp_path / "data", "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    command = overrides(
        small_model, dataset, tmp_path / "run", **SHORT, prompt__template="{{ text }} {{ 8 // number }}"
    )
    finished = command_line.run(*command, cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert "1 error" in finished.out
    rows = {row["row"]: row for row in output_rows(tmp_path / "run")}
    assert [rows[number]["finish_reason"] for number in range(3)] == ["length", "error", "length"]
    assert "zero" in rows[1]["error"]
    assert rows[1]["completion_ids"] == []
    assert rows[0]["error"] == rows[2]["error"] == ""


@pytest.mark.parametrize("truncation", ["left", "right", "error"])
def test_an_over_long_prompt(truncation: str, command_line: CommandLine, small_model: Path, tmp_path: Path) -> None:
    texts = ["a" * 30 + "b" * 30, "c" * 8]
    dataset = rows_file(tmp_path / "data", "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = SHORT | {"prompt__max_tokens": 10, "prompt__truncation": truncation}
    finished = command_line.run(*overrides(small_model, dataset, tmp_path / "run", **options), cwd=tmp_path)
    assert finished.code == 0, finished.err
    long, short = sorted(output_rows(tmp_path / "run"), key=lambda row: row["row"])
    assert short["finish_reason"] == "length"
    if truncation == "error":
        assert long["finish_reason"] == "error"
        assert "60" in long["error"]
        assert "10" in long["error"]
        assert long["completion_ids"] == []
        return
    assert long["prompt_tokens"] == 10
    kept = texts[0][-10:] if truncation == "left" else texts[0][:10]
    rows_file(tmp_path / "cut", "a.jsonl", json.dumps({"text": kept}) + "\n")
    command_line.run(*overrides(small_model, tmp_path / "cut", tmp_path / "same", **SHORT), cwd=tmp_path)
    assert long["completion_ids"] == output_rows(tmp_path / "same")[0]["completion_ids"]


def test_a_job_of_which_every_row_fails_still_ends(
    command_line: CommandLine, small_model: Path, tmp_path: Path
) -> None:
    dataset = write_rows(tmp_path / "data", shards=1, rows=20)
    command = overrides(small_model, dataset, tmp_path / "run", **SHORT, prompt__template="{{ 1 // (label - label) }}")
    finished = command_line.run(*command, cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert "20 error" in finished.out
    assert len(output_rows(tmp_path / "run")) == 20


def test_a_reader_that_fails_far_into_the_job_ends_it_and_loses_nothing(
    command_line: CommandLine, small_model: Path, tmp_path: Path
) -> None:
    """The footer of the shard is whole, a page in its middle is not: in a job that is not read through before it
    starts nobody knows until it is read.
    """
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "a.parquet"
    table = pa.table({"text": [f"{number % 7} row {number}" for number in range(SCANNED_ROWS + 1)]})
    pq.write_table(table, path, row_group_size=100, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    place = whole.index(b"row 1600")
    path.write_bytes(whole[: place - 60] + b"\xff" * 120 + whole[place + 60 :])
    options = SHORT | {"prompt__window": 16, "generation__max_new_tokens": 1, "offload__slots": 32}
    command = overrides(small_model, path, tmp_path / "run", **options)
    finished = command_line.run(*command, cwd=tmp_path)
    assert_refused(finished, DATA, "a.parquet")
    rows = output_rows(tmp_path / "run")
    assert rows, "what was generated before the damaged page is kept"
    assert len(rows) % 8 == 0
    assert "stopped by an error" in command_line.run("status", "run", cwd=tmp_path).out


# The model


def edited_shard(model: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Change the tensors of one shard in place."""
    path = sorted(model.glob("*.safetensors"))[1]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def misshape(tensors: dict[str, torch.Tensor]) -> None:
    name = min(tensors)
    tensors[name] = torch.zeros(3, 5)


def no_config(model: Path) -> list[str]:
    (model / "config.json").unlink()
    return ["config.json", str(model)]


def broken_config(model: Path) -> list[str]:
    (model / "config.json").write_text("{")
    return ["config.json"]


def missing_shard(model: Path) -> list[str]:
    shard = sorted(model.glob("*.safetensors"))[2]
    shard.unlink()
    return [shard.name]


def truncated_shard(model: Path) -> list[str]:
    shard = sorted(model.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    return [shard.name]


def corrupt_header(model: Path) -> list[str]:
    shard = min(model.glob("*.safetensors"))
    shard.write_bytes(b"\xff" * 32 + shard.read_bytes()[32:])
    return [shard.name]


def wrong_shape(model: Path) -> list[str]:
    edited_shard(model, misshape)
    return ["[3, 5]"]


def missing_tensor(model: Path) -> list[str]:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[max(tensors)]

    edited_shard(model, drop)
    return ["decoder"]


def encoder_decoder(model: Path) -> list[str]:
    (model / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    )
    return ["t5"]


def unknown_architecture(model: Path) -> list[str]:
    (model / "config.json").write_text(json.dumps({"model_type": "frobnicator"}))
    return ["frobnicator"]


def no_tokenizer(model: Path) -> list[str]:
    for path in model.glob("tokenizer*"):
        path.unlink()
    return ["tokenizer", "model.tokenizer"]


MODELS = [
    no_config, broken_config, missing_shard, truncated_shard, corrupt_header, wrong_shape, missing_tensor,
    encoder_decoder, unknown_architecture, no_tokenizer,
]  # fmt: skip


@pytest.mark.parametrize("damage", MODELS, ids=lambda damage: damage.__name__)
def test_a_model_that_cannot_be_run(
    damage: Callable[[Path], list[str]], command_line: CommandLine, small_model: Path, tmp_path: Path
) -> None:
    dataset = write_rows(tmp_path / "data", shards=1, rows=3)
    shutil.copytree(small_model, tmp_path / "model")
    said = damage(tmp_path / "model")
    finished = command_line.run(*overrides(tmp_path / "model", dataset, tmp_path / "run", **SHORT), cwd=tmp_path)
    assert_refused(finished, MODEL, *said)
    assert part_files(tmp_path / "run") == []


def test_a_run_goes_on_once_its_model_is_whole_again(
    command_line: CommandLine, small_model: Path, tmp_path: Path
) -> None:
    dataset = write_rows(tmp_path / "data", shards=1, rows=10)
    shutil.copytree(small_model, tmp_path / "model")
    missing_shard(tmp_path / "model")
    command = overrides(tmp_path / "model", dataset, tmp_path / "run", **SHORT)
    assert command_line.run(*command, cwd=tmp_path).code == MODEL
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(small_model, tmp_path / "model")
    finished = command_line.run(*command, cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert len(output_rows(tmp_path / "run")) == 10


def test_a_model_that_is_nowhere(command_line: CommandLine, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "data", shards=1, rows=3)
    for model in ("./no/such/folder", "nobody/nothing-of-this-name"):
        finished = command_line.run(*overrides(Path(model), dataset, tmp_path / "run"), cwd=tmp_path)
        assert_refused(finished, MODEL, model.removeprefix("./"))
    assert not (tmp_path / "run").exists()


# The output folder


def add_notes(path: Path, size: int, first: int = 0) -> None:
    """Give the rows from `first` on a note that does not compress below `size` bytes."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["note"] = os.urandom(size).hex() if number >= first else ""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_no_permission_to_write(command_line: CommandLine, small_model: Path, open_folder: Path) -> None:
    dataset = write_rows(open_folder / "data", shards=1, rows=3)
    shutil.copytree(small_model, open_folder / "model")
    for path in (open_folder / "model").iterdir():
        path.chmod(0o644)
    (open_folder / "closed").mkdir()
    (open_folder / "closed").chmod(0o555)
    cache = {"model__cache_dir": open_folder / "cache"}
    (open_folder / "cache").mkdir()
    (open_folder / "cache").chmod(0o777)
    command = overrides(open_folder / "model", dataset, open_folder / "closed" / "run", **SHORT, **cache)
    user = 65534 if os.geteuid() == 0 else 0  # the superuser may write everywhere
    finished = command_line.run(*command, cwd=open_folder, user=user)
    assert_refused(finished, OUTPUT, "output.dir", str(open_folder / "closed"), "Permission denied")
    assert list((open_folder / "closed").iterdir()) == []


def test_a_file_in_the_place_of_the_output_folder(command_line: CommandLine, small_model: Path, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "data", shards=1, rows=3)
    (tmp_path / "run").write_text("precious")
    finished = command_line.run(*overrides(small_model, dataset, tmp_path / "run", **SHORT), cwd=tmp_path)
    assert_refused(finished, OUTPUT, "output.dir", "run")
    assert (tmp_path / "run").read_text() == "precious"


def test_a_write_that_fails_in_the_middle_of_a_part(
    command_line: CommandLine, small_model: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: the part's first bytes are written, the next are refused."""
    dataset = write_rows(tmp_path / "data", shards=1, rows=24, longest=20)
    add_notes(dataset / "rows-0.jsonl", size=4000, first=16)
    options = SHORT | {"output__columns": "[note]", "prompt__window": 1}
    command = overrides(small_model, dataset, tmp_path / "run", **options)
    finished = command_line.run(*command, cwd=tmp_path, file_size=24 << 10)
    assert_refused(finished, CAPACITY, "the disk is full", "part-00002.parquet", "run the same command again")
    assert [path.name for path in part_files(tmp_path / "run")] == ["part-00000.parquet", "part-00001.parquet"]
    assert list((tmp_path / "run" / "_tmp").iterdir()) == []
    finished = command_line.run(*command, cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert len({row["id"] for row in output_rows(tmp_path / "run")}) == 24


@pytest.fixture(scope="module")
def small_disk() -> Iterator[tuple[CommandLine, Path]]:
    """A command line that sees, at the given path, a file system of 400 KB; outsiders see it under /proc."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare (util-linux)")
    with tempfile.TemporaryDirectory() as name:
        mount = f"mount -t tmpfs -o size=400k none '{name}' || exit 1; exec \"$@\""
        running = CommandLine(["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh"])
        if not running.ready:
            running.close()
            pytest.skip("needs the right to mount a file system")
        yield running, Path(name)
        running.close()


@pytest.mark.slow
def test_a_disk_that_fills_stops_the_run_which_goes_on_once_there_is_space(
    small_disk: tuple[CommandLine, Path], small_model: Path, tmp_path: Path
) -> None:
    running, disk = small_disk
    seen = Path(f"/proc/{running.pid}/root") / disk.relative_to("/")
    dataset = write_rows(tmp_path / "data", shards=1, rows=64)
    add_notes(dataset / "rows-0.jsonl", size=3000)
    command = overrides(small_model, dataset, disk / "run", **SHORT, output__columns="[note]")
    (seen / "ballast").write_bytes(bytes(200 << 10))
    finished = running.run(*command, cwd=tmp_path)
    assert_refused(finished, CAPACITY, "the disk is full", str(disk), "No space left on device")
    standing = [path.name for path in part_files(seen / "run")]
    assert 0 < len(standing) < 8
    assert len(output_rows(seen / "run")) == 8 * len(standing), "every part that stands is whole"
    (seen / "ballast").unlink()
    finished = running.run(*command, cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert len({row["id"] for row in output_rows(seen / "run")}) == 64


def test_a_disk_that_is_full_from_the_start(
    small_disk: tuple[CommandLine, Path], small_model: Path, tmp_path: Path
) -> None:
    running, disk = small_disk
    seen = Path(f"/proc/{running.pid}/root") / disk.relative_to("/")
    dataset = write_rows(tmp_path / "data", shards=1, rows=3)
    subprocess.run(["sh", "-c", f"cat /dev/zero > '{seen}/more ballast'"], stderr=subprocess.DEVNULL, check=False)
    finished = running.run(*overrides(small_model, dataset, disk / "other", **SHORT), cwd=tmp_path)
    (seen / "more ballast").unlink()
    assert_refused(finished, CAPACITY, "the disk is full", "Make space")
    assert part_files(seen / "other") == []


def test_nothing_hides_the_traceback_from_who_asks(
    command_line: CommandLine, small_model: Path, tmp_path: Path
) -> None:
    command = overrides(small_model, tmp_path / "nowhere", tmp_path / "run")
    finished = command_line.run(*command, cwd=tmp_path, environment={"FLEXBATCH_TRACEBACK": "1"})
    assert finished.code == DATA
    assert "Traceback" in finished.err
    assert sys.executable not in finished.out
