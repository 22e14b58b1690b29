"""The main path: config -> plan -> read -> batch -> generate -> write -> report, as one short function."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flexbatch.composition import save_config
from flexbatch.config import Config
from flexbatch.data.ledger import Ledger
from flexbatch.data.writer import PartWriter
from flexbatch.engine.engine import Engine, Vocabulary
from flexbatch.engine.opening import EngineOptions, Limits, open_engine
from flexbatch.interrupt import StopSignal
from flexbatch.plan.policy import Policy
from flexbatch.records import PassResult
from flexbatch.report.html import write_report
from flexbatch.report.progress import Progress
from flexbatch.report.summary import closing_lines, print_summary
from flexbatch.report.timeline import Timeline
from flexbatch.stages import policy
from flexbatch.stages.generate import generate
from flexbatch.stages.identity import fingerprint
from flexbatch.stages.model import Model, find_model
from flexbatch.stages.results import RunSummary, summarize_run
from flexbatch.stages.work import Work, describe_work


def run(config: Config, *, stop: StopSignal, overrides: Sequence[str] = ()) -> RunSummary:
    """Runs a job, or goes on with it, and returns what came of it. Every error is a `FlexbatchError`."""
    started = time.monotonic()
    folder = Path(config.output.dir)
    model = find_model(config)
    work = describe_work(config, model)
    chosen = policy.choose(config, work)
    writer = PartWriter(folder, carried=work.carried, several_completions=work.several_completions)
    identity = fingerprint(config, model, work)
    with Ledger.open(
        folder, identity, part_rows=work.part_rows, journal_seconds=config.output.journal_seconds
    ) as ledger:
        save_config(config, overrides, folder)
        if work.total is not None:
            ledger.set_total(work.total)
        if work.total is None or ledger.rows_written < work.total:
            _generate(config, model, work, chosen, ledger, writer, stop)
        summary = summarize_run(folder, work, model, time.monotonic() - started)
    write_report(folder)
    print_summary(
        summary.score_lines(),
        closing_lines(
            summary.folder,
            summary.rows,
            summary.generated_tokens,
            summary.finish_reasons,
            summary.seconds,
            shlex.join(["python", "-m", "flexbatch", *overrides]),
        ),
    )
    return summary


def _generate(
    config: Config, model: Model, work: Work, chosen: Policy, ledger: Ledger, writer: PartWriter, stop: StopSignal
) -> None:
    """The part of a run that needs the model in memory."""
    engine = _open_engine(config, model, work, chosen, ledger)
    with Timeline(ledger.folder) as timeline, Progress(work.total, ledger.rows_done, sys.stderr) as progress:

        def on_pass(result: PassResult, rows_done: int) -> None:
            progress.update(result, rows_done)
            timeline.update(result, rows_done)
            stop.check()

        try:
            generate(engine, work, ledger, writer, on_pass)
            progress.finish(ledger.rows_done)
        finally:
            engine.close()


def _open_engine(config: Config, model: Model, work: Work, chosen: Policy, ledger: Ledger) -> Engine:
    disk_folder = Path(config.offload.disk_dir) if config.offload.disk_dir else ledger.scratch
    disk_folder.mkdir(parents=True, exist_ok=True)
    padded = work.longest_prompt if config.prompt.padding == "max_length" else 0
    return open_engine(
        model.checkpoint(Path(config.model.cache_dir).expanduser()),
        chosen,
        Limits(disk_folder=disk_folder),
        Vocabulary(model.tokenizer, model.end_tokens),
        EngineOptions(
            span=work.longest_prompt + work.longest_new,
            dtype=model.dtype,
            device=model.device,
            padded_width=padded,
            reader=config.offload.reader,
        ),
    )
