"""The tokenizer has OPT's conventions, and the tokens that the tasks rely on."""

from __future__ import annotations

from random import Random

import pytest
from transformers import AutoTokenizer

from flexbatch.embedded import MODEL_FOLDER
from flexbatch.embedded.tasks import TASKS, training_example
from flexbatch.embedded.tokenizer import train_tokenizer

TOKENIZER = AutoTokenizer.from_pretrained(MODEL_FOLDER)


def test_special_tokens_have_the_ids_of_opt() -> None:
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (1, 2, 2)
    assert TOKENIZER("Target:")["input_ids"][0] == 2


@pytest.mark.parametrize("text", ["naïve café — 12.50 €", "\n\n  two  spaces\t", "日本語 🙂"])
def test_any_text_survives_the_round_trip(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("letter", "ABCD")
def test_a_choice_letter_is_one_token_so_that_max_tokens_1_is_enough(letter: str) -> None:
    assert len(TOKENIZER(f" {letter}", add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_prompt_and_its_answer_split_where_training_split_them(name: str) -> None:
    def ids(text: str) -> list[int]:
        return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])

    for seed in range(20):
        example = training_example(Random(seed), TASKS[name], 5)
        assert ids(example.prompt) + ids(example.answer) == [i for text, _ in example.pieces for i in ids(text)]


def test_training_the_tokenizer_again_gives_the_committed_one() -> None:
    assert train_tokenizer(0).get_vocab() == TOKENIZER.get_vocab()
