"""Jobs over a dataset that score themselves: extraction with gold fields, summaries with references.

Like an evaluation they are built before generation, when everything that can be wrong is said, and score the rows of
the output alone. `source_columns` are carried from the dataset, `columns` are added to the output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from flexbatch.config import JobConfig
from flexbatch.errors import ConfigError
from flexbatch.evaluation.fields import PREFIX, VALID, Target, read_target
from flexbatch.evaluation.grammar import check_grammar
from flexbatch.evaluation.metrics import TextMetric, f1_score, load_metric, quasi_exact_match
from flexbatch.evaluation.summary import Estimate, ScenarioScores, Scores, estimate_mean
from flexbatch.records import Completion

ROUGE = ("rouge_1", "rouge_2", "rouge_l")


class RowScorer(Protocol):
    """A job's scorer: what it needs carried, what it adds to each row, and the scores of all rows."""

    @property
    def source_columns(self) -> tuple[str, ...]: ...

    @property
    def columns(self) -> dict[str, str]: ...

    def values(self, completion: Completion) -> dict[str, Any]: ...

    def score(self, rows: Iterable[Mapping[str, Any]]) -> Scores: ...


def build_row_scorer(job: JobConfig) -> RowScorer | None:
    """The scorer of an extract or summarize job; None for a job that has nothing to score."""
    if job.kind == "extract":
        return build_extraction(job)
    if job.kind == "summarize" and job.reference:
        return Summaries(job.name, job.reference, {name: load_metric(name) for name in ROUGE})
    return None


@dataclass(frozen=True)
class Extraction:
    """Fields of documents. `gold` maps a field to the source column with its true value (`column.key` goes inside).

    With `constrain` every row is decoded under `constraints.compile_constraint(target, ...)`.
    """

    name: str
    target: Target
    gold: Mapping[str, str]
    constrain: bool = True

    @property
    def source_columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column.partition(".")[0] for column in self.gold.values()))

    @property
    def columns(self) -> dict[str, str]:
        return self.target.columns()

    def values(self, completion: Completion) -> dict[str, Any]:
        return self.target.values(completion.text)

    def score(self, rows: Iterable[Mapping[str, Any]]) -> Scores:
        """`invalid_rate`; with gold fields `exact_match` and `f1` of each and over all.

        Exact match compares after lower case, punctuation and articles are gone (HELM's quasi-exact match); numbers
        and truth values compare as such. `f1_score` is the overlap of words. `field_f1` weighs found against missed:
        a field that is empty in gold and output counts for nothing, over all rows (micro-average), as SROIE does.
        """
        statistics: dict[str, list[float]] = {"invalid_rate": []}
        counts = np.zeros(3, dtype=np.int64)  # right, found, wanted
        errors = 0
        for row in rows:
            errors += bool(row["error"])
            statistics["invalid_rate"].append(float(not row[VALID]))
            for name, right, overlap, found, wanted in self._judge(row):
                statistics.setdefault(f"{name}_exact_match", []).append(right)
                statistics.setdefault(f"{name}_f1_score", []).append(overlap)
                counts += [bool(right and found), found, wanted]
        derived = {}
        if self.gold:
            derived["field_f1"] = float(2 * counts[0] / max(1, counts[1] + counts[2]))
            for kind in ("exact_match", "f1_score"):
                by_field = [statistics[f"{name}_{kind}"] for name in self.gold if f"{name}_{kind}" in statistics]
                statistics[kind] = [float(np.mean(values)) for values in zip(*by_field, strict=True)]
        return _scores(self.name, "exact_match" if self.gold else "invalid_rate", statistics, derived, errors)

    def _judge(self, row: Mapping[str, Any]) -> Iterable[tuple[str, float, float, bool, bool]]:
        """Field, exact match, word overlap, whether the output has a value, whether gold has one."""
        for name, column in self.gold.items():
            wanted, found = _inside(row, column), row[PREFIX + name]
            empty = (_text(wanted) == "", _text(found) == "")
            if any(empty):
                yield name, float(all(empty)), float(all(empty)), not empty[1], not empty[0]
                continue
            overlap = f1_score(_text(wanted), _text(found))
            right = _same(wanted, found)
            yield name, right, max(right, overlap), True, True


def build_extraction(job: JobConfig) -> Extraction:
    target = read_target(job)
    for name in job.gold:
        if name not in target.fields:
            raise ConfigError(
                f"job.gold.{name}: there is no such field", remedy=f"The fields are {', '.join(target.fields)}."
            )
    if job.constrain:
        check_grammar(target)
    return Extraction(job.name, target, dict(job.gold), job.constrain)


@dataclass(frozen=True)
class Summaries:
    """Summaries against the column `reference`, by ROUGE; a list there means several references, the best counts."""

    name: str
    reference: str
    metrics: Mapping[str, TextMetric]

    @property
    def source_columns(self) -> tuple[str, ...]:
        return (self.reference,)

    @property
    def columns(self) -> dict[str, str]:
        return {}

    def values(self, completion: Completion) -> dict[str, Any]:  # noqa: ARG002 - a summary adds no columns
        return {}

    def score(self, rows: Iterable[Mapping[str, Any]]) -> Scores:
        """Rows without a reference are left out; rows that failed count as empty summaries."""
        statistics: dict[str, list[float]] = {name: [] for name in self.metrics}
        errors = 0
        for row in rows:
            errors += bool(row["error"])
            given = row[self.reference]
            references = [text for text in ([given] if isinstance(given, str) else given or []) if text]
            if references:
                summary = (row["completion"] or "").strip()
                for name, metric in self.metrics.items():
                    statistics[name].append(max(metric(reference, summary) for reference in references))
        return _scores(self.name, "rouge_l", statistics, {}, errors)


def _scores(
    name: str, main: str, statistics: Mapping[str, list[float]], derived: dict[str, float], errors: int
) -> Scores:
    estimates: dict[str, Estimate] = {
        metric: estimate_mean(np.array(values)) for metric, values in statistics.items() if values
    }
    if not estimates:
        return Scores(())
    count = max(len(values) for values in statistics.values())
    main = main if main in estimates else next(iter(estimates))
    return Scores((ScenarioScores(name, main, count, 1, count, errors, 0, estimates, derived),))


def _inside(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of a key inside it: `gold.total`."""
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _same(wanted: Any, found: Any) -> float:
    """Whether two values mean the same: true and "yes" do, 9 and "9.00" do, "The Shop" and "shop." do."""
    if isinstance(wanted, bool):
        return float(_text(found).lower() in (("true", "yes", "1") if wanted else ("false", "no", "0")))
    if not isinstance(wanted, str):
        try:
            return float(float(wanted) == float(found))
        except (TypeError, ValueError):
            return 0.0
    return quasi_exact_match(wanted, _text(found))
