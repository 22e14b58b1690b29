"""The report is made from the folder's files alone, whatever of them is there, and shows what they hold."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flexbatch.data.ledger import Ledger
from flexbatch.data.results import read_results
from flexbatch.data.writer import PartWriter
from flexbatch.errors import OutputError
from flexbatch.records import Completion, Part, PassResult, Prompt, Row
from flexbatch.report.html import flat, gather, render, shorten, write_report
from flexbatch.report.timeline import Timeline

ROWS = 12
PART_ROWS = 4


class Clock:
    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0

    def __call__(self) -> float:
        self.seconds += 0.75
        return self.seconds


def one_row(index: int) -> tuple[Prompt, Completion]:
    failed = index == 5
    row = Row(id=f"row-{index}", shard="a.jsonl", row=index, fields={})
    prompt = Prompt(row=row, token_ids=tuple(range(20 + index)), error="template failed" if failed else "")
    reason = "error" if failed else "stop" if index % 2 else "length"
    ids = () if failed else (1, 2, 3)
    text = "" if failed else f"<script>alert({index})</script> & more"
    return prompt, Completion(index, ids, text, reason, error=prompt.error)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output folder as a run leaves it, made by the real writer, ledger and timeline."""
    target = tmp_path / "out"
    with Ledger.open(target, {"seed": 0}, part_rows=PART_ROWS) as ledger, Timeline(target, Clock()) as timeline:
        ledger.set_total(ROWS)
        compared = {"figure": "speed", "predicted": 10.0, "measured": 12.5, "unit": "tokens/s"}
        ledger.save_plan({"lines": ["Runs 8 rows"], "comparison": [compared], "predicted": {"tokens_per_second": 10.0}})
        writer = PartWriter(target)
        for number in range(ROWS // PART_ROWS):
            rows = tuple(one_row(number * PART_ROWS + offset) for offset in range(PART_ROWS))
            completions = tuple(completion for _, completion in rows)
            tokens = {completion.index: completion.token_ids for completion in completions}
            moved = {"disk>device": 10**9}
            result = PassResult(completions, tokens, {}, 0.5, 4, 96, 12, {"weights": 0.1}, moved)
            ledger.record(result)
            part = Part(number, number * PART_ROWS, rows)
            writer.write(part)
            ledger.part_written(part)
            timeline.update(result, ledger.rows_done)
    scores = {
        "main_metric": "exact_match",
        "metrics": {"exact_match": {"mean": 0.5, "low": 0.25, "high": 0.75, "count": 8}},
    }
    (target / "metrics.json").write_text(json.dumps({"scenarios": {"copying": scores}}))
    (target / ".hydra").mkdir()
    (target / ".hydra" / "config.yaml").write_text("job: {name: copying <job>}\nmodel: {name: tiny}\n")
    (target / ".hydra" / "overrides.yaml").write_text("[job=copying, model=tiny]\n")
    return target


class Outline(HTMLParser):
    """Headings and tags that are open; a page whose tags do not close is broken."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def outline(page: str) -> Outline:
    parsed = Outline()
    parsed.feed(page)
    parsed.close()
    assert parsed.open == []
    return parsed


def test_the_report_is_one_file_with_every_section(folder: Path) -> None:
    path = write_report(folder)
    assert path == folder / "report.html"
    page = path.read_text()
    expected = ["Scores", "Throughput", "Where the time went", "Plan", "Rows", "Rows with an error", "Samples"]
    assert outline(page).headings == [*expected, "Attempts", "Configuration"]
    for part in (
        "12 of 12",
        "exact_match",
        "0.250 to 0.750",
        "template failed",
        "predicted.tokens_per_second",
        "1.25</td>",
        "<svg",
    ):
        assert part in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_text_from_a_model_cannot_act_in_the_page(folder: Path) -> None:
    page = render(gather(folder))
    assert outline(page).scripts == 0
    assert "&lt;script&gt;alert(0)" in page
    assert "copying &lt;job&gt;" in page


def test_a_run_that_has_only_begun_has_a_report_too(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "out", {}, part_rows=4):
        page = render(gather(tmp_path / "out"))
    assert "nothing yet" in page
    outline(page)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="_state"):
        write_report(tmp_path)


def test_the_report_leaves_the_data_folder_to_the_parts(folder: Path) -> None:
    before = sorted((folder / "data").iterdir())
    write_report(folder)
    assert sorted((folder / "data").iterdir()) == before
    assert list((folder / "_tmp").iterdir()) == []


def test_results_count_every_row_once(folder: Path) -> None:
    results = read_results(folder, samples=5)
    assert results.rows == ROWS
    assert results.finish_reasons == {"length": 6, "stop": 5, "error": 1}
    assert results.completion_tokens == 3 * (ROWS - 1)
    assert results.prompt_tokens == sum(20 + index for index in range(ROWS))
    assert results.longest_prompt == 31
    assert len(results.samples) == 5
    assert {sample["shard"] for sample in results.samples} == {"a.jsonl"}
    assert [row["id"] for row in results.failures] == ["row-5"]


def test_nested_figures_become_dotted_keys() -> None:
    assert list(flat({"a": {"b": 1.5, "c": []}, "d": [{"e": 2}]})) == [("a.b", "1.5"), ("a.c", "[]"), ("d[0].e", "2")]


def test_a_long_text_keeps_both_ends() -> None:
    text = shorten("start" + "x" * 10_000 + "end")
    assert text.startswith("start")
    assert text.endswith("end")
    assert len(text) < 1300
