"""Rolling perplexity: every token of a text is predicted once, with all the context that fits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.config import JobConfig
from flexbatch.errors import ConfigError, DataError
from flexbatch.evaluation import Evaluation, Limits, build_evaluation
from flexbatch.evaluation.helm_files import run_files
from flexbatch.evaluation.windows import windows
from flexbatch.records import Prompt
from tests.evaluation.space_tokenizer import SpaceTokenizer

TOKENIZER = SpaceTokenizer(special=True)
TEXT = " ".join(f"word{number}" for number in range(23))


def evaluation(tmp_path: Path, **options: Any) -> Evaluation:
    (tmp_path / "one.txt").write_text(TEXT)
    (tmp_path / "two.txt").write_text("short text")
    data = {"kind": "texts", "path": str(tmp_path)}
    settings = {"data": data, "adapter": {"method": "language_modeling"}, "prompt_tokens": 7, **options}
    return build_evaluation(JobConfig(kind="helm_eval", scenarios={"texts": settings}))


def scored_row(prompt: Prompt, **changes: Any) -> dict[str, Any]:
    ids = list(prompt.token_ids[-prompt.score_tokens :])
    same = {"id": prompt.row.id, "shard": prompt.row.shard, "row": prompt.row.row}
    return {
        **prompt.carried,
        **same,
        "prompt_tokens": len(prompt.token_ids),
        "completion": "",
        "completion_ids": ids,
        "finish_reason": "stop",
        "error": "",
        "logprobs": [-0.5] * len(ids),
    } | changes


@given(st.integers(0, 60), st.integers(2, 20), st.booleans())
def test_every_token_is_scored_once_and_no_window_is_too_long(length: int, room: int, special: bool) -> None:
    tokens = list(range(1, length + 1))
    prefix = (0,) if special else ()
    made = list(windows(prefix, tokens, room))
    scored = [token for prompt, count in made for token in prompt[-count:]]
    assert scored == (tokens if special else tokens[1:])
    assert all(0 < count < len(prompt) <= room for prompt, count in made)
    assert all(len(prompt) == room for prompt, _ in made[:-1])
    for prompt, _ in made[1:]:  # a window is a piece of the text, with as much context as fits
        assert list(prompt) == tokens[prompt[0] - 1 : prompt[-1]]
        assert len(prompt) == room


def test_windows_of_a_text_follow_one_another(tmp_path: Path) -> None:
    made = list(evaluation(tmp_path).prompts(TOKENIZER, Limits()))
    assert [prompt.carried["completion_index"] for prompt in made] == [0, 1, 2, 3, 0]
    assert len({prompt.row.id for prompt in made}) == 5
    assert sum(prompt.score_tokens for prompt in made) == 23 + 2
    assert all(prompt.sampling.max_new_tokens == 0 for prompt in made)


def test_the_score_is_that_of_the_whole_texts(tmp_path: Path) -> None:
    ready = evaluation(tmp_path)
    scores = ready.score([scored_row(prompt) for prompt in ready.prompts(TOKENIZER, Limits())], TOKENIZER).scenarios[0]
    size = len(TEXT) + len("short text")
    assert scores.derived["perplexity"] == pytest.approx(math.exp(0.5))
    assert scores.derived["bits_per_byte"] == pytest.approx(0.5 * 25 / size / math.log(2))
    assert scores.instances == 2
    each = [0.5 * 23 / len(TEXT) / math.log(2), 0.5 * 2 / 10 / math.log(2)]
    assert scores.estimates["bits_per_byte"].mean == pytest.approx(sum(each) / 2)


def test_a_text_of_which_a_window_failed_is_left_out(tmp_path: Path) -> None:
    ready = evaluation(tmp_path)
    failed = {"completion_ids": [], "logprobs": [], "finish_reason": "error", "error": "out of luck"}
    rows = [
        scored_row(prompt, **(failed if place == 1 else {}))
        for place, prompt in enumerate(ready.prompts(TOKENIZER, Limits()))
    ]
    scores = ready.score(rows, TOKENIZER)
    assert scores.scenarios[0].errors == 1
    assert scores.scenarios[0].estimates["bits_per_byte"].count == 1
    assert scores.scenarios[0].derived["perplexity"] == pytest.approx(math.exp(0.5))
    json.dumps(scores.metrics(), allow_nan=False)


def test_helms_files_have_a_request_for_each_window(tmp_path: Path) -> None:
    ready = evaluation(tmp_path)
    rows = [scored_row(prompt) for prompt in ready.prompts(TOKENIZER, Limits())]
    [(scenario, scores)] = ready.instance_scores(rows, TOKENIZER)
    files = run_files(scenario, scores, TOKENIZER, "flexbatch/m")
    assert len(files["scenario_state.json"]["request_states"]) == 5
    assert "perplexity" in {stat["name"]["name"] for stat in files["stats.json"]}


def test_no_other_metric_fits_and_a_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exact_match does not fit language_modeling"):
        evaluation(tmp_path, metrics=["exact_match"])
    with pytest.raises(DataError, match=r"missing\.txt"):
        evaluation(tmp_path, data={"kind": "texts", "path": str(tmp_path / "missing.txt")})
