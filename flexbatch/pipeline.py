"""The main path: config -> plan -> read -> batch -> generate -> write -> report, as one short function."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flexbatch.composition import save_config
from flexbatch.config import Config
from flexbatch.data.ledger import Ledger
from flexbatch.data.writer import PartWriter
from flexbatch.engine.engine import Engine
from flexbatch.errors import IncompressibleCache, OutOfMemory
from flexbatch.interrupt import StopSignal
from flexbatch.plan.advice import advise
from flexbatch.records import PassResult
from flexbatch.report.disk_watch import DiskWatch
from flexbatch.report.outlook import outlook_of
from flexbatch.report.packing_notice import PackingNotice
from flexbatch.report.plan_record import plan_record
from flexbatch.report.plan_text import Measured, Plan, plan_lines, predicted_against_measured, print_plan
from flexbatch.report.progress import Progress
from flexbatch.report.summary import closing_lines, invocation, print_summary, print_table
from flexbatch.report.timeline import Timeline, last_attempt, read_timeline, totals, totals_text
from flexbatch.report.trace import ChromeTrace
from flexbatch.stages.generate import generate
from flexbatch.stages.identity import fingerprint
from flexbatch.stages.model import Model, find_model, find_model_to_plan
from flexbatch.stages.opening import open_for
from flexbatch.stages.planning import draw_frontier, make_plan, plan_run, with_fewer_slots, with_plain_cache
from flexbatch.stages.results import RunSummary, summarize_run
from flexbatch.stages.tally import Tally, peak_memory
from flexbatch.stages.work import Work, describe_work


def run(config: Config, *, stop: StopSignal, overrides: Sequence[str] = ()) -> RunSummary:
    """Runs a job, or goes on with it, and returns what came of it. Every error is a `FlexbatchError`."""
    started = time.monotonic()
    folder = Path(config.output.dir)
    model = find_model(config)
    work = describe_work(config, model)
    plan = plan_run(config, model, work)
    extra = work.scorer.columns if work.scorer else {}
    writer = PartWriter(folder, carried=work.carried, extra=extra, several_completions=work.several_completions)
    identity = fingerprint(config, model, work)
    with Ledger.open(
        folder, identity, part_rows=work.part_rows, journal_seconds=config.output.journal_seconds
    ) as ledger:
        save_config(config, overrides, folder)
        if work.total is not None:
            ledger.set_total(work.total)
        if work.total is None or ledger.rows_written < work.total:
            announce(model, work, plan)
            _generate(config, model, work, plan, ledger, writer, stop)
        summary = summarize_run(folder, work, model, time.monotonic() - started)
    _report(folder)
    closing = closing_lines(summary.outcome, invocation(), overrides)
    print_summary(summary.score_lines(), [*closing, *model.warnings])
    return summary


def _report(folder: Path) -> None:
    from flexbatch.report.html import write_report  # it draws with Matplotlib: 30 MB that a run needs for rows

    write_report(folder)


def plan(config: Config) -> Plan:
    """Where everything would live and how long it would take; reads no weights. Writes a picture of the frontier."""
    model, notes = find_model_to_plan(config)
    work = describe_work(config, model)
    made = make_plan(config, model, work, measure=True)
    advice = advise(made.spec, made.hardware, made.workload, config.offload, made.prediction)
    picture = draw_frontier(config, made, Path(config.output.dir))
    print_plan(made, advice, [*notes, *work.notes, f"Frontier of speed and latency: {picture}"])
    return made


def announce(model: Model, work: Work, plan: Plan) -> None:
    """The plan in five lines, and what the user should know beforehand, on standard error."""
    for line in (*plan_lines(plan), *work.notes, *model.warnings):
        print(line, file=sys.stderr)


def _generate(
    config: Config, model: Model, work: Work, plan: Plan, ledger: Ledger, writer: PartWriter, stop: StopSignal
) -> None:
    """The part of a run that needs the model in memory. Where memory runs out it goes on once, with half the slots;
    where keys and values cannot be compressed, with plain ones."""
    trace = ChromeTrace(Path(config.offload.trace)) if config.offload.trace else None

    def attempt(plan: Plan) -> None:
        watch = DiskWatch(plan.hardware.disk_read)

        def on_event(kind: str, name: str, started: float, ended: float, nbytes: int) -> None:
            watch.event(kind, name, started, ended, nbytes)
            if trace:
                trace.event(kind, name, started, ended, nbytes)

        packing = PackingNotice(sys.stderr, stop.check)
        engine = open_for(config, model, work, plan, ledger.scratch, on_event, packing, _to_do(work, ledger))
        tally = _pass_by_pass(engine, work, plan, ledger, writer, stop, watch)
        _tell(plan, tally.measured(peak_memory(model.device)), ledger)

    try:
        try:
            attempt(plan)
            return
        except OutOfMemory as error:
            fewer = with_fewer_slots(plan)
            if fewer is None:
                raise
            said, other = error.message, fewer
        except IncompressibleCache as error:
            said, other = error.message, with_plain_cache(plan, config.offload)
        gc.collect()  # the failed pass's frames, with all that they hold
        slots = other.prediction.policy.slots
        print(f"{said} The job goes on with {slots} slots; what is finished stays.", file=sys.stderr)
        ledger.take_up()
        attempt(other)
    finally:
        if trace:
            trace.close()


def _to_do(work: Work, ledger: Ledger) -> float:
    """The part of the rows that is not done; all, where nobody knows how many there are."""
    return 1.0 - ledger.rows_done / work.total if work.total else 1.0


def _pass_by_pass(
    engine: Engine, work: Work, plan: Plan, ledger: Ledger, writer: PartWriter, stop: StopSignal, watch: DiskWatch
) -> Tally:
    """Runs the engine to the end of the work, with everything that looks on, and closes it."""
    ledger.save_plan(plan_record(plan))
    tally = Tally()
    outlook = outlook_of(plan.prediction, _to_do(work, ledger))
    with (
        contextlib.closing(engine),
        Timeline(ledger.folder) as timeline,
        Progress(work.total, ledger.rows_done, sys.stderr, outlook=outlook, note=watch.note) as progress,
    ):

        def on_pass(result: PassResult, rows_done: int) -> None:
            tally.add(result)
            progress.update(result, rows_done)
            timeline.update(result, rows_done)
            stop.check()

        generate(engine, work, ledger, writer, on_pass)
        progress.finish(ledger.rows_done)
    return tally


def _tell(plan: Plan, measured: Measured, ledger: Ledger) -> None:
    """What it really took, beside the plan."""
    ledger.save_plan(plan_record(plan, measured))
    print_table(predicted_against_measured(plan, measured))
    print(totals_text(totals(last_attempt(read_timeline(ledger.folder)))), file=sys.stderr)
