"""Parts: whole, of one schema, readable by every Parquet reader as soon as they are there."""

import shutil
import sys
import textwrap
from pathlib import Path

import datasets
import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from data.support import completion, output_of, parts, prompt, start_python
from flexbatch.data.columns import ColumnType
from flexbatch.data.writer import PartWriter, count_rows, list_parts
from flexbatch.errors import ConfigError, OutputError
from flexbatch.records import Completion, Part, Prompt, Row

FIXED = {
    "id": pa.string(),
    "shard": pa.string(),
    "row": pa.int64(),
    "prompt_tokens": pa.int32(),
    "completion": pa.string(),
    "completion_ids": pa.list_(pa.int32()),
    "finish_reason": pa.string(),
    "error": pa.string(),
    "logprobs": pa.list_(pa.float32()),
}


def rows_by_every_reader(data: Path, cache: Path) -> dict[str, list[str]]:
    glob = str(data / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=glob, split="train", cache_dir=str(cache))
    return {
        "pandas": sorted(pd.read_parquet(data)["id"]),
        "polars": sorted(pl.read_parquet(glob)["id"]),
        "polars folder": sorted(pl.read_parquet(data)["id"]),
        "duckdb": sorted(row[0] for row in duckdb.sql(f"select id from '{glob}'").fetchall()),
        "pyarrow": sorted(pads.dataset(data).to_table()["id"].to_pylist()),
        "datasets": sorted(loaded["id"]),
        "datasets streamed": sorted(
            row["id"] for row in datasets.load_dataset("parquet", data_files=glob, split="train", streaming=True)
        ),
    }


def test_every_reader_reads_the_folder_after_each_part(tmp_path: Path) -> None:
    kinds = {"label": ColumnType(pa.int64()), "unknown": ColumnType(pa.null()), "tags": ColumnType(pa.list_(pa.null()))}
    writer = PartWriter(tmp_path / "run", carried=kinds)
    assert not (tmp_path / "run" / "data").exists()  # it comes with the first part
    seen: list[str] = []
    for part in parts(10, 4):
        writer.write(part)
        seen += [prompt.row.id for prompt, _ in part.rows]
        for reader, ids in rows_by_every_reader(tmp_path / "run" / "data", tmp_path / "cache").items():
            assert ids == sorted(seen), reader
    assert list((tmp_path / "run" / "_tmp").iterdir()) == []


def test_the_schema_is_the_fixed_columns_then_what_was_asked_for(tmp_path: Path) -> None:
    writer = PartWriter(
        tmp_path,
        carried={"label": ColumnType(pa.int16()), "empty": ColumnType(pa.null())},
        extra={"exact_match": "float64", "fields": "struct<total: string, items: list<string>>"},
        several_completions=True,
    )
    part = Part(0, 0, ((prompt(0, label=3), completion(0)),))
    path = writer.write(part, [{"exact_match": 1.0, "fields": {"total": "5", "items": ["a"]}}])
    schema = pq.read_schema(path)
    assert dict(zip(schema.names[:9], schema.types[:9], strict=True)) == FIXED
    assert schema.names[9:] == ["label", "empty", "completion_index", "exact_match", "fields"]
    assert schema.field("label").type == pa.int16()
    assert schema.field("empty").type == pa.string()
    (record,) = pq.read_table(path).to_pylist()
    assert record["label"] == 3
    assert record["fields"] == {"total": "5", "items": ["a"]}
    assert record["completion_ids"] == [0, 1]
    assert record["logprobs"] == [-0.5, -0.25]
    assert record["prompt_tokens"] == 1


def test_a_row_that_could_not_be_run_is_a_row_with_its_reason(tmp_path: Path) -> None:
    failed = Prompt(Row("a", "s", 0, {}), (), error="the template failed: \ud800")
    path = PartWriter(tmp_path).write(Part(0, 0, ((failed, Completion(0, (), "", "error")),)))
    (record,) = pq.read_table(path).to_pylist()
    assert record["finish_reason"] == "error"
    assert record["error"] == "the template failed: ?"
    assert record["completion_ids"] == []


