"""Rows from a dataset, as a stream: `read_rows` is the pipeline's first stage.

    Source.open   finds the shards and checks that all of them are whole and have the same columns, before any work
    source.rows   streams them, in a fixed order, with memory bounded by a batch

CSV has no types: its values are the strings in the file. JSONL has no schema: a column's type is that of the most of
its values in a shard's first ten thousand records; a key that is absent from a record is null, and a key that first
appears later than that is no column.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexbatch.config import DatasetConfig
from flexbatch.data import formats
from flexbatch.data.columns import ColumnType, is_encodable, merge, missing_column
from flexbatch.data.hub import HubShard
from flexbatch.data.identity import SeenIds
from flexbatch.data.sources import HubSource, SourceFile, resolve
from flexbatch.errors import DataError
from flexbatch.records import Row

UNTYPED = ("jsonl", "hub")  # formats whose column types are inferred from values
SPLIT_COLUMN = "split"


@dataclass(frozen=True, slots=True)
class FileDescription:
    """One shard: its size in bytes and a hash of its content."""

    name: str
    size: int
    content: str


@dataclass(frozen=True, slots=True)
class SourceDescription:
    """What a dataset is. `rows` counts what will be run (after `dataset.limit`), None where that is not known."""

    path: str
    format: str
    files: tuple[FileDescription, ...]
    columns: Mapping[str, ColumnType]
    rows: int | None

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def fingerprint(self) -> dict[str, Any]:
        """For the run's fingerprint: the content, not the place, so that a dataset may be moved."""
        return {"format": self.format, "files": {file.name: f"{file.size}:{file.content}" for file in self.files}}


class Shard(Protocol):
    """A named run of records that share a schema."""

    name: str

    def inspect(self) -> formats.ShardLayout: ...

    def read(self) -> Iterator[list[formats.Record]]: ...


class FileShard:
    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.name = file.shard

    def inspect(self) -> formats.ShardLayout:
        return formats.inspect(self.file)

    def read(self) -> Iterator[list[formats.Record]]:
        return formats.read(self.file)


