"""Generation: requests in, parts out; after every pass the journal knows what it brought."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from flexbatch.data.ledger import Ledger
from flexbatch.data.parts import PartAssembler
from flexbatch.data.read_ahead import ReadAhead
from flexbatch.data.writer import PartWriter
from flexbatch.engine.engine import Engine
from flexbatch.errors import CapacityError, OutOfMemory
from flexbatch.records import Completion, Part, PassResult
from flexbatch.stages.feed import Feed
from flexbatch.stages.work import Work

READ_AHEAD = 512  # prompts waiting between the reader's thread and the engine

OnPass = Callable[[PassResult, int], None]
"""Told of every pass, with the rows done so far; may raise Interrupted to stop after it."""


def generate(engine: Engine, work: Work, ledger: Ledger, writer: PartWriter, on_pass: OnPass) -> None:
    """Runs all rows that are not done yet and writes their parts. Whatever stops it, what is finished is on disk.

    OutOfMemory where the passes need more memory than there is, or than a limit allows.
    """
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
        for result in within_memory(engine.run(feed)):
            ledger.record(result)
            complete(feed.take_finished())
            complete(result.completions)
            on_pass(result, ledger.rows_done)
        complete(feed.take_finished())
    for part in assembler.close():
        write(part)


def within_memory(passes: Iterator[PassResult]) -> Iterator[PassResult]:
    """The passes, with every way in which memory runs out told as OutOfMemory."""
    while True:
        try:
            result = next(passes, None)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"Memory ran out under way: {' '.join(str(error).split())[:300] or type(error).__name__}",
                remedy="Set offload.slots or offload.prefill_tokens lower, or the limit of the tier higher, and start "
                "the same command again: it goes on.",
            ) from error
        if result is None:
            return
        yield result


def ran_out_of_memory(error: Exception) -> bool:
    """A tier's budget, an accelerator's allocator, or the system's (of which torch on a CPU has no class)."""
    if isinstance(error, CapacityError | torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
