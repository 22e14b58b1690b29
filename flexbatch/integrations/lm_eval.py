"""flexbatch as a backend of lm-evaluation-harness (lm-eval 0.4.13 and later).

    lm_eval.simple_evaluate(model=FlexbatchLM("facebook/opt-30b", output_dir="answers"), tasks=["hellaswag"])

All requests of one kind that lm-eval hands over are one batch, answered by a `Session`. What is asked is what lm-eval's
own `hf` backend asks: the same tokens before and after the border of context and continuation, the same truncation on
the left, the same windows of long texts, the same prefix token and the same rules for stop strings. So the numbers are
the same too, but for the order in which floating point numbers are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoTokenizer

from flexbatch.errors import ConfigError
from flexbatch.integrations.session import Session, digest
from flexbatch.records import Completion, Request, Sampling
from flexbatch.stages.model import refuse_dummy_scores

DEFAULT_LENGTH = 2048  # lm-eval's, for models that state none
DEFAULT_NEW_TOKENS = 256  # lm-eval's, for tasks that state none
DEFAULT_TOP_K = 50  # Transformers' own where a task samples, so also that of `hf`

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
"""A pair of texts (None: a window of a longer text), and the tokens of its context and of its continuation."""


@register_model("flexbatch")
class FlexbatchLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A model that streams its weights, as lm-eval's `LM`.

    `pretrained` is a folder or hub id. With `output_dir` every batch is kept in a folder of its own there, named for
    its requests: the same evaluation started again goes on where it stopped. `max_length`, `add_bos_token` and
    `prefix_token_id` mean what they mean to `hf`. Further keywords are flexbatch's options: those of the command line
    in Python (`**{"offload.weight_bits": 4}`), or after `--model_args` (`pretrained=...,offload.weight_bits=4`).
    lm-eval's `batch_size` and `max_batch_size` are not needed: the plan chooses.

    Raises:
        ConfigError: an option; ModelError: the model.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str = "",
        *,
        output_dir: str | Path | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        batch_size: Any = None,  # noqa: ARG002 - lm-eval gives it to every backend
        max_batch_size: Any = None,  # noqa: ARG002
        **options: Any,
    ) -> None:
        super().__init__()
        named = {"offload.device": device, "model.dtype": dtype, "model.revision": revision}
        given = {**{name: value for name, value in named.items() if value}, **options}
        self._session = Session.open(pretrained, *(f"{name}={_written(value)}" for name, value in given.items()))
        refuse_dummy_scores(self._session.config)
        self._folder = Path(output_dir) if output_dir else None
        self._max_length, self._add_bos_token, self._prefix_token_id = max_length, add_bos_token, prefix_token_id
        self._seed = seed
        self.tokenizer = self._session.tokenizer
        if add_bos_token is not None:
            folder = self._session.model.found.require_tokenizer()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, add_bos_token=add_bos_token)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        config = self._session.model.config
        return self._max_length or int(resolve_max_length(config, self.tokenizer, default=DEFAULT_LENGTH))

    @property
    def max_gen_toks(self) -> int:
        return DEFAULT_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. Unless told, the tokenizer's special tokens are added, but not to a text that has them already."""
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token
            if has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
        return self._encode(string, add_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether greedy decoding would have said it."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[tuple[float, bool]]:
        answers = self._answer([self._scored(*encoded[1:]) for encoded in requests], "loglikelihood")
        scores = [(sum(answer.logprobs), answer.greedy_match) for answer in answers]
        for (texts, _context, _continuation), score in zip(requests, scores, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """The log-probability of each whole text, in windows of `max_length` tokens that predict each token once."""
        windows: list[list[Encoded]] = [
            [(None, *make_disjoint_window(window)) for window in self._windows(request.args[0])] for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
        totals = [sum(next(scores)[0] for _ in text) for text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """What the model says to each context, up to the first of the task's stop strings."""
        asked, stops = [], []
        for number, (context, settings) in enumerate(request.args for request in requests):
            sampling = read_sampling(settings, self._eos_text, self._seed + number)
            asked.append(Request(number, self._context(context, sampling.max_new_tokens), sampling))
            stops.append(list(sampling.stop))
        answers = self._answer(asked, "generate_until")
        texts = [self._text(answer, stop) for answer, stop in zip(answers, stops, strict=True)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's template writes it; without system messages if it knows none."""

        def written(messages: list[dict[str, str]]) -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return text

        try:
            return written(chat_history)
        except jinja2.exceptions.TemplateError:
            return written([message for message in chat_history if message["role"] != "system"])

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results to say what was run."""
        model, config = self._session.model, self._session.config
        return {"model_dtype": str(model.dtype), "model_revision": config.model.revision, **model.fingerprint()}

    @property
    def _eos_text(self) -> str:
        text: str = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        return text

    def _encode(self, string: str, add_special_tokens: bool | None) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def _scored(self, context: list[int], continuation: list[int]) -> Request:
        """At most `max_length` tokens are fed, and the last is not, so that one more fits."""
        if len(continuation) > self.max_length:
            raise ConfigError(
                f"a continuation has {len(continuation)} tokens; the model's length is {self.max_length}.",
                remedy="Leave this task out, or choose a model with a longer context.",
            )
        ids = (context + continuation)[-(self.max_length + 1) :]
        return Request(0, tuple(ids), score_tokens=len(continuation))

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        tokens = self.tok_encode(text)
        return list(get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1))

    def _context(self, text: str, new_tokens: int) -> tuple[int, ...]:
        room = self.max_length - new_tokens
        if room < 1:
            raise ConfigError(
                f"a task generates {new_tokens} tokens; the model's length is {self.max_length}.",
                remedy="Lower max_gen_toks (gen_kwargs), or choose a model with a longer context.",
            )
        special = False if has_bos_prefix(text, self.tokenizer.bos_token) else self._add_bos_token
        return tuple(self._encode(text, special)[-room:])

    def _text(self, answer: Completion, stop: list[str]) -> str:
        ids = list(answer.token_ids)
        if self.eot_token_id in ids:
            ids = ids[: ids.index(self.eot_token_id)]
        text: str = postprocess_generated_text(self.tokenizer.decode(ids, skip_special_tokens=True), stop, None)
        return text

    def _answer(self, requests: list[Request], kind: str) -> list[Completion]:
        if not requests:
            return []
        folder = self._folder / f"{kind}-{digest(requests)[:16]}" if self._folder else None
        return self._session.answer(requests, folder)


def read_sampling(settings: dict[str, Any], eos_text: str, seed: int) -> Sampling:
    """lm-eval's `gen_kwargs` as a `Sampling`. ConfigError for one that the engine does not have."""
    given: dict[str, Any] = dict(normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS))
    stop = [text for text in handle_stop_sequences(given.pop("until", None), eos=eos_text) if text]
    sampled = bool(given.pop("do_sample", False))
    temperature = float(given.pop("temperature", 1.0))
    sampling = Sampling(
        max_new_tokens=int(given.pop("max_gen_toks")),
        min_new_tokens=int(given.pop("min_new_tokens", 0)),
        temperature=temperature if sampled else 0.0,
        top_p=float(given.pop("top_p", 1.0)),
        top_k=int(given.pop("top_k", DEFAULT_TOP_K if sampled else 0)),
        seed=seed,
        stop=tuple(stop),
    )
    if given:
        raise ConfigError(
            f"gen_kwargs has {', '.join(sorted(given))}, which flexbatch cannot do.",
            remedy="It knows until, max_gen_toks, min_new_tokens, do_sample, temperature, top_p and top_k.",
        )
    return sampling


def _written(value: Any) -> str:
    """A value as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
