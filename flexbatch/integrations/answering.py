"""Prompts from a file and answers into one, as `worker.py` describes their lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexbatch.errors import ConfigError
from flexbatch.integrations.session import Session, digest
from flexbatch.records import Completion, Request, Sampling
from flexbatch.stages.model import refuse_dummy_scores


def answer_file(prompts: Path, answers: Path, folder: Path, model: str, overrides: Sequence[str] = ()) -> None:
    """Reads `prompts` and writes `answers`, in one batch. FlexbatchError for anything that is wrong."""
    asked = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    session = Session.open(model, *overrides)
    refuse_dummy_scores(session.config)
    requests = [to_request(number, prompt, session.tokenizer) for number, prompt in enumerate(asked)]
    completions = session.answer(requests, folder / digest(requests)[:16])
    lines = [
        json.dumps(to_answer(request, completion, session))
        for request, completion in zip(requests, completions, strict=True)
    ]
    answers.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def to_request(number: int, prompt: Mapping[str, Any], tokenizer: Any) -> Request:
    """One line of PROMPTS as a request. ConfigError for an echo that also generates."""
    text, chat = prompt["prompt"], prompt.get("chat")
    if chat or (chat is None and tokenizer.chat_template):
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tuple(tokenizer(text, verbose=False)["input_ids"])
    if not prompt.get("echo"):
        sampling = Sampling(
            max_new_tokens=prompt["max_tokens"],
            temperature=prompt["temperature"],
            top_p=prompt["top_p"],
            seed=prompt["seed"],
            stop=tuple(text for text in prompt["stop"] if text),
            logprobs=True,
        )
        return Request(number, ids, sampling)
    if prompt["max_tokens"]:
        raise ConfigError(
            f"prompt {number} is to be echoed and to go on for {prompt['max_tokens']} tokens.",
            remedy="Echo it with max_tokens 0, or generate without the echo.",
        )
    return Request(number, ids, score_tokens=len(ids) - 1)


def to_answer(request: Request, completion: Completion, session: Session) -> dict[str, Any]:
    """One line of ANSWERS. The first token of an echoed prompt has nothing before it: its log-probability is 0."""
    ids, logprobs = list(completion.token_ids), list(completion.logprobs)
    reason: str = completion.finish_reason
    if request.score_tokens:
        ids, logprobs = [request.prompt_ids[0], *ids], [0.0, *logprobs]
    elif ids and ids[-1] in session.model.end_tokens:
        ids, logprobs, reason = ids[:-1], logprobs[:-1], "endoftext"
    decode = session.tokenizer.decode
    tokens = [[decode([token]), logprob] for token, logprob in zip(ids, logprobs, strict=True)]
    return {"text": decode(ids), "tokens": tokens, "finish_reason": reason}
