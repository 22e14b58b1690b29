"""Prompts from a file, answered in another process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexbatch.integrations.worker import main

DEFAULTS = {"max_tokens": 6, "temperature": 0.0, "top_p": 1.0, "stop": [], "seed": 0, "echo": False, "chat": None}


def ask(model: Path, folder: Path, *prompts: dict[str, Any], options: tuple[str, ...] = ()) -> int:
    lines = [json.dumps({**DEFAULTS, **prompt}) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    names = [folder / "prompts.jsonl", folder / "answers.jsonl", folder / "kept", model]
    return main([*map(str, names), "offload.reader=buffered", *options])


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_prompts_are_continued_and_echoed_in_their_order(small_model: Path, tmp_path: Path) -> None:
    echo = {"prompt": "a man", "max_tokens": 0, "echo": True}
    assert ask(small_model, tmp_path, {"prompt": "hello"}, echo, {"prompt": "hello", "stop": ["\x00never"]}) == 0
    said, echoed, again = answers(tmp_path)
    assert (len(said["tokens"]), said["finish_reason"]) == (6, "length")
    assert all(logprob < 0 for _, logprob in said["tokens"])
    assert echoed["text"] == "a man"
    assert [text for text, _ in echoed["tokens"]] == list("a man")
    assert echoed["tokens"][0][1] == 0.0
    assert all(logprob < 0 for _, logprob in echoed["tokens"][1:])
    assert [token for token, _ in again["tokens"]] == [token for token, _ in said["tokens"]]
    assert [logprob for _, logprob in again["tokens"]] == pytest.approx(
        [logprob for _, logprob in said["tokens"]], abs=1e-4
    )


def test_a_stop_string_ends_an_answer_and_is_still_in_it(small_model: Path, tmp_path: Path) -> None:
    ask(small_model, tmp_path, {"prompt": "hello", "max_tokens": 12})
    (whole,) = answers(tmp_path)
    stop = whole["tokens"][3][0]
    ask(small_model, tmp_path, {"prompt": "hello", "max_tokens": 12, "stop": [stop]})
    (cut,) = answers(tmp_path)
    assert cut["finish_reason"] == "stop"
    assert cut["tokens"][-1][0] == stop
    assert cut["tokens"] == whole["tokens"][: len(cut["tokens"])]


@pytest.mark.parametrize(
    ("prompt", "options", "code", "message"),
    [
        ({"prompt": "a", "echo": True, "max_tokens": 3}, (), 2, "max_tokens 0"),
        ({"prompt": "a"}, ("offload.slots=none",), 2, "offload.slots"),
        ({"prompt": "a"}, ("model.weights=dummy",), 2, "random numbers"),
    ],
)
def test_what_is_wrong_is_said_on_standard_error(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    prompt: dict[str, Any], options: tuple[str, ...], code: int, message: str,
) -> None:  # fmt: skip
    assert ask(small_model, tmp_path, prompt, options=options) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()
