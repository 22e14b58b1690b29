"""`opt-tiny` is small, is a real OPT, and solves its tasks only by attending to the prompt."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM

from flexbatch.embedded import MODEL_FOLDER
from flexbatch.embedded.score import complete, scores
from flexbatch.embedded.tasks import TASKS, evaluation_examples

TOKENIZER = AutoTokenizer.from_pretrained(MODEL_FOLDER)
MODEL = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)


def test_the_model_folder_is_at_most_eight_megabytes() -> None:
    assert sum(file.stat().st_size for file in MODEL_FOLDER.rglob("*")) <= 8_000_000


def test_transformers_loads_it_as_opt_with_room_for_512_and_64_tokens() -> None:
    assert isinstance(MODEL, OPTForCausalLM)
    assert MODEL.config.max_position_embeddings >= 512 + 64
    assert (MODEL_FOLDER / "README.md").is_file()


@pytest.mark.parametrize("name", ["field_extraction", "word_choice"])
def test_it_answers_at_least_nine_in_ten_held_out_questions(name: str) -> None:
    assert scores(MODEL, TOKENIZER, TASKS[name], 60, 5) >= 0.90


@pytest.fixture
def shifted_positions() -> Iterator[None]:
    """Every position's embedding replaced by another one's."""
    table = MODEL.model.decoder.embed_positions.weight
    kept = table.detach().clone()
    with torch.no_grad():
        table.copy_(kept.flip(0))
        yield
        table.copy_(kept)


@pytest.mark.usefixtures("shifted_positions")
@pytest.mark.parametrize("name", ["field_extraction", "word_choice"])
def test_its_score_collapses_when_positions_are_wrong(name: str) -> None:
    assert scores(MODEL, TOKENIZER, TASKS[name], 20, 2) < 0.5


def test_its_score_collapses_when_it_cannot_see_the_prompt() -> None:
    examples = evaluation_examples(TASKS["field_extraction"], 20, 2, 7)
    blind = [asked.prompt.rsplit("\n", 2)[-1] for asked in examples]
    completions = complete(MODEL, TOKENIZER, blind, 16)
    assert sum(c == asked.answer.strip() for c, asked in zip(completions, examples, strict=True)) < 5
