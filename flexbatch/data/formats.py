"""How each file format is inspected and read: Arrow IPC file and stream, Parquet, JSONL, CSV.

A shard is read in batches of at most `BATCH_ROWS` rows, so memory is bounded by one record batch (Arrow), one page per
column (Parquet) or one batch of lines, whatever the shard's size.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flexbatch.data import arrow_framing
from flexbatch.data.columns import ColumnType, Inference, canonical
from flexbatch.data.sources import SourceFile
from flexbatch.errors import DataError

BATCH_ROWS = 256
INFERENCE_ROWS = 10_000  # records from which a JSONL shard's column types are inferred
COUNTED_BYTES = 64 << 20  # text files up to this size are counted row by row for `rows`
LONGEST_CSV_FIELD = 256 << 20  # an unclosed quote would otherwise swallow the whole file

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """What inspection tells of a shard. `rows` is None where counting would mean reading a big file."""

    columns: Mapping[str, ColumnType]
    rows: int | None


def inspect(file: SourceFile) -> ShardLayout:
    """Columns and rows of one shard, and a check that it is whole as far as that costs little.

    Raises:
        DataError: truncated, corrupt, or not of its format.
    """
    with _explained(file):
        return _INSPECTORS[file.format](file)


def read(file: SourceFile) -> Iterator[list[Record]]:
    """The shard's records in batches; each record has the shard's columns.

    Raises:
        DataError: the shard turns out to be damaged; the message names the line where the format has lines.
    """
    with _explained(file):
        yield from _READERS[file.format](file)


@contextmanager
def _explained(file: SourceFile) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise DataError(
            f"dataset.path: '{file.url}' may not be read: {error.strerror}.", remedy="Check the file's permissions."
        ) from error
    except (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"dataset.path: '{file.url}' cannot be read as {file.format}: {reason}",
            remedy="The file is damaged, truncated or of another format: write it again, or set dataset.format.",
        ) from error


def _uncompressed(file: SourceFile) -> Any:
    if file.compressed:
        raise DataError(
            f"dataset.path: '{file.url}' is a compressed {file.format} file.",
            remedy="Decompress it; Arrow and Parquet compress inside the file.",
        )
    return file.open()


# Arrow IPC


def _open_arrow(binary: Any) -> tuple[Any, bool]:
    """(reader, whether it is the file format). The suffix says nothing: `datasets` saves streams as .arrow."""
    is_file = binary.read(len(arrow_framing.FILE_MAGIC)) == arrow_framing.FILE_MAGIC
    binary.seek(0)
    return (pa.ipc.open_file(binary) if is_file else pa.ipc.open_stream(binary)), is_file


def _inspect_arrow(file: SourceFile) -> ShardLayout:
    with _uncompressed(file) as binary:
        reader, is_file = _open_arrow(binary)
        columns = _typed_columns(file, reader.schema)
        try:
            layout = arrow_framing.measure_stream(binary, file.size, start=8 if is_file else 0)
        except arrow_framing.Truncated as error:
            raise DataError(
                f"dataset.path: the Arrow stream '{file.url}' is truncated: {error}.",
                remedy="Copy or write the file again; what came after that is missing.",
            ) from error
        if not is_file and layout.end != file.size:
            raise DataError(
                f"dataset.path: '{file.url}' goes on for {file.size - layout.end} bytes after the end of its stream.",
                remedy="Streams cannot be joined by joining their files: keep one file for each.",
            )
        return ShardLayout(columns, layout.rows)


def _read_arrow(file: SourceFile) -> Iterator[list[Record]]:
    with _uncompressed(file) as binary:
        reader, is_file = _open_arrow(binary)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
        yield from _slices(batches)


def _slices(batches: Iterator[Any]) -> Iterator[list[Record]]:
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS).to_pylist()


def _typed_columns(file: SourceFile, schema: Any) -> dict[str, ColumnType]:
    _check_names(file, schema.names)
    return {field.name: canonical(field.type) for field in schema}


def _check_names(file: SourceFile, names: list[str]) -> None:
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DataError(
            f"dataset.path: '{file.url}' has two columns named '{doubled[0]}'.", remedy="Rename one of them."
        )


# Parquet


def _inspect_parquet(file: SourceFile) -> ShardLayout:
    with _uncompressed(file) as binary:
        parquet = pq.ParquetFile(binary)
        return ShardLayout(_typed_columns(file, parquet.schema_arrow), parquet.metadata.num_rows)


def _read_parquet(file: SourceFile) -> Iterator[list[Record]]:
    with _uncompressed(file) as binary:
        # Without pre-buffering a row group is read page by page, not whole.
        parquet = pq.ParquetFile(binary, buffer_size=1 << 20, pre_buffer=False)
        yield from _slices(parquet.iter_batches(batch_size=BATCH_ROWS, use_threads=False))


# JSON lines


def _json_records(file: SourceFile) -> Iterator[Record]:
    with file.open() as binary:
        for number, line in enumerate(binary, 1):
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                line = line[len(codecs.BOM_UTF8) :]
            if line.strip():
                yield _parse_line(file, number, line)


def _parse_line(file: SourceFile, number: int, line: bytes) -> Record:
    where = f"dataset.path: '{file.url}', line {number}:"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        array = " The file looks like one JSON array, not JSON lines." if line.lstrip().startswith(b"[") else ""
        raise DataError(
            f"{where} not valid JSON ({error}).{array}", remedy="Correct or remove the line: one JSON object per line."
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where} a JSON {type(record).__name__}, not an object.", remedy="Write one JSON object per line."
        )
    return record


def _inspect_json(file: SourceFile) -> ShardLayout:
    return ShardLayout(infer_columns(_json_records(file)), _count(file, lambda: _count_lines(file)))


def infer_columns(records: Iterator[Record]) -> dict[str, ColumnType]:
    """Column types from the first `INFERENCE_ROWS` records, read in batches."""
    inference = Inference()
    for batch in batched(itertools.islice(records, INFERENCE_ROWS)):
        inference.add(batch)
    return inference.columns()


def _count_lines(file: SourceFile) -> int:
    with file.open() as binary:
        return sum(1 for line in binary if line.strip())


def _count(file: SourceFile, count: Callable[[], int]) -> int | None:
    return count() if file.size <= (COUNTED_BYTES // 8 if file.compressed else COUNTED_BYTES) else None


def batched(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Lists of `BATCH_ROWS` records."""
    while batch := list(itertools.islice(records, BATCH_ROWS)):
        yield batch


