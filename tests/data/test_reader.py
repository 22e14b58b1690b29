"""Rows: every format, every kind of path, the same identity; damaged input is told apart from short input."""

import functools
import gzip
import http.server
import io
import json
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexbatch.config import DatasetConfig
from flexbatch.data.reader import Source, describe_source, read_rows
from flexbatch.errors import ConfigError, DataError
from flexbatch.records import Row

TEXTS = ["one", "two, with a comma", 'three "quoted"', "four\nlines", "fünf"]
TABLE = pa.table({"text": TEXTS, "label": pa.array(["1", "2", "3", "4", "5"])})


def write_stream(path: Path, table: pa.Table = TABLE, rows: int = 2) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_file(path: Path, table: pa.Table = TABLE, rows: int = 2) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_parquet(path: Path, table: pa.Table = TABLE) -> None:
    pq.write_table(table, path, row_group_size=2)


def write_jsonl(path: Path, table: pa.Table = TABLE) -> None:
    text = "".join(json.dumps(record) + "\n" for record in table.to_pylist())
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_csv(path: Path, table: pa.Table = TABLE) -> None:
    table.to_pandas().to_csv(path, index=False)


WRITERS = {
    "a.arrow": write_stream,
    "b.arrow": write_file,
    "c.parquet": write_parquet,
    "d.jsonl": write_jsonl,
    "e.jsonl.gz": write_jsonl,
    "f.csv": write_csv,
    "g.csv.gz": write_csv,
}


def read(path: Any, **options: Any) -> list[Row]:
    return list(read_rows(DatasetConfig(path=path, **options)))


def fails(path: Any, **options: Any) -> str:
    """The message; whatever goes wrong with a dataset is a DataError with a remedy."""
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert caught.value.remedy
    return str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    rows = read(str(tmp_path / name))
    assert [row.fields for row in rows] == TABLE.to_pylist()
    assert [(row.shard, row.row) for row in rows] == [(name, number) for number in range(5)]
    assert rows[3].id == f"{name}:3"
    assert describe_source(DatasetConfig(path=str(tmp_path / name))).rows == 5


@pytest.mark.parametrize("name", ["a.arrow", "b.arrow", "c.parquet", "d.jsonl"])
def test_the_format_is_found_without_the_right_suffix(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / "data")
    assert len(read(str(tmp_path / "data"))) == 5


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_shard_is_read_whole_whatever_its_batches(tmp_path: Path, batch: int) -> None:
    table = pa.table({"n": range(1000), "tag": pa.array(["x", "y"] * 500).dictionary_encode()})
    write_stream(tmp_path / "s.arrow", table, batch)
    write_file(tmp_path / "f.arrow", table, batch)
    for name in ("s.arrow", "f.arrow"):
        source = Source.open(DatasetConfig(path=str(tmp_path / name)))
        assert [row.fields["n"] for row in source.rows()] == list(range(1000))
        assert source.describe().rows == 1000
        assert source.columns["tag"].name == "string"


def shards(folder: Path) -> None:
    for split in ("b", "a"):
        (folder / split).mkdir(parents=True)
        for number in (1, 0):
            write_parquet(folder / split / f"part-{number}.parquet", TABLE.slice(number * 2, 2))
    (folder / "README.md").write_text("not data")
    (folder / "_SUCCESS").write_text("")
    (folder / ".hidden.parquet").write_bytes(b"")


def test_folder_glob_and_list_give_the_same_rows_with_the_same_identity(tmp_path: Path) -> None:
    shards(tmp_path / "set")
    wanted = ["a/part-0.parquet", "a/part-1.parquet", "b/part-0.parquet", "b/part-1.parquet"]
    by_folder = read(str(tmp_path / "set"))
    assert [row.shard for row in by_folder[::2]] == wanted
    assert read(str(tmp_path / "set" / "*" / "*.parquet")) == by_folder
    assert read([str(tmp_path / "set" / name) for name in wanted]) == by_folder
    assert read(f"file://{tmp_path}/set") == by_folder


