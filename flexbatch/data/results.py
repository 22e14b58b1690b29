"""What the finished parts hold, read back: counts over all rows, and a few rows to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from flexbatch.data.writer import list_parts


@dataclass(frozen=True, slots=True)
class Results:
    """Sums over every row; `samples` are some rows from across the parts, `failures` the first with an error."""

    rows: int
    parts: int
    bytes: int
    finish_reasons: Mapping[str, int]
    prompt_tokens: int
    longest_prompt: int
    completion_tokens: int
    samples: tuple[Mapping[str, Any], ...]
    failures: tuple[Mapping[str, Any], ...]


def read_results(folder: Path, samples: int = 8) -> Results:
    """Streams the parts; no more than one is in memory. Works on a run under way."""
    files = list(list_parts(folder).values())
    reasons: Counter[str] = Counter()
    prompt_tokens = longest = completion_tokens = 0
    shown: list[Mapping[str, Any]] = []
    failures: list[Mapping[str, Any]] = []
    wanted = {round(place * (len(files) - 1) / max(samples - 1, 1)) for place in range(samples)}
    for number, file in enumerate(files):
        table = pq.read_table(file, columns=["prompt_tokens", "completion_ids", "finish_reason"], partitioning=None)
        reasons.update(table["finish_reason"].to_pylist())
        prompt_tokens += pc.sum(table["prompt_tokens"]).as_py() or 0
        longest = max(longest, pc.max(table["prompt_tokens"]).as_py() or 0)
        completion_tokens += pc.sum(pc.list_value_length(table["completion_ids"])).as_py() or 0
        if number in wanted:
            shown.extend(_first_rows(file, -(-samples // len(wanted))))
        if reasons["error"] > len(failures) and len(failures) < samples:
            failures.extend(_failed_rows(file, samples - len(failures)))
    return Results(
        rows=sum(reasons.values()),
        parts=len(files),
        bytes=sum(file.stat().st_size for file in files),
        finish_reasons=dict(reasons.most_common()),
        prompt_tokens=prompt_tokens,
        longest_prompt=longest,
        completion_tokens=completion_tokens,
        samples=tuple(shown[:samples]),
        failures=tuple(failures),
    )


def _first_rows(file: Path, count: int) -> list[Mapping[str, Any]]:
    with pq.ParquetFile(file) as parquet:
        batch = next(parquet.iter_batches(batch_size=count), None)
    return list(batch.to_pylist()) if batch is not None else []


def _failed_rows(file: Path, count: int) -> list[Mapping[str, Any]]:
    table = pq.read_table(file, filters=[("finish_reason", "==", "error")], partitioning=None)
    return list(table.slice(0, count).to_pylist())
