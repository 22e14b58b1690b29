"""Parts as Parquet files: `data/part-NNNNN.parquet` exists exactly when its rows are done.

The layout keeps `data/` readable by every Parquet reader at any moment: only whole files, never without rows, all of
one explicit schema without Null types, and nothing else in the folder. `data/` itself appears with the first part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flexbatch.data import durable
from flexbatch.data.columns import ColumnType, without_nulls
from flexbatch.errors import ConfigError, OutputError
from flexbatch.records import Completion, Part, Prompt

COLUMNS: dict[str, ColumnType] = {
    name: ColumnType.parse(kind)
    for name, kind in {
        "id": "string",
        "shard": "string",
        "row": "int64",
        "prompt_tokens": "int32",
        "completion": "string",
        "completion_ids": "list<int32>",
        "finish_reason": "string",
        "error": "string",
        "logprobs": "list<float32>",
    }.items()
}
COMPLETION_INDEX = {"completion_index": ColumnType.parse("int32")}
PART_NAME = re.compile(r"part-(\d{5,})\.parquet")


class PartWriter:
    """Writes the parts of one run into `folder`.

    The columns are the fixed ones, then `carried` (names and source types of `output.columns`), then
    `completion_index` where a row has several completions, then `extra`: columns that the job adds, by name, with
    types as `ColumnType.parse` takes them ("float64", "list<string>", "struct<total: string>").

    Raises:
        ConfigError: a carried column has the name of one that flexbatch writes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        carried: Mapping[str, ColumnType] | None = None,
        extra: Mapping[str, str] | None = None,
        several_completions: bool = False,
    ) -> None:
        self._data, self._scratch = folder / "data", folder / "_tmp"
        self._carried = {name: without_nulls(kind) for name, kind in (carried or {}).items()}
        self._extra = {name: ColumnType.parse(kind) for name, kind in (extra or {}).items()}
        own = COLUMNS | (COMPLETION_INDEX if several_completions else {})
        for name in self._carried:
            if name in own or name in self._extra:
                raise ConfigError(
                    f"output.columns: '{name}' is the name of a column that flexbatch writes itself.",
                    remedy="Leave it out, or rename the column in the dataset.",
                )
        self._indexed = COMPLETION_INDEX if several_completions else {}
        kinds = COLUMNS | self._carried | self._indexed | self._extra
        self._schema = pa.schema([(name, kind.arrow) for name, kind in kinds.items()])

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._schema.names)

    def write(self, part: Part, extra: Sequence[Mapping[str, Any]] = ()) -> Path:
        """Write a part; afterwards it is in `data/`, durably. `extra` holds the added columns' values, row by row.

        Writing a part again replaces it by the same content.

        Raises:
            CapacityError: the disk is full; earlier parts stand.
            OutputError: the folder cannot be written.
        """
        if not part.rows:
            raise ValueError(f"part {part.number} has no rows")
        additions = extra or [{} for _ in part.rows]
        records = [
            self._record(prompt, completion, added)
            for (prompt, completion), added in zip(part.rows, additions, strict=True)
        ]
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(records, schema=self._schema), buffer, compression="zstd")
        target = self._data / f"part-{part.number:05d}.parquet"
        durable.write_file(target, buffer.getvalue().to_pybytes(), self._scratch)
        return target

    def _record(self, prompt: Prompt, completion: Completion, added: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": _text(prompt.row.id),
            "shard": _text(prompt.row.shard),
            "row": prompt.row.row,
            "prompt_tokens": len(prompt.token_ids),
            "completion": _text(completion.text),
            "completion_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "error": _text(completion.error or prompt.error),
            "logprobs": list(completion.logprobs),
            **{name: prompt.carried.get(name) for name in self._carried},
            **dict.fromkeys(self._indexed, prompt.completion_index),
            **{name: added.get(name) for name in self._extra},
        }


def _text(value: str) -> str:
    """Text that UTF-8 can hold: a file name or an error may have bytes in it that it cannot."""
    return value.encode("utf-8", "replace").decode("utf-8")


def list_parts(folder: Path) -> dict[int, Path]:
    """The parts in `folder/data`, by number."""
    data = folder / "data"
    with durable.explained(data):
        found = [(PART_NAME.fullmatch(path.name), path) for path in data.iterdir()] if data.is_dir() else []
    return {int(match[1]): path for match, path in sorted(found, key=lambda item: item[1]) if match}


def count_rows(path: Path) -> int:
    """Rows of one part, from its footer.

    Raises:
        OutputError: it is not a whole Parquet file.
    """
    try:
        rows = int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise OutputError(
            f"'{path}' is damaged: {' '.join(str(error).split())}",
            remedy="Delete the file and run the same command again: its rows are then run again.",
        ) from error
    return rows
