"""A model that answers lists of requests, for programs that have requests and no dataset.

    session = Session.open("facebook/opt-1.3b", "offload.weight_bits=4")
    answers = session.answer(requests, folder=Path("answers"))

Every list is one batch: planned, ordered, generated and kept by the same stages as a job. With a folder it can be
killed at any moment and asked again; the folder is an output folder like any other.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexbatch.composition import load_config
from flexbatch.config import Config
from flexbatch.data.ledger import Ledger
from flexbatch.data.writer import PartWriter
from flexbatch.errors import ConfigError, IncompressibleCache
from flexbatch.records import Completion, Part, Prompt, Request, Row
from flexbatch.report.packing_notice import PackingNotice
from flexbatch.report.plan_text import Plan
from flexbatch.stages.generate import OnPass, generate
from flexbatch.stages.identity import fingerprint
from flexbatch.stages.model import Model, find_model
from flexbatch.stages.opening import open_for
from flexbatch.stages.planning import plan_run, with_plain_cache
from flexbatch.stages.results import output_rows
from flexbatch.stages.work import Work

SHARD = "requests"


@dataclass(frozen=True)
class Session:
    """A model, found and identified. Its weights are read while it answers and given back afterwards."""

    config: Config
    model: Model

    @classmethod
    def open(cls, model: str = "", *overrides: str) -> Session:
        """`model` is a folder or hub id; `overrides` are those of the command line (`offload.slots=8`), which may
        name the model instead (`model=opt-tiny`).

        Raises:
            ConfigError: an override; ModelError: the model.
        """
        named = ["model=hf", f"model.path={model}"] if model else []
        config = load_config(["job=generate", f"dataset.path={SHARD}", *named, *overrides])
        return cls(config, find_model(config))

    @property
    def tokenizer(self) -> Any:
        """The model's Transformers tokenizer."""
        return self.model.tokenizer

    def plan(self, requests: Sequence[Request]) -> Plan:
        """Where everything would live while these are answered, and how long it would take. Reads no weights."""
        return plan_run(self.config, self.model, self._work(requests))

    def answer(
        self, requests: Sequence[Request], folder: Path | None = None, on_pass: OnPass | None = None
    ) -> list[Completion]:
        """The completions, in the order of the requests.

        With a `folder` they are kept there: asked again with the same requests it goes on where it stopped, or reads
        what it has. `on_pass` hears of every pass and may raise to stop after it. `Request.index` is only handed back.

        Raises:
            ConfigError: a request that the model cannot be asked.
            FingerprintError: the folder holds answers to other requests, or of another model.
            CapacityError, OutputError, EngineError: as for a job.
        """
        if not requests:
            return []
        work = self._work(requests)
        with _kept(folder) as place:
            self._run(work, place, on_pass)
            rows = {row["row"]: row for row in output_rows(place)}
        return [_completion(request, rows[number]) for number, request in enumerate(requests)]

    def _work(self, requests: Sequence[Request]) -> Work:
        for number, request in enumerate(requests):
            check_request(request, number, self.model.context_tokens)
        prompts = [_prompt(request, number) for number, request in enumerate(requests)]
        return Work(
            prompts=lambda: iter(prompts),
            total=len(prompts),
            longest_prompt=max(len(prompt.token_ids) for prompt in prompts),
            longest_new=max(_new_tokens(request) for request in requests),
            carried={},
            identity={"requests": digest(requests)},
            window=self.config.prompt.window,
            part_rows=self.config.output.part_rows,
        )

    def _run(self, work: Work, folder: Path, on_pass: OnPass | None) -> None:
        config, model = self.config, self.model
        seconds = config.output.journal_seconds
        identity = fingerprint(config, model, work)
        with Ledger.open(folder, identity, part_rows=work.part_rows, journal_seconds=seconds) as ledger:
            ledger.set_total(work.total or 0)
            if ledger.rows_written == work.total:
                return

            def attempt(plan: Plan) -> None:
                notice = PackingNotice(sys.stderr, lambda: None)
                with closing(open_for(config, model, work, plan, ledger.scratch, on_packing=notice)) as engine:
                    generate(engine, work, ledger, AnswerWriter(folder), on_pass or (lambda _result, _rows: None))

            plan = plan_run(config, model, work)
            try:
                attempt(plan)
            except IncompressibleCache:
                ledger.take_up()
                attempt(with_plain_cache(plan, config.offload))


class AnswerWriter(PartWriter):
    """Parts with one column more, `greedy_match`: whether greedy decoding would have said what was scored."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, extra={"greedy_match": "bool"})

    def write(self, part: Part, extra: Sequence[Any] = ()) -> Path:  # noqa: ARG002 - a session adds this column alone
        return super().write(part, [{"greedy_match": completion.greedy_match} for _, completion in part.rows])


def check_request(request: Request, number: int, positions: int) -> None:
    """ConfigError for a request that cannot be answered by a model of so many positions (0: no bound)."""
    where, length, wanted = f"request {number}", len(request.prompt_ids), _new_tokens(request)
    if request.score_tokens and not 0 < request.score_tokens < length:
        raise ConfigError(
            f"{where}: {request.score_tokens} of its {length} tokens are to be scored.",
            remedy="At least one token must come before those that are scored.",
        )
    if not length:
        raise ConfigError(f"{where} has no tokens.", remedy="Begin it with the beginning-of-sequence token.")
    if request.constraint or request.resumed:
        raise ConfigError(f"{where} has a constraint or is begun already.", remedy="A session takes neither.")
    fed = length - 1 + wanted  # the last token is not fed to the model
    if positions and fed > positions:
        raise ConfigError(
            f"{where} has {length} tokens and asks for {wanted} more; the model has {positions} positions.",
            remedy="Cut the prompt, or ask for fewer tokens.",
        )


def digest(requests: Sequence[Request]) -> str:
    """A hash of everything in the requests that changes their answers."""
    asked = [[request.prompt_ids, asdict(request.sampling), request.score_tokens] for request in requests]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _new_tokens(request: Request) -> int:
    return 0 if request.score_tokens else request.sampling.max_new_tokens


def _prompt(request: Request, number: int) -> Prompt:
    row = Row(str(number), SHARD, number, {})
    return Prompt(row, request.prompt_ids, request.sampling, score_tokens=request.score_tokens)


def _completion(request: Request, row: Any) -> Completion:
    return Completion(
        request.index,
        tuple(row["completion_ids"]),
        row["completion"],
        row["finish_reason"],
        tuple(row["logprobs"]),
        bool(row["greedy_match"]),
        row["error"],
    )


@contextmanager
def _kept(folder: Path | None) -> Iterator[Path]:
    """The folder, or one that lasts as long as the batch."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="flexbatch-") as temporary:
        yield Path(temporary)
