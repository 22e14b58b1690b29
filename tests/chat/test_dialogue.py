"""A dialogue's answers are what Transformers makes of the whole conversation, and nothing is read twice."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexbatch.chat.command import DEFAULTS
from flexbatch.chat.dialogue import Dialogue, Speaker
from flexbatch.chat.planning import opened, pass_times, plan_conversation, seconds_with_guesses
from flexbatch.chat.templates import PREAMBLE, choose_template
from flexbatch.composition import load_config
from flexbatch.data.prompts import sampling_of
from flexbatch.engine.conversation import Conversation
from flexbatch.engine.lookup import draft_length
from flexbatch.errors import CapacityError, ConfigError
from flexbatch.stages.model import find_model
from tests.chat.conftest import FORGETFUL_TEMPLATE, byte_tokenizer

TOKENIZER = byte_tokenizer()

PLACEMENTS = {
    "device": ("offload=all-device",),
    "mixed": ("offload.policy=manual", "offload.percent=[30,30,40,30,20,50]"),
    "disk": ("offload=all-disk",),
}


def never() -> bool:
    return False


@contextmanager
def talking(folder: Path, cache: Path, *overrides: str, context: int = 400) -> Iterator[tuple[Dialogue, Conversation]]:
    config = load_config(
        [
            *DEFAULTS,
            "model=hf",
            f"model.path={folder}",
            f"model.cache_dir={cache}",
            "offload.reader=buffered",
            "generation.max_new_tokens=12",
            *overrides,
        ]
    )
    model = find_model(config)
    plan = plan_conversation(config, model, context)
    speaker = Speaker(
        model.tokenizer,
        choose_template(config, model.tokenizer),
        sampling_of(config.generation, config.generation.seed),
        model.end_tokens,
        pass_times(config, plan),
        config.prompt.system,
    )
    with opened(config, model, plan, context) as conversation:
        yield Dialogue(speaker, conversation), conversation


def ask(dialogue: Dialogue, text: str) -> str:
    return "".join(dialogue.ask(text, never))


def greedy(folder: Path, tokens: list[int], new: int) -> list[int]:
    """Transformers' own answer, without the end of sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([tokens])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=1)
    return list(takewhile(lambda token: token != 2, out[0, len(tokens) :].tolist()))


# What a turn adds to the text, first and later.
TURNS = {
    "opt": (PREAMBLE + "\nHuman: {}\nAssistant:", "\nHuman: {}\nAssistant:"),
    "llama": ("<|user|>{}</s>\n<|assistant|>", "</s>\n<|user|>{}</s>\n<|assistant|>"),
}


