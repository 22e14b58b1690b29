"""What crosses from one stage of the pipeline to the next. Frozen, at the bottom of the import tree, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the source dataset. `(shard, row)` names it; `id` is the user's id column or `shard:row`."""

    id: str
    shard: str
    row: int
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens for one request. Temperature 0 is greedy; then `top_p`, `top_k` and `seed` do not matter."""

    max_new_tokens: int = 32
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for the engine.

    `index` is the request's place in the job's fixed order: completions are known by it. `resumed` holds tokens that
    an earlier attempt already generated (from the journal), `resumed_logprobs` their log-probabilities; they count
    towards `max_new_tokens` and are part of the completion. With `score_tokens` the last that many prompt tokens are
    scored instead of anything generated: prefill only.
    `shared_tokens` leading prompt tokens are those of its prefix group: their KV may be computed once for the group.
    `constraint` names a decoding constraint (JSON schema, regular expression, choices) registered with the engine.
    """

    index: int
    prompt_ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    resumed: tuple[int, ...] = ()
    resumed_logprobs: tuple[float, ...] = ()
    score_tokens: int = 0
    constraint: str = ""
    shared_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine makes of a `Request`.

    `text` is decoded from `token_ids`, cut before the stop string if one was met; `token_ids` are the tokens as
    generated (with the end-of-sequence token, if that is what ended it). `logprobs[i]` is the natural logarithm of the
    model's probability of `token_ids[i]` (empty unless asked for). For a scored request `token_ids` are the scored
    tokens, `logprobs` theirs, and `greedy_match` says whether greedy decoding would have chosen each of them.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...] = ()
    greedy_match: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row after the template and the tokenizer: ready to be ordered and batched.

    `error` is not empty where the row cannot be run (template failed, over-long with `truncation=error`); it then
    becomes an output row with `finish_reason=error`. `carried` are the source columns to copy to the output.
    `dropped_tokens` were cut by truncation. `sampling` may differ between rows (scenarios have their own lengths and
    stop strings). `shared_tokens` leading tokens are shared with other prompts of its window (a prefix group).
    `completion_index` counts the completions of one row, where several are asked for.
    """

    row: Row
    token_ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    shared_tokens: int = 0
    carried: Mapping[str, Any] = field(default_factory=dict)
    dropped_tokens: int = 0
    completion_index: int = 0
    score_tokens: int = 0
    constraint: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """A fixed run of the job's order, finished: rows `first` to `first + len(rows) - 1`, in order."""

    number: int
    first: int
    rows: tuple[tuple[Prompt, Completion], ...]


@dataclass(frozen=True, slots=True)
class PassResult:
    """What one pass of the engine over the layers brought.

    `new_tokens` maps a request's index to the tokens that it gained and `new_logprobs` to theirs (only requests with
    `sampling.logprobs`); the journal keeps both. `seconds` is the pass's wall time, `rows_in_flight` the rows that
    hold a slot after it, `prefill_tokens` the prompt tokens computed in it, `decode_tokens` the tokens generated. Of
    `guessed_tokens` that were fed `right_tokens` were what the model said: they are among those generated.
    `waits` are seconds spent waiting by cause (`weights`, `kv`, ...), `bytes_moved` bytes by link (`disk>device`, ...).
    """

    completions: tuple[Completion, ...]
    new_tokens: Mapping[int, tuple[int, ...]]
    new_logprobs: Mapping[int, tuple[float, ...]]
    seconds: float
    rows_in_flight: int
    prefill_tokens: int
    decode_tokens: int
    waits: Mapping[str, float] = field(default_factory=dict)
    bytes_moved: Mapping[str, int] = field(default_factory=dict)
    guessed_tokens: int = 0
    right_tokens: int = 0
