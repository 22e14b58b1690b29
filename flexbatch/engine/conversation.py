"""One row that goes on: what it has read stays in the KV cache, and only what is new is fed.

The arena has one slot, and token number i of the conversation lies in column i. Forgetting tokens is not reading their
columns any more: the next ones overwrite them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from flexbatch.engine.calls import Caller
from flexbatch.engine.kv_arena import KVArena
from flexbatch.engine.lookup import Acceptance, agreeing, draft, draft_length
from flexbatch.engine.micro_batch import MicroBatch, walk
from flexbatch.engine.model import SteppedModel, Stop
from flexbatch.engine.sampling import choose
from flexbatch.engine.storage import Storage
from flexbatch.engine.weights import Weights
from flexbatch.errors import EngineError, Interrupted
from flexbatch.plan.memory_need import MICRO_BATCH_TOKENS
from flexbatch.records import Sampling

NO_LOOKUP = (1.0,)
"""The pass times of a machine on which nothing is ever guessed."""

Asked = Callable[[], bool]


def nobody_asks() -> bool:
    return False


@dataclass(slots=True)
class Counts:
    """What a conversation has cost so far.

    `fed_tokens` went through the model, but for `guessed_tokens`, of which `right_tokens` were kept.
    """

    passes: int = 0
    fed_tokens: int = 0
    said_tokens: int = 0
    guessed_tokens: int = 0
    right_tokens: int = 0


class Conversation:
    """The tokens of a conversation, and a model that goes on with them.

    `tokens` may be longer than what the KV cache holds (`cached` of them): the newest token is fed with the next ones.
    """

    def __init__(self, stepped: SteppedModel, weights: Weights, arena: KVArena, storage: Storage) -> None:
        self._weights, self._arena, self._storage = weights, arena, storage
        self._caller = Caller(stepped, arena, storage.device)
        self._acceptance = Acceptance()
        self.tokens: list[int] = []
        self.cached = 0
        self.counts = Counts()

    @property
    def context(self) -> int:
        """The most tokens that a conversation can have."""
        return self._arena.span

    @property
    def room(self) -> int:
        return self.context - len(self.tokens)

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` tokens."""
        del self.tokens[count:]
        self.cached = min(self.cached, count)

    def rewrite(self, tokens: Sequence[int]) -> None:
        """Makes the conversation these tokens; what it has in common with them from the start is not read again."""
        self.keep(agreeing(self.tokens, tokens))
        self.tokens += tokens[len(self.tokens) :]

    def say(
        self,
        sampling: Sampling,
        pass_seconds: Sequence[float] = NO_LOOKUP,
        stop_asked: Asked = nobody_asks,
    ) -> Iterator[tuple[int, ...]]:
        """Goes on with the conversation, token after token; each item is what one pass brought, in `tokens` already.

        Ends after `sampling.max_new_tokens`, or when the context is full; whoever has heard enough leaves earlier.
        `pass_seconds` is that of `lookup.draft_length`. The tokens are the same whatever it says, in float32: a pass
        keeps what would have been chosen without guesses, each by the seed and its place in the conversation.

        Raises:
            Interrupted: `stop_asked` turned true under way; the pass is given up, and the conversation stays whole.
        """
        if not self.tokens or self.room < 0:
            raise EngineError(f"A conversation of {len(self.tokens)} tokens of at most {self.context} cannot go on.")
        self.cached = min(self.cached, len(self.tokens) - 1)  # the newest token is fed, whatever was forgotten after it
        last = min(self.context, len(self.tokens) + sampling.max_new_tokens)
        while len(self.tokens) < last:
            found = draft(self.tokens)
            most = min(draft_length(pass_seconds, self._acceptance.share(found.matched)), last - len(self.tokens) - 1)
            guessed = found.tokens[:most]
            with self._whole_or_not_at_all(stop_asked) as ready, torch.inference_mode():
                logits = self._feed(guessed, ready)
            steps = range(len(self.tokens), len(self.tokens) + 1 + len(guessed))
            chosen = choose(logits, [sampling] * len(steps), steps).tolist()
            came = tuple(chosen[: agreeing(guessed, chosen) + 1])
            self._acceptance.learn(found, came)
            self._count(len(guessed), came)
            self.cached = len(self.tokens) + len(came) - 1
            self.tokens += came
            yield came

    def close(self) -> None:
        self._weights.close()
        self._arena.close()
        self._storage.close()

    def _feed(self, guessed: Sequence[int], ready: Callable[..., object]) -> torch.Tensor:
        """One pass over what is not in the cache yet, and the guesses: float32 logits `[1 + guesses, vocabulary]` of
        what follows the last token and each guess.

        A long text is fed in pieces that walk through the layers together: at each layer a piece finds there what the
        pieces before it have just left.
        """
        fed = [*self.tokens, *guessed]
        starts = list(range(self.cached, len(fed), MICRO_BATCH_TOKENS))
        if starts[-1] > self.cached and len(fed) - starts[-1] <= len(guessed):
            starts.pop()  # the last piece holds the last token and all guesses
        pieces = []
        for start, stop in zip(starts, [*starts[1:], len(fed)], strict=True):
            keep = 1 + len(guessed) if stop == len(fed) else 1
            piece = self._caller.extend(fed[start:stop], 0, start, stop - 1, keep, _logits)
            pieces.append(MicroBatch(partial(self._caller.alone, piece)))
        read: list[torch.Tensor] = walk(pieces, ready)[-1]  # type: ignore[arg-type]
        return torch.cat(read)

    @contextmanager
    def _whole_or_not_at_all(self, stop_asked: Asked) -> Iterator[Callable[..., object]]:
        """The weights for one pass; a pass that is given up leaves them at the start of the next one."""

        @contextmanager
        def ready(stop: Stop) -> Iterator[None]:
            if stop_asked():
                raise Interrupted("Stopped.")
            with self._weights.ready(stop):
                yield

        try:
            yield ready
        except BaseException:
            self._weights.rewind()
            raise

    def _count(self, guesses: int, came: Sequence[int]) -> None:
        self.counts.passes += 1
        self.counts.fed_tokens += len(self.tokens) - self.cached
        self.counts.said_tokens += len(came)
        self.counts.guessed_tokens += guesses
        self.counts.right_tokens += len(came) - 1


def _logits(logits: torch.Tensor, _rows: slice, _positions: slice) -> torch.Tensor:
    return logits[0]
