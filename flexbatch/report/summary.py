"""What a finished run prints: a table of scores, where the results are, and how to go on."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexbatch.report.progress import duration_text

PLAIN_WIDTH = 120


@dataclass(frozen=True, slots=True)
class ScoreLine:
    """One line of the table of scores: a mean with its 95 % confidence interval over `count` instances."""

    scenario: str
    metric: str
    mean: float
    low: float
    high: float
    count: int
    main: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run left: its folder, rows, tokens, why completions ended, and the seconds of this attempt."""

    folder: Path
    rows: int
    tokens: int
    finish_reasons: Mapping[str, int]
    seconds: float


def scores_table(lines: Sequence[ScoreLine]) -> Table:
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("scenario")
    table.add_column("metric")
    table.add_column("score", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("instances", justify="right")
    for line in lines:
        table.add_row(
            line.scenario if line.main else "",
            line.metric,
            f"{line.mean:.3f}",
            f"{line.low:.3f} to {line.high:.3f}",
            str(line.count),
            style="bold" if line.main else None,
        )
    return table


def closing_lines(outcome: Outcome, called: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Where the results are and how to resume, plan and read them. `called` is the command before its overrides."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(outcome.finish_reasons.items()))
    folder = outcome.folder
    return [
        f"{outcome.rows} rows, {outcome.tokens} tokens generated ({reasons}); "
        f"this attempt took {duration_text(outcome.seconds)}.",
        f"Results  {folder}/data  (Parquet; metrics.json and report.html beside it)",
        f"Read     python -c \"import pandas; print(pandas.read_parquet('{folder}/data'))\"",
        f"Resume   {shlex.join([*called, *overrides])}   (the same command goes on after any interruption)",
        f"Plan     {shlex.join([*called, 'plan', *overrides])}   (where everything lives, how long it takes)",
    ]


def invocation() -> list[str]:
    """How this process was called, as the user can call it again: by name where the PATH leads here."""
    called = Path(sys.argv[0])
    if called.name == "flexbatch":
        return [called.name if shutil.which(called.name) == str(called) else _from_here(called)]
    found = shutil.which("python")
    same = found is not None and Path(found).parent == Path(sys.executable).parent
    return ["python" if same else _from_here(Path(sys.executable)), "-m", "flexbatch"]


def _from_here(path: Path) -> str:
    """Relative to the working folder where it lies inside it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def print_table(table: Table) -> None:
    """To standard error, beside the progress."""
    _console(sys.stderr).print(table)


def print_summary(lines: Sequence[ScoreLine], closing: Sequence[str]) -> None:
    """To standard output."""
    console = _console(sys.stdout)
    if lines:
        console.print(scores_table(lines))
        console.print()
    for line in closing:
        console.print(Text(line), soft_wrap=True)


def _console(stream: TextIO) -> Console:
    """In a file or a pipe nothing is cut to the width of a terminal that is not there."""
    return Console(file=stream, highlight=False, width=None if stream.isatty() else PLAIN_WIDTH)
