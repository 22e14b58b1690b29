"""What is shown of an answer while it comes, and where it ends."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.chat.answer import AnswerText, beginning
from tests.chat.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()


def tokens_of(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return found


@settings(deadline=None)
@given(st.text(max_size=40), st.lists(st.integers(1, 5), max_size=40))
def test_the_pieces_make_the_whole_text_however_the_tokens_come(text: str, steps: list[int]) -> None:
    answer, tokens, shown = AnswerText(TOKENIZER, ()), tokens_of(text), ""
    for step in [*steps, len(tokens)]:
        piece, tokens = tokens[:step], tokens[step:]
        shown += answer.add(piece)
        assert "\ufffd" not in shown or "\ufffd" in text, "half a character is not shown"
    assert shown + answer.finish() == answer.text == text.strip()


@settings(deadline=None)
@given(st.text("ab\n ", max_size=12), st.text("ab\n:H ", max_size=12))
def test_nothing_of_a_stop_string_is_ever_shown(before: str, after: str) -> None:
    stop = "\nHu"
    answer, shown = AnswerText(TOKENIZER, [stop]), ""
    for token in tokens_of(before + stop + after):
        shown += answer.add([token])
        if answer.stopped:
            break
    assert answer.stopped
    assert shown == before.strip() == answer.text
    kept, left_out = answer.kept_tokens()
    assert answer.tokens[:kept] == tokens_of(before)
    assert left_out == ""


def test_a_token_that_goes_across_the_stop_string_is_given_back_as_text() -> None:
    class Wide:
        def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
            return "".join({1: "Good", 2: " day.\nHu", 3: "man:"}[token] for token in tokens)

    answer = AnswerText(Wide(), ["\nHuman:"])
    assert [answer.add([token]) for token in (1, 2, 3)] == ["Good", " day.", ""]
    assert answer.stopped
    assert answer.kept_tokens() == (1, " day.")


@settings(deadline=None)
@given(st.text("ab", max_size=8), st.text("ab", min_size=1, max_size=4))
def test_beginning_is_the_longest_end_that_may_become_the_stop_string(text: str, stop: str) -> None:
    sizes = [size for size in range(1, len(stop)) if text.endswith(stop[:size])]
    assert beginning(text, stop) == max(sizes, default=0)
