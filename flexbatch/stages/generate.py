"""Generation: requests in, parts out; after every pass the journal knows what it brought."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flexbatch.data.ledger import Ledger
from flexbatch.data.parts import PartAssembler
from flexbatch.data.read_ahead import ReadAhead
from flexbatch.data.writer import PartWriter
from flexbatch.engine.engine import Engine
from flexbatch.records import Completion, Part, PassResult
from flexbatch.stages.feed import Feed
from flexbatch.stages.work import Work

READ_AHEAD = 512  # prompts waiting between the reader's thread and the engine

OnPass = Callable[[PassResult, int], None]
"""Told of every pass, with the rows done so far; may raise Interrupted to stop after it."""


def generate(engine: Engine, work: Work, ledger: Ledger, writer: PartWriter, on_pass: OnPass) -> None:
    """Runs all rows that are not done yet and writes their parts. Whatever stops it, what is finished is on disk."""
    assembler, scorer = PartAssembler(work.part_rows), work.scorer

    def write(part: Part) -> None:
        writer.write(part, [scorer.values(done) for _, done in part.rows] if scorer else ())
        ledger.part_written(part)

    def complete(completions: Iterable[Completion]) -> None:
        for completion in completions:
            part = assembler.complete(completion)
            if part is not None:
                write(part)

    with ReadAhead(work.placed(), READ_AHEAD) as placed:
        feed = Feed(placed, ledger, assembler)
        for result in engine.run(feed):
            ledger.record(result)
            complete(feed.take_finished())
            complete(result.completions)
            on_pass(result, ledger.rows_done)
        complete(feed.take_finished())
    for part in assembler.close():
        write(part)
