"""The readers that an output folder is promised to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import datasets
import duckdb
import pandas as pd
import polars as pl
import pyarrow.dataset as pads

from tests.pipeline.jobs import part_files

QUICK: dict[str, Callable[[Path], list[str]]] = {
    "pandas": lambda data: pd.read_parquet(data)["id"].tolist(),
    "polars": lambda data: pl.read_parquet(data)["id"].to_list(),
    "duckdb": lambda data: [row[0] for row in duckdb.connect().sql(f"from '{data}/*.parquet' select id").fetchall()],
    "pyarrow": lambda data: pads.dataset(data).to_table()["id"].to_pylist(),
}


def read_by_all(output: Path) -> dict[str, list[str]]:
    """The ids that each reader finds, sorted; none where there is no part yet."""
    if not part_files(output):
        return {}
    data = output / "data"
    streamed = datasets.load_dataset("parquet", data_files=f"{data}/*.parquet", split="train", streaming=True)
    return {name: sorted(read(data)) for name, read in QUICK.items()} | {"datasets": sorted(r["id"] for r in streamed)}


class Watch:
    """Reads a folder's data over and over, in a thread, from entering to leaving; `failures` are what went wrong."""

    def __init__(self, output: Path) -> None:
        self._output, self._stopped = output, threading.Event()
        self.reads, self.failures = 0, list[str]()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        seen = 0
        while not self._stopped.wait(0.05):
            for name, read in QUICK.items() if part_files(self._output) else ():
                try:
                    ids = read(self._output / "data")
                except Exception as error:  # noqa: BLE001 - whatever a reader says is a failure
                    self.failures.append(f"{name}: {type(error).__name__}: {error}")
                    continue
                self.reads += 1
                if len(set(ids)) != len(ids) or len(ids) < seen:
                    self.failures.append(f"{name}: {len(ids)} rows after {seen}, {len(set(ids))} ids")
                seen = max(seen, len(ids))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
