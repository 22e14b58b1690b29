"""The tokenizer of `opt-tiny`: byte-level BPE in OPT's own form, small, trained on the generated text."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flexbatch.embedded.architecture import POSITIONS
from flexbatch.embedded.tasks import TASKS, training_example

VOCABULARY_SIZE = 1024
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
"""In this order OPT's ids: `<pad>` is 1 and `</s>`, which opens and ends a text, is 2."""


def train_tokenizer(seed: int, examples_per_task: int = 1500) -> PreTrainedTokenizerFast:
    """Learns the merges from generated prompts. Digits never merge, so that a number is copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = Random(f"tokenizer-{seed}")
    texts = [
        text
        for task in TASKS.values()
        for _ in range(examples_per_task)
        for text, _ in training_example(rng, task, 1).pieces
    ]
    tokenizer.train_from_iterator(texts, trainer)
    # Without a digit merge the plain byte-level split gives the same digits, and is what every OPT tokenizer has.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    opening = ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[opening]
    )
    wrap: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = wrap(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
    )
    return wrapped


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes `tokenizer.json` and its config, with the class name that every version of Transformers knows."""
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    fields = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(fields, indent=2) + "\n")


def word_numbers(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """For each token id a number that it shares with the same text with or without a leading space."""
    numbers: dict[str, int] = {}
    texts = [token.removeprefix("\u0120") for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    return [numbers.setdefault(text, len(numbers)) for text in texts]
