"""After the last row: scores from the output's own files, so that a resumed run scores as an uninterrupted one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch.config import DatasetConfig
from flexbatch.data.durable import write_file
from flexbatch.data.reader import Source
from flexbatch.data.results import read_results
from flexbatch.data.writer import list_parts
from flexbatch.evaluation.helm_files import write_helm_files
from flexbatch.evaluation.summary import Scores, summarize
from flexbatch.report.summary import Outcome, ScoreLine
from flexbatch.stages.model import Model
from flexbatch.stages.work import Work


@dataclass(frozen=True)
class RunSummary:
    """A finished run: what it left, and the scores of a scored job."""

    outcome: Outcome
    scores: Scores | None = None

    def score_lines(self) -> list[ScoreLine]:
        table = self.scores.table() if self.scores else []
        return [
            ScoreLine(row.scenario, row.metric, e.mean, e.low, e.high, e.count, row.main)
            for row in table
            for e in [row.estimate]
        ]


def output_rows(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of an output folder, part by part, each a mapping of column to value."""
    if list_parts(folder):
        for row in Source.open(DatasetConfig(path=str(folder / "data"), format="parquet")).rows():
            yield row.fields


def summarize_run(folder: Path, work: Work, model: Model, seconds: float) -> RunSummary:
    """Reads the output back, scores it where the job is scored, and writes `metrics.json` and HELM's files."""
    results = read_results(folder)
    scores = _score(folder, work, model)
    outcome = Outcome(folder, results.rows, results.completion_tokens, results.finish_reasons, seconds)
    metrics = {
        "rows": results.rows,
        "generated_tokens": results.completion_tokens,
        "finish_reasons": dict(results.finish_reasons),
        **({"warnings": list(model.warnings)} if model.warnings else {}),
        **(scores.metrics() if scores else {}),
    }
    write_file(folder / "metrics.json", json.dumps(metrics, indent=1).encode(), folder / "_tmp")
    return RunSummary(outcome, scores)


def _score(folder: Path, work: Work, model: Model) -> Scores | None:
    if work.evaluation is not None:
        scored = work.evaluation.instance_scores(output_rows(folder), model.tokenizer)
        write_helm_files(folder, scored, model.tokenizer, Path(model.found.name).name)
        return summarize(scored)
    return work.scorer.score(output_rows(folder)) if work.scorer is not None else None
