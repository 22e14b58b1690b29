"""Whatever tokens are drawn among the allowed ones, the completion parses, validates and ends in time."""

from __future__ import annotations

import json
import random
import string
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flexbatch.engine.growing import GrowingRow
from flexbatch.engine.reading import choose_tokens
from flexbatch.errors import ConfigError, EngineError
from flexbatch.evaluation.constraints import Constraint, compile_constraint
from flexbatch.evaluation.fields import Target
from flexbatch.evaluation.grammar import ascii_classes, check_grammar
from flexbatch.records import Request, Sampling

ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "total": {"type": "number"},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
        "state": {"enum": ["open", "paid", "sent back"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["name", "total", "state"],
    "additionalProperties": False,
}
NESTED: dict[str, Any] = {
    "type": "object",
    "properties": {"lines": {"type": "array", "minItems": 1, "items": ORDER}},
    "required": ["lines"],
    "additionalProperties": False,
}
TARGETS = {
    "object": Target(schema=ORDER),
    "nested": Target(schema=NESTED),
    "array": Target(schema={"type": "array", "items": {"type": "boolean"}}),
    "choices": Target(choices=("yes", "no", 'with "quotes"')),
    "expression": Target(regex=r"[A-Z]{2}-\d{1,4}(/[a-z\s]+)?"),
    "pattern": Target(schema={"type": "string", "pattern": r"^\w{2}\d{3}$"}),
}
END = 1


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer such as OPT's, trained on the spot: quotes, braces and words grow together in it."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    order = json.dumps(
        {"lines": [{"name": "Ada", "total": 12.5, "count": 3, "state": "paid", "tags": ["new", "gift"]}]}
    )
    bare.train_from_iterator([order * 3, "yes no open sent back", "the quick brown fox naïve café 東京" * 2], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>", pad_token="<pad>")


@cache
def compiled(name: str, max_new_tokens: int) -> Constraint:
    size = len(tokenizer()) + 24  # models pad their vocabulary
    return compile_constraint(
        TARGETS[name], tokenizer(), vocabulary_size=size, end_tokens=[END], max_new_tokens=max_new_tokens
    )


def wander(constraint: Constraint, seed: int, resumed: list[int] | None = None) -> list[int]:
    """Tokens drawn at random among the allowed ones until the end token or the limit."""
    rng = random.Random(seed)
    state = constraint.start()
    tokens = list(resumed or [])
    for token in tokens:
        state.advance(token)
    while len(tokens) < constraint.max_new_tokens:
        choices = state.allowed().nonzero().flatten().tolist()
        token = next(each for each in rng.sample(choices, len(choices)) if state.leaves_room(each))
        state.advance(token)
        if token == END:
            break
        tokens.append(token)
    return tokens


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(TARGETS)), seed=st.integers(0, 10_000), spare=st.sampled_from([0, 1, 5, 20, 60]))
def test_every_way_through_the_allowed_tokens_ends_valid_and_in_time(name: str, seed: int, spare: int) -> None:
    constraint = compiled(name, 70 + spare)
    text = tokenizer().decode(wander(constraint, seed), skip_special_tokens=True)
    assert TARGETS[name].read(text) is not None, text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("pairs", ["([a-z0-9]{2})*", "([a-z0-9]{2})+"])
def test_a_model_that_would_never_stop_is_brought_to_a_valid_end(pairs: str, temperature: float) -> None:
    target, limit = Target(regex=pairs), 5
    constraint = compile_constraint(
        target, tokenizer(), vocabulary_size=len(tokenizer()), end_tokens=[END], max_new_tokens=limit
    )
    request = Request(0, (1, 2), Sampling(limit, temperature=temperature, seed=3))
    row = GrowingRow(request, [], [], constraint.start())
    wish = torch.zeros(len(tokenizer()))
    wish[[tokenizer().convert_tokens_to_ids(letter) for letter in string.ascii_lowercase]] = 9.0
    while not row.tokens or (row.tokens[-1] != END and len(row.tokens) < limit):
        [(token, _)] = choose_tokens([row], [END], wish[None].clone())
        row.add(token, None)
    text = tokenizer().decode(row.tokens, skip_special_tokens=True)
    assert len(text) >= limit - 1
    assert target.read(text) is not None


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_resumed_row_goes_on_where_it_was(name: str) -> None:
    constraint = compiled(name, 80)
    tokens = wander(constraint, seed=3)
    for cut in (1, len(tokens) // 2):
        again = wander(constraint, seed=4, resumed=tokens[:cut])
        assert TARGETS[name].read(tokenizer().decode(again)) is not None


def test_the_mask_has_the_size_of_the_logits_and_rows_do_not_share_it() -> None:
    constraint = compiled("choices", 80)
    first, second = constraint.start(), constraint.start()
    before = second.allowed()
    assert before.dtype == torch.bool
    assert before.shape == (len(tokenizer()) + 24,)
    assert not before[len(tokenizer()) :].any()
    first.advance(int(before.nonzero()[0]))
    assert torch.equal(second.allowed(), before)


def test_only_the_end_token_may_follow_a_complete_answer() -> None:
    state = compiled("choices", 80).start()
    for token in tokenizer()("yes")["input_ids"]:
        state.advance(token)
    assert state.allowed().nonzero().flatten().tolist() == [END]


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    state = compiled("choices", 80).start()
    with pytest.raises(EngineError, match="does not fit the constraint"):
        state.advance(tokenizer()("{")["input_ids"][0])


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target(schema={"type": "integer", "minimum": 5, "maximum": 3}), "job.schema cannot be enforced"),
        (Target(schema={"type": "object", "properties": {"a": False}, "required": ["a"]}), "job.schema"),
        (Target(schema={"not": {"type": "string"}}), "job.schema cannot be enforced"),
        (Target(regex="(?=a)b"), "job.regex cannot be enforced"),
    ],
)
def test_what_nothing_can_satisfy_is_a_config_error(target: Target, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_grammar(target)
    assert words in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"\d+", "[0-9]+"),
        (r"[\d.]\w", "[0-9.][0-9A-Za-z_]"),
        (r"\\d[^\s]", r"\\d[^ \t\n\r\f\v]"),
        (r"\D\[\d\]", r"\D\[[0-9]\]"),
    ],
)
def test_character_classes_are_enforced_in_ascii(pattern: str, expected: str) -> None:
    assert ascii_classes(pattern) == expected


def test_too_few_new_tokens_for_any_valid_output_are_refused() -> None:
    with pytest.raises(ConfigError, match="shortest valid output"):
        compile_constraint(
            TARGETS["object"], tokenizer(), vocabulary_size=len(tokenizer()), end_tokens=[END], max_new_tokens=10
        )