def test_moving_a_dataset_changes_neither_identity_nor_fingerprint(tmp_path: Path) -> None:
    shards(tmp_path / "here")
    shards(tmp_path / "there" / "deeper")
    here, there = (str(tmp_path / name) for name in ("here", "there/deeper"))
    assert read(here) == read(there)
    before = describe_source(DatasetConfig(path=here)).fingerprint()
    assert before == describe_source(DatasetConfig(path=there)).fingerprint()
    write_parquet(tmp_path / "here" / "a" / "part-0.parquet", TABLE.slice(1, 2))
    assert before != describe_source(DatasetConfig(path=here)).fingerprint()


def test_fsspec_urls_are_read() -> None:
    memory = fsspec.filesystem("memory")
    for number in range(2):
        buffer = io.BytesIO()
        with pa.ipc.new_stream(buffer, TABLE.schema) as writer:
            writer.write_table(TABLE)
        memory.pipe(f"/set/{number}.arrow", buffer.getvalue())
        memory.pipe(f"/lines/{number}.jsonl", b'{"text": "a"}\n' * 3)
    assert [row.shard for row in read("memory://set")] == ["0.arrow"] * 5 + ["1.arrow"] * 5
    assert len(read("memory://lines/*.jsonl")) == 6
    assert len(read(["memory://lines/0.jsonl", "memory://lines/1.jsonl"], limit=4)) == 4


def test_a_saved_dataset_is_read_in_its_order(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_dict({"n": list(range(10))})
    whole.select(range(9, -1, -1)).save_to_disk(str(tmp_path / "one"), num_shards=3)
    assert [row.fields["n"] for row in read(str(tmp_path / "one"))] == list(range(9, -1, -1))
    both = datasets.DatasetDict(train=whole, test=whole.select([3]))
    both.save_to_disk(str(tmp_path / "both"))
    assert [row.fields["n"] for row in read(str(tmp_path / "both"), split="test")] == [3]
    assert len(read(str(tmp_path / "both"), split="train", format="saved")) == 10
    assert "train, test" in fails(str(tmp_path / "both"))
    assert "'dev'" in fails(str(tmp_path / "both"), split="dev")


def test_a_saved_dataset_without_one_of_its_files_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"n": list(range(10))}).save_to_disk(str(tmp_path / "one"), num_shards=3)
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    assert "data-00001-of-00003.arrow" in fails(str(tmp_path / "one"))


def test_the_datasets_library_loads_what_format_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "repo").mkdir()
    write_parquet(tmp_path / "repo" / "train.parquet")
    write_parquet(tmp_path / "repo" / "test.parquet", TABLE.slice(0, 1))
    rows = read(str(tmp_path / "repo"), format="hub", split="train")
    assert [row.fields for row in rows] == TABLE.to_pylist()
    assert rows[2].id == "train:2"
    assert "train, test" in fails(str(tmp_path / "repo"), format="hub")


def test_a_hub_that_does_not_answer_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    message = fails("nobody/nothing")
    assert "dataset.path: 'nobody/nothing'" in message
    assert "127.0.0.1:1" in message
    assert "local path" in message


def test_memory_is_bounded_by_a_batch(tmp_path: Path) -> None:
    rows, text = 20_000, "x" * 1000
    table = pa.table({"text": [text] * rows})
    write_stream(tmp_path / "a.arrow", table, 500)
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=rows, use_dictionary=False, compression="none")
    write_jsonl(tmp_path / "c.jsonl", table)
    for name in ("a.arrow", "b.parquet", "c.jsonl"):
        tracemalloc.start()
        arrow_before = pa.total_allocated_bytes()
        arrow_peak = count = 0
        for _ in read_rows(DatasetConfig(path=str(tmp_path / name))):
            count += 1
            if count % 500 == 0:
                arrow_peak = max(arrow_peak, pa.total_allocated_bytes() - arrow_before)
        _, python_peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == rows
        assert python_peak < 5 << 20, name  # the shard is 20 MB
        assert arrow_peak < 8 << 20, name


def test_limit_stops_after_so_many_rows(tmp_path: Path) -> None:
    shards(tmp_path / "set")
    assert len(read(str(tmp_path / "set"), limit=3)) == 3
    assert len(read(str(tmp_path / "set"), limit=100)) == 8
    assert describe_source(DatasetConfig(path=str(tmp_path / "set"), limit=3)).rows == 3