@pytest.mark.parametrize("lookup", ["true", "false"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", TURNS)
def test_answers_are_transformers_own_and_history_is_read_once(
    family: str, placement: str, lookup: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(family)
    overrides = (*PLACEMENTS[placement], f"chat.lookup={lookup}")
    expected: list[int] = []
    with talking(folder, tmp_path, *overrides) as (dialogue, conversation):
        for text in ("abc abc", "what? abc", "abc abc"):
            first, later = TURNS[family]
            turn = (later if expected else first).format(text)
            expected += TOKENIZER(turn, add_special_tokens=False)["input_ids"]
            said = greedy(folder, expected, 12)
            assert ask(dialogue, text) == TOKENIZER.decode(said, skip_special_tokens=True).strip()
            expected += said
            assert conversation.tokens == expected
        counts = conversation.counts
        assert (counts.guessed_tokens > 0) is (lookup == "true")
        # Everything once, but for an end of sequence that was fed as a guess and the newest token, which waits.
        assert counts.fed_tokens + counts.right_tokens <= len(expected) + 3


def test_the_system_message_opens_the_conversation(llama: Path, tmp_path: Path) -> None:
    with talking(llama, tmp_path, "prompt.system=Be brief.") as (dialogue, conversation):
        ask(dialogue, "abc")
        start = TOKENIZER("<|system|>Be brief.</s>\n<|user|>abc</s>\n<|assistant|>", add_special_tokens=False)
        assert conversation.tokens[: len(start["input_ids"])] == start["input_ids"]
        dialogue.reset()
        assert dialogue.messages == [{"role": "system", "content": "Be brief."}]


def test_reset_forgets(opt: Path, tmp_path: Path) -> None:
    with talking(opt, tmp_path) as (dialogue, conversation):
        first = ask(dialogue, "abc abc")
        ask(dialogue, "other things")
        dialogue.reset()
        assert conversation.tokens == []
        assert ask(dialogue, "abc abc") == first
        assert len(dialogue.messages) == 2


def test_a_template_that_rewrites_history_is_read_again_from_there_on(tmp_path: Path, llama: Path) -> None:
    folder = tmp_path / "forgetful"
    shutil.copytree(llama, folder)
    byte_tokenizer(FORGETFUL_TEMPLATE).save_pretrained(folder)
    with talking(folder, tmp_path) as (dialogue, conversation):
        ask(dialogue, "abc")
        ask(dialogue, "def")
        text = TOKENIZER.decode(conversation.tokens)
        assert text.startswith(f"<|user|>abc</s>\n<|assistant|>{dialogue.messages[1]['content'][:8]}</s>\n<|user|>def")


def test_an_answer_ends_before_a_stop_string_and_the_model_forgets_it(opt: Path, tmp_path: Path) -> None:
    with talking(opt, tmp_path) as (dialogue, _):
        free = ask(dialogue, "abc abc")
    stop = free[3:5]
    with talking(opt, tmp_path) as (dialogue, conversation):
        dialogue._stops = (stop,)
        said = ask(dialogue, "abc abc")
        assert said == free[: free.index(stop)].strip()
        assert TOKENIZER.decode(conversation.tokens).endswith("Assistant:" + free[: free.index(stop)])


def test_an_interrupted_answer_stays_as_far_as_it_came(opt: Path, tmp_path: Path) -> None:
    with talking(opt, tmp_path, "chat.lookup=false") as (dialogue, conversation):
        free = ask(dialogue, "abc abc")
        dialogue.reset()
        asked = itertools.chain([False] * 20, itertools.repeat(True))
        said = "".join(dialogue.ask("abc abc", lambda: next(asked)))
        assert dialogue.ending == "interrupted"
        assert said
        assert free.startswith(said)
        assert len(said) < len(free)
        assert dialogue.messages[-1] == {"role": "assistant", "content": said}
        before = list(conversation.tokens)
        assert "".join(dialogue.ask("more", lambda: True)) == ""
        assert dialogue.messages[-1] == {"role": "assistant", "content": said}, "the message is taken back"
        assert conversation.tokens == before


def test_a_message_without_room_is_refused_and_changes_nothing(opt: Path, tmp_path: Path) -> None:
    with talking(opt, tmp_path, context=200) as (dialogue, conversation):
        ask(dialogue, "abc")
        tokens, messages = list(conversation.tokens), dialogue.messages
        with pytest.raises(CapacityError, match="of 200 are taken"):
            ask(dialogue, "x" * 200)
        assert (conversation.tokens, dialogue.messages) == (tokens, messages)
        assert ask(dialogue, "y")


def test_an_answer_that_fills_the_context_says_so(opt: Path, tmp_path: Path) -> None:
    with talking(opt, tmp_path, "generation.max_new_tokens=500", context=180) as (dialogue, conversation):
        ask(dialogue, "abc")
        assert dialogue.ending == "context"
        assert conversation.room == 0


def test_text_that_is_not_unicode_is_refused(opt: Path, tmp_path: Path) -> None:
    with talking(opt, tmp_path) as (dialogue, _):
        with pytest.raises(ConfigError, match="Unicode"):
            ask(dialogue, "\ud800")
        assert dialogue.messages == []


def test_guesses_are_fed_where_the_weights_come_from_disk(opt: Path, tmp_path: Path) -> None:
    config = load_config(
        ["job=generate", "model=opt-6.7b", "model.weights=dummy", "hardware=cpu-2core", f"model.tokenizer={opt}"]
    )
    config.offload.policy, config.offload.percent = "manual", [0, 0, 100, 0, 100, 0]
    plan = plan_conversation(config, find_model(config), 1024)
    seconds = seconds_with_guesses(plan)
    assert draft_length(seconds, 0.7) >= 4
    assert list(seconds) == sorted(seconds)
