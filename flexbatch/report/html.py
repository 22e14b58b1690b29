"""The run as one HTML file that needs nothing else: `report.html`, made from the files of the output folder alone."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from flexbatch.data.durable import write_file
from flexbatch.data.progress import Status, read_status
from flexbatch.data.results import Results, read_results
from flexbatch.report.progress import duration_text, rate_text
from flexbatch.report.status_text import MEANING, moment_text
from flexbatch.report.throughput_plot import throughput_svg
from flexbatch.report.timeline import Stretch, Totals, read_timeline, totals

SHOWN_CHARACTERS = 1200
# Columns of a part that a sample shows in places of their own, or not at all.
APART = ("id", "shard", "row", "prompt_tokens", "completion", "completion_ids", "finish_reason", "error", "logprobs")


@dataclass(frozen=True)
class Facts:
    """Everything that the page says, as the folder has it."""

    status: Status
    results: Results
    stretches: Sequence[Stretch]
    metrics: Mapping[str, Any]
    plan: Mapping[str, Any]
    config: Mapping[str, Any]
    overrides: Sequence[str]
    frontier: bytes = b""

    @property
    def sums(self) -> Totals:
        return totals(self.stretches)


def gather(folder: Path) -> Facts:
    """Raises OutputError where `folder` is no output folder; files that are not there yet are left out."""
    return Facts(
        status=read_status(folder),
        results=read_results(folder),
        stretches=read_timeline(folder),
        metrics=_mapping(folder / "metrics.json"),
        plan=_mapping(folder / "_state" / "plan.json"),
        config=_mapping(folder / ".hydra" / "config.yaml"),
        overrides=_list(folder / ".hydra" / "overrides.yaml"),
        frontier=_picture(folder / "frontier.png"),
    )


def _load(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    return None


def _mapping(path: Path) -> Mapping[str, Any]:
    content = _load(path)
    return content if isinstance(content, dict) else {}


def _list(path: Path) -> Sequence[str]:
    content = _load(path)
    return [str(entry) for entry in content] if isinstance(content, list) else []


def _picture(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


@dataclass(frozen=True, slots=True)
class ScoreRow:
    scenario: str
    metric: str
    mean: float
    low: float
    high: float
    count: int
    main: bool


def score_rows(metrics: Mapping[str, Any]) -> Iterator[ScoreRow]:
    """The scenarios' metrics, the main one first."""
    for scenario, scores in metrics.get("scenarios", {}).items():
        main = scores.get("main_metric", "")
        ordered = sorted(scores.get("metrics", {}).items(), key=lambda item: item[0] != main)
        for metric, value in ordered:
            bounds = value.get("low", value["mean"]), value.get("high", value["mean"])
            yield ScoreRow(scenario, metric, value["mean"], *bounds, value.get("count", 0), metric == main)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """A nested mapping as dotted keys and short texts."""
    if isinstance(value, Mapping) and (value or not prefix):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for number, inner in enumerate(value):
            yield from flat(inner, f"{prefix}[{number}]")
    else:
        yield prefix, f"{value:,.6g}" if isinstance(value, float) else str(value)


def tiles(facts: Facts) -> list[tuple[str, str]]:
    """The figures at the top."""
    status, results, sums = facts.status, facts.results, facts.sums
    total = "" if status.rows_total is None else f" of {status.rows_total:,}"
    return [
        ("rows done", f"{status.rows_done:,}{total}"),
        ("generated tokens", f"{max(results.completion_tokens, status.tokens):,}"),
        ("prompt tokens", f"{results.prompt_tokens:,}"),
        ("tokens/s", rate_text(sums.tokens_per_second or status.tokens_per_second)),
        ("time at work", duration_text(sums.seconds)),
        ("rows with an error", f"{results.finish_reasons.get('error', 0):,}"),
    ]


def sample_view(row: Mapping[str, Any]) -> dict[str, Any]:
    """One row for the page: its name, its carried columns, the completion with its end."""
    carried = {name: value for name, value in row.items() if name not in APART and value not in (None, "", [])}
    return {
        "id": row.get("id"),
        "place": f"{row.get('shard')}:{row.get('row')}",
        "prompt_tokens": row.get("prompt_tokens"),
        "tokens": len(row.get("completion_ids") or []),
        "finish_reason": row.get("finish_reason"),
        "completion": shorten(str(row.get("completion") or "")),
        "error": row.get("error") or "",
        "carried": {name: shorten(str(value)) for name, value in carried.items()},
    }


def shorten(text: str) -> str:
    """The middle of a long text goes: a prompt's end says more than its middle."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - SHOWN_CHARACTERS:,} characters ...] {text[-half:]}"


def render(facts: Facts) -> str:
    """The page. Everything from the run is escaped; only the SVG, which is made here, is not."""
    loader = jinja2.PackageLoader("flexbatch.report", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"duration": duration_text, "moment": moment_text, "rate": rate_text}
    job, model = facts.config.get("job", {}), facts.config.get("model", {})
    return environment.get_template("report.html.j2").render(
        title=f"{job.get('name', 'job')} with {model.get('name', 'a model')}",
        status=facts.status,
        state=MEANING.get(facts.status.state, facts.status.state),
        tiles=tiles(facts),
        scores=list(score_rows(facts.metrics)),
        figures=list(flat({key: value for key, value in facts.metrics.items() if key != "scenarios"})),
        plot=throughput_svg(facts.stretches) if facts.stretches else "",
        sums=facts.sums,
        results=facts.results,
        samples=[sample_view(row) for row in facts.results.samples],
        failures=[sample_view(row) for row in facts.results.failures],
        plan_lines=facts.plan.get("lines", ()),
        frontier=base64.b64encode(facts.frontier).decode(),
        comparison=facts.plan.get("comparison", ()),
        plan=list(flat({key: value for key, value in facts.plan.items() if key not in ("lines", "comparison")})),
        overrides=facts.overrides,
        config=list(flat(facts.config)),
        now=time.time(),
    )


def write_report(folder: Path) -> Path:
    """Write `report.html` into the folder and return its path.

    Raises:
        OutputError: it is no output folder, or cannot be written.
        CapacityError: the disk is full.
    """
    target = folder / "report.html"
    write_file(target, render(gather(folder)).encode("utf-8", "backslashreplace"), folder / "_tmp")
    return target