def test_split_filters_files_by_their_split_column_and_keeps_row_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"n": n, "split": "test" if n % 2 else "train"}) + "\n" for n in range(6)))
    assert [row.row for row in read(str(path), split="test", limit=2)] == [1, 3]
    assert describe_source(DatasetConfig(path=str(path), split="test")).rows is None
    assert "no rows with split 'dev'" in fails(str(path), split="dev")
    write_parquet(tmp_path / "b.parquet")
    assert "no column 'split'" in fails(str(tmp_path / "b.parquet"), split="test")


def test_an_id_column_names_the_rows(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv")
    assert [row.id for row in read(str(tmp_path / "a.csv"), id_column="label")] == ["1", "2", "3", "4", "5"]
    message = fails(str(tmp_path / "a.csv"), id_column="labl")
    assert "dataset.id_column" in message
    assert "Did you mean 'label'" in message


def test_doubled_ids_are_refused_with_both_places(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pa.table({"key": range(3000)}))
    write_parquet(tmp_path / "b.parquet", pa.table({"key": [-1, 17]}))
    message = fails(str(tmp_path), id_column="key")
    assert "'17'" in message
    assert "row 17 of 'a.parquet'" in message
    assert "row 1 of 'b.parquet'" in message
    assert len(read(str(tmp_path), id_column="key", limit=3001)) == 3001  # the double is never reached


@pytest.mark.parametrize("value", [None, 1.5, ["x"], True, "\ud800"])
def test_an_id_that_is_no_string_or_integer_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"key": "a"}) + "\n" + json.dumps({"key": value}) + "\n")
    assert "row 1 of 'a.jsonl'" in fails(str(tmp_path / "a.jsonl"), id_column="key")


# Damage


@pytest.mark.parametrize("path", ["/nowhere/at/all.jsonl", "./missing", "missing.parquet", "no/such/*.arrow"])
def test_a_missing_path_is_named(path: str) -> None:
    message = fails(path)
    assert "dataset.path" in message
    assert path in message


def test_no_path_is_an_error_of_configuration() -> None:
    for path in ("", [], [""], None):
        with pytest.raises(ConfigError, match=r"dataset\.path"):
            read(path)


def test_an_empty_folder_or_one_without_data_is_refused(tmp_path: Path) -> None:
    assert "holds no data files" in fails(str(tmp_path))
    (tmp_path / "notes.txt").write_text("text")
    assert "1 other files" in fails(str(tmp_path))


def test_a_folder_with_two_formats_is_refused_and_one_can_be_chosen(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv")
    write_parquet(tmp_path / "a.parquet")
    assert "csv, parquet" in fails(str(tmp_path))
    assert len(read(str(tmp_path), format="csv")) == 5


@pytest.mark.parametrize("name", WRITERS)
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert "is empty (0 bytes)" in fails(str(tmp_path / name))


@pytest.mark.parametrize("name", WRITERS)
def test_a_dataset_without_rows_is_refused(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, TABLE.slice(0, 0))
    message = fails(str(tmp_path / name))
    assert "has no rows" in message or "is empty" in message


@pytest.mark.parametrize("is_file", [False, True])
def test_an_arrow_shard_cut_anywhere_is_refused_before_the_first_row(tmp_path: Path, is_file: bool) -> None:
    whole = tmp_path / "whole.arrow"
    (write_file if is_file else write_stream)(whole)
    content = whole.read_bytes()
    for length in {*range(1, len(content), 5), *range(len(content) - 40, len(content))}:
        (tmp_path / "cut.arrow").write_bytes(content[:length])
        with pytest.raises(DataError, match=r"cut\.arrow"):
            Source.open(DatasetConfig(path=str(tmp_path / "cut.arrow")))


def test_a_truncated_stream_is_refused_even_where_its_last_bytes_look_like_an_end(tmp_path: Path) -> None:
    table = pa.table({"n": pa.array([0xFFFFFFFF] * 8, pa.int64())})
    write_stream(tmp_path / "a.arrow", table, 8)
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content[:-8])
    assert content[:-8].endswith(content[-8:])
    message = fails(str(tmp_path / "a.arrow"))
    assert "truncated" in message
    assert "after 8 rows" in message


@pytest.mark.parametrize("cut", [4, 100, 300])
def test_truncated_parquet_is_refused(tmp_path: Path, cut: int) -> None:
    write_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-cut])
    assert "a.parquet" in fails(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["e.jsonl.gz", "g.csv.gz"])
