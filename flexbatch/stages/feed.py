"""Prompts on their way into the engine: those already done are left out, those begun go on from their journal."""

from __future__ import annotations

from collections.abc import Iterator

from flexbatch.data.batcher import Placed
from flexbatch.data.ledger import Ledger
from flexbatch.data.parts import PartAssembler
from flexbatch.records import Completion, Request


class Feed:
    """An iterator of requests. Rows that need no engine (row errors, rows finished by an earlier attempt) are set
    aside; `take_finished` hands them out."""

    def __init__(self, placed: Iterator[Placed], ledger: Ledger, assembler: PartAssembler) -> None:
        self._placed, self._ledger, self._assembler = placed, ledger, assembler
        self._saved = dict(ledger.saved)
        self._finished: list[Completion] = []

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        while True:
            item = next(self._placed)
            if self._ledger.is_done(item.index):
                continue
            self._assembler.expect(item)
            made = self._request(item)
            if isinstance(made, Request):
                return made
            self._finished.append(made)

    def take_finished(self) -> list[Completion]:
        """The rows set aside since the last call."""
        taken, self._finished = self._finished, []
        return taken

    def _request(self, item: Placed) -> Request | Completion:
        prompt = item.prompt
        if prompt.error:
            return Completion(item.index, (), "", "error", error=prompt.error)
        saved = self._saved.pop(item.index, None)
        if saved is not None and saved.completion is not None:
            return saved.completion
        return Request(
            item.index,
            prompt.token_ids,
            prompt.sampling,
            resumed=saved.tokens if saved else (),
            resumed_logprobs=saved.logprobs if saved else (),
            score_tokens=prompt.score_tokens,
            constraint=prompt.constraint,
            shared_tokens=prompt.shared_tokens,
        )