def test_a_part_written_twice_is_the_same_file(tmp_path: Path) -> None:
    (part,) = parts(3, 4)
    first = PartWriter(tmp_path / "a").write(part).read_bytes()
    again = PartWriter(tmp_path / "a")
    assert again.write(part).read_bytes() == first
    assert PartWriter(tmp_path / "b").write(part).read_bytes() == first


def test_a_part_without_rows_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        PartWriter(tmp_path).write(Part(0, 0, ()))
    assert not (tmp_path / "data").exists()


def test_a_carried_column_with_a_name_of_ours_is_refused(tmp_path: Path) -> None:
    for name, more in [("completion", {}), ("score", {"extra": {"score": "float64"}})]:
        with pytest.raises(ConfigError, match=rf"output\.columns: '{name}'"):
            PartWriter(tmp_path, carried={name: ColumnType(pa.string())}, **more)
    with pytest.raises(ConfigError, match="not a column type"):
        PartWriter(tmp_path, extra={"score": "float"})


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    path = PartWriter(tmp_path).write(parts(3, 4)[0])
    assert list_parts(tmp_path) == {0: path}
    assert count_rows(path) == 3
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OutputError, match=r"part-00000\.parquet' is damaged"):
        count_rows(path)


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    from data.support import parts
    from flexbatch.data.writer import PartWriter
    from flexbatch.errors import CapacityError
    writer = PartWriter(Path(sys.argv[1]))
    first, second = parts(2000, 1990)
    writer.write(second)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # a write beyond it fails half-way
    try:
        writer.write(first)
    except CapacityError as error:
        print(error)
"""


def test_a_disk_that_fills_in_the_middle_of_a_part_leaves_the_earlier_parts_and_nothing_else(tmp_path: Path) -> None:
    output = output_of(start_python(FULL_DISK, str(tmp_path)))
    assert "the disk is full" in output
    assert "run the same command again" in output
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["part-00001.parquet"]
    assert list((tmp_path / "_tmp").iterdir()) == []
    assert count_rows(tmp_path / "data" / "part-00001.parquet") == 10


MOUNT = "mount -t tmpfs -o size=200k none '{0}' || echo cannot mount; exec '{1}' -c \"$PROGRAM\" '{0}'"
FULL_TMPFS = FULL_DISK.replace(
    "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))",
    "(Path(sys.argv[1]) / 'ballast').write_bytes(bytes(180 << 10))",
)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare (util-linux)")
def test_a_file_system_that_is_really_full_too(tmp_path: Path) -> None:
    script = MOUNT.format(tmp_path, sys.executable)
    process = start_python(
        "import os, sys; os.execvp('unshare', ['unshare', '--mount', '--map-root-user', 'sh', '-c', sys.argv[1]])",
        script,
        extra={"PROGRAM": textwrap.dedent(FULL_TMPFS)},
    )
    output = output_of(process)
    if "cannot mount" in output:
        pytest.skip("needs the right to mount a file system")
    assert "the disk is full" in output
    assert "No space left on device" in output


NOT_ALLOWED = """
    import os, sys
    from pathlib import Path
    from data.support import parts
    from flexbatch.data.writer import PartWriter
    from flexbatch.errors import OutputError
    if os.geteuid() == 0:
        os.seteuid(65534)  # the superuser may write everywhere
    try:
        PartWriter(Path(sys.argv[1])).write(parts(3, 4)[0])
    except OutputError as error:
        print(error)
"""


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"output\.dir: .*file"):
        PartWriter(tmp_path / "file").write(parts(3, 4)[0])


def test_a_folder_without_write_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o500)
    output = output_of(start_python(NOT_ALLOWED, str(tmp_path)))
    assert "output.dir" in output
    assert "Permission denied" in output
