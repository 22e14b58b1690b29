"""Whole jobs of rising length through the command line: time per row must not rise, memory must stay flat."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from flexbatch.config import Config
from flexbatch.errors import EngineError

WORDS = (
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "with",
    "as",
    "be",
    "at",
    "by",
    "not",
)


def measure_scaling(config: Config, console: Console) -> list[dict[str, Any]]:
    """A job for each of `bench.row_counts`, each in a process and an output folder of its own, smallest first, and the
    same again `bench.repeats` times: a machine that others share is not the same from one job to the next."""
    counts = sorted(set(config.bench.row_counts))
    runs: dict[int, list[tuple[float, int]]] = {rows: [] for rows in counts}
    for _ in range(config.bench.repeats):
        with tempfile.TemporaryDirectory(prefix="flexbatch-bench-") as folder:
            for rows in counts:
                with console.status(f"{rows} rows"):
                    runs[rows].append(_run_job(config, Path(folder), rows))
    return summary(runs)


def summary(runs: Mapping[int, Sequence[tuple[float, int]]]) -> list[dict[str, Any]]:
    """Of seconds and peak bytes of every run, by rows: the median of the times, the highest of the peaks."""
    made: list[dict[str, Any]] = []
    for rows, measured in sorted(runs.items()):
        seconds = [each for each, _ in measured]
        made.append(
            {
                "rows": rows,
                "seconds": median(seconds),
                "all_seconds": seconds,
                "milliseconds_per_row": 1000 * median(seconds) / rows,
                "milliseconds_per_further_row": further(made[-1] if made else None, rows, median(seconds)),
                "peak_resident_bytes": max(peak for _, peak in measured),
            }
        )
    return made


def further(before: dict[str, Any] | None, rows: int, seconds: float) -> float | None:
    """Milliseconds for each row more than the run before had: what a row costs without the job's fixed start."""
    if before is None:
        return None
    return float(1000 * (seconds - before["seconds"]) / (rows - before["rows"]))


def write_rows(file: Path, rows: int) -> None:
    """Texts of 10 to 40 words, the same for the same row number."""
    with file.open("w", encoding="utf-8") as stream:
        for row in range(rows):
            words = [WORDS[(row * 7 + place * (1 + row % 5)) % len(WORDS)] for place in range(10 + row * 13 % 31)]
            stream.write(json.dumps({"text": f"{row} {' '.join(words)}"}) + "\n")


def _run_job(config: Config, folder: Path, rows: int) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of one job, start and imports included."""
    data = folder / f"{rows}.jsonl"
    write_rows(data, rows)
    command = [sys.executable, "-m", "flexbatch", "run", *_overrides(config), f"dataset.path={data}"]
    started = time.perf_counter()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"output.dir={folder / f'out-{rows}'}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        said = (folder / "log").read_text(errors="replace").strip().splitlines()[-3:]
        raise EngineError(f"The job of {rows} rows ended with code {process.returncode}: {' | '.join(said)}")
    return seconds, _peak(usage)


def _overrides(config: Config) -> Sequence[str]:
    """The model and the offload options as they were given here."""
    offload = {
        f"offload.{field.name}": getattr(config.offload, field.name)
        for field in dataclasses.fields(config.offload)
        if getattr(config.offload, field.name) not in ("", [])
    }
    return [
        "job=generate",
        "model=hf",
        f"model.path={config.model.path}",
        f"model.dtype={config.model.dtype}",
        f"prompt.max_tokens={config.bench.prompt_tokens}",
        f"generation.max_new_tokens={config.bench.new_tokens}",
        f"generation.min_new_tokens={config.bench.new_tokens}",
        *(f"{name}={_text(value)}" for name, value in offload.items()),
    ]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _peak(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