def test_truncated_gzip_is_refused(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    assert name in fails(str(tmp_path / name))


@pytest.mark.parametrize("line", ['{"text": "cut', "[1, 2]", "plain", '{"text": "\\x"}', '{"text": "\xff"}'])
def test_a_malformed_json_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n\n' + line.encode("latin-1") + b'\n{"text": "ok"}\n')
    assert "line 3" in fails(str(tmp_path / "a.jsonl"))


def test_a_bad_line_far_down_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n' * 5000 + "{\n")
    assert "line 5001" in fails(str(tmp_path / "a.jsonl"))


def test_a_ragged_csv_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,2,3\n")
    message = fails(str(tmp_path / "a.csv"))
    assert "line 3" in message
    assert "3 values" in message
    (tmp_path / "b.csv").write_text('text,label\na,1\n"b,2\n')
    assert "b.csv" in fails(str(tmp_path / "b.csv"))


def test_a_long_document_fits_in_a_csv_field(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 1_000_000 + "\n")
    assert len(read(str(tmp_path / "a.csv"))[0].fields["text"]) == 1_000_000


def test_a_type_that_changes_between_shards_is_named_with_both_shards(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pa.table({"text": ["a"], "n": pa.array([None], pa.null())}))
    write_parquet(tmp_path / "b.parquet", pa.table({"text": ["a"], "n": [1]}))
    write_parquet(tmp_path / "c.parquet", pa.table({"text": ["a"], "n": ["x"]}))
    message = fails(str(tmp_path))
    for part in ("column 'n'", "int64", "string", "b.parquet", "c.parquet"):
        assert part in message


def test_a_column_that_is_missing_in_a_shard_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv")
    write_csv(tmp_path / "b.csv", TABLE.drop_columns(["label"]))
    message = fails(str(tmp_path))
    for part in ("'label'", "a.csv", "b.csv"):
        assert part in message


def test_a_column_may_be_null_in_one_shard(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pa.table({"text": ["a"], "n": pa.array([None], pa.null())}))
    write_parquet(tmp_path / "b.parquet", pa.table({"text": ["b"], "n": [1]}))
    source = Source.open(DatasetConfig(path=str(tmp_path)))
    assert source.columns["n"].name == "int64"
    assert [row.fields["n"] for row in source.rows()] == [None, 1]


def test_json_records_may_lack_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "n": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "c", "n": 2.5}\n')
    source = Source.open(DatasetConfig(path=str(tmp_path)))
    assert source.columns["n"].name == "double"
    assert [row.fields["n"] for row in source.rows()] == [None, 1, 2.5]


def test_a_json_column_that_is_null_for_long_is_still_a_column(tmp_path: Path) -> None:
    lines = ['{"text": "a", "more": null}\n'] * 600 + [
        '{"text": "a", "more": 5, "late": {"a": 1}}\n',
        '{"late": {"b": 2}}\n',
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "b.jsonl").write_text('{"text": null}\n')
    columns = Source.open(DatasetConfig(path=str(tmp_path))).columns
    assert {name: kind.name for name, kind in columns.items()} == {
        "text": "string",
        "more": "int64",
        "late": "struct<a: int64, b: int64>",
    }
    assert Source.open(DatasetConfig(path=str(tmp_path / "b.jsonl"))).columns["text"].name == "string"


def test_a_web_address_is_read(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads web addresses with aiohttp")
    write_jsonl(tmp_path / "a.jsonl")
    write_parquet(tmp_path / "b.parquet")
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert [row.id for row in read(f"{address}/a.jsonl", limit=2)] == ["a.jsonl:0", "a.jsonl:1"]
        assert len(read(f"{address}/b.parquet")) == 5
        assert "names nothing that exists" in fails(f"{address}/missing.jsonl")
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        pass


def test_a_type_that_changes_between_json_shards_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": {"en": "b"}}\n')
    message = fails(str(tmp_path))
    assert "column 'text' is string in 'a.jsonl' and struct<en: string> in 'b.jsonl'" in message


def test_the_same_file_named_twice_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv")
    assert "twice" in fails([str(tmp_path / "a.csv"), f"{tmp_path}/./a.csv"])


def test_csv_values_stay_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n\n1.50,007\nNA,\n")
    assert [row.fields for row in read(str(tmp_path / "a.csv"))] == [
        {"text": "1.50", "n": "007"},
        {"text": "NA", "n": ""},
    ]
