"""A trained model on real text, through the command line: the text that Transformers writes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.pipeline.command_line import CommandLine, Moment
from tests.pipeline.jobs import output_rows, overrides, part_files

ROWS, NEW_TOKENS, LONGEST = 48, 24, 160

pytestmark = [pytest.mark.realdata, pytest.mark.slow]


@pytest.fixture(scope="module")
def reviews(realdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first reviews, in three files."""
    folder = tmp_path_factory.mktemp("reviews")
    lines = (realdata / "movie_reviews" / "reviews.jsonl").read_text().splitlines()[:ROWS]
    for shard in range(3):
        (folder / f"reviews-{shard}.jsonl").write_text("\n".join(lines[shard * 16 : (shard + 1) * 16]) + "\n")
    return folder


def test_stories_about_reviews_killed_once_are_those_of_transformers(
    command_line: CommandLine, realdata: Path, reviews: Path, tmp_path: Path
) -> None:
    model_path = realdata / "stories260k"
    command = overrides(
        model_path, reviews, tmp_path / "run",
        prompt__max_tokens=LONGEST, prompt__truncation="right", generation__max_new_tokens=NEW_TOKENS,
        output__part_rows=12, offload__slots=12, offload__policy="manual", offload__percent="[20,40,40,30,50,25]",
    )  # fmt: skip
    killed = command_line.run(*command, cwd=tmp_path, moment=Moment("pass", count=40))
    assert killed.code == -signal.SIGKILL, killed.err
    assert 0 < len(part_files(tmp_path / "run")) < 4
    finished = command_line.run(*command, cwd=tmp_path)
    assert finished.code == 0, finished.err
    rows = {(row["shard"], row["row"]): row for row in output_rows(tmp_path / "run")}
    assert len(rows) == ROWS

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    for number in range(0, ROWS, 6):
        row = rows[f"reviews-{number // 16}.jsonl", number % 16]
        text = json.loads((reviews / row["shard"]).read_text().splitlines()[row["row"]])["text"]
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :LONGEST]
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        want = out[0, ids.shape[1] :]
        assert row["prompt_tokens"] == ids.shape[1]
        assert row["completion"] == tokenizer.decode(want, skip_special_tokens=True), row["id"]
        assert row["completion_ids"] == want.tolist()


def test_a_story_reads_as_one(command_line: CommandLine, realdata: Path, tmp_path: Path) -> None:
    (tmp_path / "start.jsonl").write_text(json.dumps({"text": "Once upon a time, there was a little"}) + "\n")
    model_path = realdata / "stories260k"
    command = overrides(model_path, tmp_path / "start.jsonl", tmp_path / "run", generation__max_new_tokens=40)
    finished = command_line.run(*command, cwd=tmp_path)
    assert finished.code == 0, finished.err
    (row,) = output_rows(tmp_path / "run")
    assert "girl named Lily" in row["completion"]
