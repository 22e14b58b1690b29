"""What may come next, guessed without a model: the continuation of the last time that the newest tokens were seen.

Prompt lookup decoding (Saxena, github.com/apoorvumang/prompt-lookup-decoding; the same idea as "inference with
reference", arXiv 2304.04487). A guess is fed behind the newest token in one pass, and only what the model itself would
have said of it is kept: a pass whose time goes into moving weights then brings several tokens instead of one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

LONGEST_DRAFT = 16
LONGEST_MATCH = 4
NUMBER = array("I").itemsize
MOST_REMEMBERED = 4096  # tokens
END = 2**32 - 1  # stands for no token

# What is believed of a guess before any was tried, as so many tokens right and as many wrong; and how much of what was
# seen counts at each new step, so that a change of subject is noticed.
PRIOR = 1.0
MEMORY = 0.95


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next, found by a match of `matched` tokens (0: there is none)."""

    tokens: tuple[int, ...] = ()
    matched: int = 0


class Remembered:
    """What was said elsewhere, the newest last, with `END` after each."""

    def __init__(self) -> None:
        self.tokens = array("I")

    def add(self, tokens: Sequence[int]) -> None:
        self.tokens.extend([*tokens, END])
        del self.tokens[: max(0, len(self.tokens) - MOST_REMEMBERED)]


def draft(tokens: Sequence[int], elsewhere: Sequence[int] = ()) -> Draft:
    """The continuation of the longest run at the end, of up to `LONGEST_MATCH` tokens, that was seen before; of its
    last place if there are several. What is repeated goes on being repeated. If not in `tokens`, runs of two and more
    are looked for `elsewhere`."""
    text, other = array("I", tokens).tobytes(), array("I", elsewhere).tobytes()
    for size in range(min(LONGEST_MATCH, len(tokens)), 0, -1):
        run = text[-size * NUMBER :]
        if after := _after_last(text, run):
            period = len(tokens) - after
            return Draft(tuple(tokens[after + place % period] for place in range(LONGEST_DRAFT)), size)
        if size > 1 and (after := _after_last(other, run)) and elsewhere[after] != END:
            return Draft(tuple(takewhile(END.__ne__, elsewhere[after : after + LONGEST_DRAFT])), size)
    return Draft()


def _after_last(text: bytes, run: bytes) -> int:
    """The number of the token after the last place where `run` stands in `text` with a token after it; 0 if there is
    none."""
    end = len(text) - NUMBER
    while (at := text.rfind(run, 0, end)) >= 0:
        if at % NUMBER == 0:
            return (at + len(run)) // NUMBER
        end = at + len(run) - 1
    return 0


def draft_length(pass_seconds: Sequence[float], acceptance: float) -> int:
    """How many guessed tokens to feed: as many as bring the most tokens per second.

    `pass_seconds[count]` is how long a pass takes that feeds the newest token and `count` guesses. Each guess is right
    with probability `acceptance` if those before it were, so `count` of them bring 1 + a + a^2 + ... + a^count tokens.
    """
    best, best_rate, expected = 0, 0.0, 0.0
    for count, seconds in enumerate(pass_seconds):
        expected += acceptance**count
        if expected / seconds > best_rate * (1 + 1e-9):
            best, best_rate = count, expected / seconds
    return best


class Acceptance:
    """How often guesses were right, for each length of match."""

    def __init__(self) -> None:
        self._right = [0.0] * (LONGEST_MATCH + 1)
        self._wrong = [0.0] * (LONGEST_MATCH + 1)

    def share(self, matched: int) -> float:
        right, wrong = self._right[matched] + PRIOR, self._wrong[matched] + PRIOR
        return right / (right + wrong)

    def learn(self, draft: Draft, came: Sequence[int], memory: float = MEMORY) -> None:
        """`came` is what the model said, one token or more; a guess that was not fed teaches too, by its first. Of what
        was seen before `memory` stays."""
        if not draft.tokens:
            return
        right = agreeing(draft.tokens, came)
        compared = min(len(draft.tokens), len(came))
        place = draft.matched
        self._right[place] = self._right[place] * memory + right
        self._wrong[place] = self._wrong[place] * memory + (right < compared)


def agreeing(guessed: Sequence[int], said: Sequence[int]) -> int:
    """How many tokens the two have in common from the start."""
    count = 0
    for one, other in zip(guessed, said, strict=False):
        if one != other:
            break
        count += 1
    return count