class Source:
    """A dataset whose shards have been found and inspected."""

    def __init__(
        self, config: DatasetConfig, kind: str, shards: Sequence[Shard], columns: Mapping[str, ColumnType]
    ) -> None:
        self._config = config
        self._shards = shards
        self.format = kind
        self.columns = columns
        self._rows: int | None = None

    @staticmethod
    def open(config: DatasetConfig) -> Source:
        """Find and inspect the shards.

        Raises:
            DataError: missing, empty, truncated or corrupt; a schema that changes between shards; no such id column.
        """
        found = resolve(config)
        shards: list[Shard]
        if isinstance(found, HubSource):
            kind, shards = "hub", [HubShard(found, config.split)]
        else:
            kind = found[0].format if found else "saved"
            shards = [FileShard(file) for file in found]
        layouts = [shard.inspect() for shard in shards]
        columns = merge_columns([shard.name for shard in shards], layouts, untyped=kind in UNTYPED)
        source = Source(config, kind, shards, columns)
        counts = [layout.rows for layout in layouts]
        source._rows = None if None in counts else sum(count or 0 for count in counts)
        if source._rows == 0:
            raise source._no_rows()
        source._check_columns()
        return source

    def _check_columns(self) -> None:
        if self._config.id_column and self._config.id_column not in self.columns:
            raise missing_column("dataset.id_column", self._config.id_column, self.columns)
        if self._filters_split() and SPLIT_COLUMN not in self.columns:
            raise DataError(
                f"dataset.split is '{self._config.split}', but this dataset is neither a hub dataset nor a saved "
                f"DatasetDict, and it has no column '{SPLIT_COLUMN}'.",
                remedy="Leave dataset.split empty, or name the files of the split in dataset.path.",
            )

    def _filters_split(self) -> bool:
        """Hub datasets and DatasetDicts have their splits apart; in other files a column tells them."""
        by_file = [shard for shard in self._shards if isinstance(shard, FileShard) and not shard.file.split]
        return bool(self._config.split and by_file)

    def _no_rows(self) -> DataError:
        which = f" with split '{self._config.split}'" if self._config.split else ""
        return DataError(
            f"dataset.path: '{self._config.path}' has no rows{which}.", remedy="Give a dataset with at least one row."
        )

    def rows(self) -> Iterator[Row]:
        """The rows in order; each time from the start.

        Raises:
            DataError: damage found while reading; a null or doubled id; no rows at all.
        """
        seen = SeenIds() if self._config.id_column else None
        count = 0
        limit = self._config.limit or sys.maxsize
        for batch in self._batches():
            batch = batch[: limit - count]
            if seen is not None:
                for suspect in seen.add([row.id for row in batch]):
                    self._check_double(batch[suspect])
            yield from batch
            count += len(batch)
            if count == limit:
                return
        if count == 0:
            raise self._no_rows()

    def _batches(self) -> Iterator[list[Row]]:
        split = self._config.split if self._filters_split() else ""
        for shard in self._shards:
            number = 0
            for records in shard.read():
                batch = []
                for record in records:
                    if not split or record.get(SPLIT_COLUMN) == split:
                        batch.append(self._row(shard.name, number, record))
                    number += 1
                yield batch

    def _row(self, shard: str, number: int, record: formats.Record) -> Row:
        fields = {name: record.get(name) for name in self.columns}
        if not self._config.id_column:
            return Row(f"{shard}:{number}", shard, number, fields)
        value = fields[self._config.id_column]
        if not isinstance(value, str | int) or isinstance(value, bool) or not is_encodable(str(value)):
            what = "null" if value is None else f"{value!r} ({type(value).__name__})"
            raise DataError(
                f"dataset.id_column: '{self._config.id_column}' is {what} in row {number} of '{shard}'.",
                remedy="Every row needs an id that is a string or an integer; or leave dataset.id_column empty.",
            )
        return Row(str(value), shard, number, fields)

    def _check_double(self, suspect: Row) -> None:
        """Two ids have the same hash: read again from the start, to tell a double from a coincidence."""
        for batch in self._batches():
            for row in batch:
                if (row.shard, row.row) == (suspect.shard, suspect.row):
                    return
                if row.id == suspect.id:
                    raise DataError(
                        f"dataset.id_column: '{self._config.id_column}' is '{row.id}' both in row {row.row} of "
                        f"'{row.shard}' and in row {suspect.row} of '{suspect.shard}'.",
                        remedy="Ids must differ; correct them, choose another column, or leave it empty.",
                    )

    def describe(self) -> SourceDescription:
        """Sizes, content hashes, columns and, where it is known without a long read, the number of rows."""
        files = []
        for shard in self._shards:
            if isinstance(shard, FileShard):
                files.append(FileDescription(shard.name, shard.file.size, shard.file.content_hash()))
            else:
                files.append(FileDescription(f"{self._config.path}/{shard.name}", 0, str(self._rows)))
        rows = None if self._filters_split() else self._rows
        if rows is not None and self._config.limit:
            rows = min(rows, self._config.limit)
        return SourceDescription(str(self._config.path), self.format, tuple(files), self.columns, rows)


def merge_columns(
    names: Sequence[str], layouts: Sequence[formats.ShardLayout], *, untyped: bool
) -> dict[str, ColumnType]:
    """The columns that all shards share. A column may be null-typed in some shards.

    Raises:
        DataError: a column whose type changes, or that only some shards have (in untyped formats it is null there).
    """
    merged: dict[str, ColumnType] = {}
    origin: dict[str, str] = {}
    for shard, layout in zip(names, layouts, strict=True):
        if merged and not untyped and (odd := sorted(merged.keys() ^ layout.columns.keys())):
            has, lacks = (names[0], shard) if odd[0] in merged else (shard, names[0])
            raise DataError(
                f"dataset.path: the schema changes between shards: '{has}' has a column '{odd[0]}', '{lacks}' has not.",
                remedy="Give all shards the same columns, or run them as separate jobs.",
            )
        for name, kind in layout.columns.items():
            known = merged.get(name, kind)
            both = merge(known, kind, widen=untyped)
            if both is None:
                raise DataError(
                    f"dataset.path: the schema changes between shards: column '{name}' is {known.name} in "
                    f"'{origin[name]}' and {kind.name} in '{shard}'.",
                    remedy="Give the column one type in all shards, or run them as separate jobs.",
                )
            if name not in origin or known.is_null:
                origin[name] = shard
            merged[name] = both
    return merged


def read_rows(config: DatasetConfig) -> Iterator[Row]:
    """All rows of the dataset, in its fixed order. Errors as `Source.open` and `Source.rows`."""
    return Source.open(config).rows()


def describe_source(config: DatasetConfig) -> SourceDescription:
    """The dataset's files, columns and rows, for the run's fingerprint and for the plan. Errors as `Source.open`."""
    return Source.open(config).describe()
