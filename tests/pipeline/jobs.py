"""What the tests say of a job: its overrides, and its output as rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def overrides(model: Path, dataset: Path, output: Path, **options: Any) -> list[str]:
    """The command line of a `generate` job; `options` are keys with `__` for the dot, and win."""
    values = {
        "job": "generate",
        "model": "hf",
        "model.path": model,
        "dataset.path": dataset,
        "output.dir": output,
        "offload.reader": "buffered",
    }
    values |= {name.replace("__", "."): value for name, value in options.items()}
    return [f"{name}={value}" for name, value in values.items() if value is not None]


def part_files(output: Path) -> list[Path]:
    return sorted((output / "data").glob("*")) if (output / "data").is_dir() else []


def output_rows(output: Path) -> list[dict[str, Any]]:
    """All rows in the order of their parts."""
    return [row for path in part_files(output) for row in pq.read_table(path).to_pylist()]