# CSV


def _csv_records(file: SourceFile) -> Iterator[list[str]]:
    """The header, then the rows, all as wide as the header. Every value is the string that the file holds."""
    csv.field_size_limit(LONGEST_CSV_FIELD)
    with file.open() as binary:
        text = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
        lines = csv.reader(text, delimiter="\t" if ".tsv" in file.path.lower() else ",", strict=True)
        header: list[str] | None = None
        try:
            for values in lines:
                if not values:
                    continue  # a blank line
                header = header or values
                if len(values) != len(header):
                    raise DataError(
                        f"dataset.path: '{file.url}', line {lines.line_num}: {len(values)} values, "
                        f"where the header has {len(header)} columns.",
                        remedy="Correct the line; a value with a comma or a line break needs double quotes.",
                    )
                yield values
        except csv.Error as error:
            raise DataError(
                f"dataset.path: '{file.url}', line {lines.line_num}: {error}.",
                remedy="Correct the quotes there; a quote inside a quoted value is written twice.",
            ) from error


def _inspect_csv(file: SourceFile) -> ShardLayout:
    header = next(_csv_records(file), None)
    if header is None:
        raise DataError(f"dataset.path: '{file.url}' has no header line.", remedy="Write the column names first.")
    _check_names(file, header)
    rows = _count(file, lambda: sum(1 for _ in _csv_records(file)) - 1)
    return ShardLayout({name: ColumnType.parse("string") for name in header}, rows)


def _read_csv(file: SourceFile) -> Iterator[list[Record]]:
    records = _csv_records(file)
    header = next(records, [])
    yield from batched(dict(zip(header, values, strict=True)) for values in records)


_INSPECTORS: dict[str, Callable[[SourceFile], ShardLayout]] = {
    "arrow": _inspect_arrow,
    "saved": _inspect_arrow,
    "parquet": _inspect_parquet,
    "jsonl": _inspect_json,
    "csv": _inspect_csv,
}
_READERS: dict[str, Callable[[SourceFile], Iterator[list[Record]]]] = {
    "arrow": _read_arrow,
    "saved": _read_arrow,
    "parquet": _read_parquet,
    "jsonl": lambda file: batched(_json_records(file)),
    "csv": _read_csv,
}
