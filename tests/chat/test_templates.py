"""How conversations read, and how the next turn follows on what the model has read."""

from __future__ import annotations

import pytest

from flexbatch.chat.command import DEFAULTS
from flexbatch.chat.templates import HumanAssistant, TokenizersOwn, choose_template, continuation
from flexbatch.composition import load_config
from flexbatch.errors import PromptError
from tests.chat.conftest import CHAT_TEMPLATE, byte_tokenizer

TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "Where?"},
]


def test_without_a_chat_template_human_and_assistant_speak_in_turn() -> None:
    text = HumanAssistant().text(TURNS)
    assert text.endswith("\nHuman: Hello\nAssistant: Good day.\nHuman: Where?\nAssistant:")
    system = HumanAssistant().text([{"role": "system", "content": "Be brief."}, *TURNS[:1]])
    assert system == "Be brief.\nHuman: Hello\nAssistant:"


@pytest.mark.parametrize("template", [HumanAssistant(), TokenizersOwn(byte_tokenizer(CHAT_TEMPLATE))])
def test_the_next_turn_follows_on_what_was_fed_and_said(template: HumanAssistant | TokenizersOwn) -> None:
    fed, whole = template.text(TURNS[:1]), template.text(TURNS)
    rest = continuation(fed, " Good day. ", whole)
    assert rest is not None
    assert "Where?" in rest
    assert "day" not in rest


def test_a_template_that_rewrites_history_is_noticed() -> None:
    assert continuation("ab", "c", "xbcd") is None
    assert continuation("ab", "thought", "ab said d") is None
    assert continuation("ab", "c", "ab c d") == " d"


def test_the_tokenizers_template_is_taken_where_there_is_one() -> None:
    plain, own = byte_tokenizer(), byte_tokenizer(CHAT_TEMPLATE)
    assert isinstance(choose_template(load_config(DEFAULTS), plain), HumanAssistant)
    assert isinstance(choose_template(load_config(DEFAULTS), own), TokenizersOwn)
    assert isinstance(choose_template(load_config([*DEFAULTS, "chat.template=human"]), own), HumanAssistant)


def test_a_template_that_is_not_there_or_fails_is_an_error() -> None:
    with pytest.raises(PromptError, match="no chat template"):
        choose_template(load_config([*DEFAULTS, "chat.template=tokenizer"]), byte_tokenizer())
    refusing = byte_tokenizer("{{ raise_exception('no system here') }}")
    with pytest.raises(PromptError, match="no system here"):
        choose_template(load_config([*DEFAULTS, "prompt.system=x"]), refusing)
