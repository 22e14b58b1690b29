"""The comparison for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from flexbatch.bench.comparison import OWN, Comparison, EngineRuns
from flexbatch.bench.policies import PolicyGrid, PolicyRun
from flexbatch.bench.roofline import MachineLimits

GIB = 1 << 30


def print_comparison(console: Console, title: str, comparison: Comparison, conditions: Sequence[str]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("engine")
    for name in (
        "batch",
        "rows",
        "tokens/s",
        "flexbatch is",
        "of its roofline",
        "of arithmetic",
        "peak GiB",
        "read GB",
    ):
        table.add_column(name, justify="right")
    for engine in comparison.engines:
        if not engine.error and engine.runs:
            table.add_row(*_cells(engine, comparison))
    console.print(table)
    for engine in comparison.engines:
        if engine.error:
            console.print(f"{engine.engine}: {engine.error}", markup=False, highlight=False)
        for outcome in engine.tried if not engine.error else ():
            what = outcome.error or f"{outcome.rate:.2f} tokens/s"
            console.print(f"  {engine.engine}, batch {outcome.batch}: {what}", markup=False, highlight=False)
    ready = [_ready(engine) for engine in comparison.engines if not engine.error and engine.runs]
    if ready:
        console.print(f"making the model ready, not counted above: {', '.join(ready)}", highlight=False)
    for place, limits in enumerate(comparison.limits):
        when = f"after flexbatch's run {place}" if place else "before"
        console.print(f"measured {when}: {rates_line(limits)}", highlight=False)
    own = next((engine for engine in comparison.engines if engine.engine == OWN), None)
    if own is not None and own.runs and not own.error:
        fastest = comparison.median_shares(own).fastest_roofline
        console.print(f"of its roofline by the fastest of these measurements: {fastest:.0%}", highlight=False)
    for condition in conditions:
        console.print(condition, markup=False, highlight=False)


def _cells(engine: EngineRuns, comparison: Comparison) -> list[str]:
    run = engine.runs[0]
    ratio = comparison.ratio(engine)
    shares = comparison.median_shares(engine)
    return [
        engine.engine,
        str(run.batch),
        str(run.rows),
        f"{engine.rate:.2f}",
        "" if engine.engine == OWN or ratio is None else f"{ratio:.2f}x",
        f"{shares.roofline:.0%}",
        f"{shares.arithmetic:.0%}",
        f"{engine.peak / GIB:.2f}",
        f"{run.read_bytes / 1e9:.1f}",
    ]


def _ready(engine: EngineRuns) -> str:
    seconds = ", ".join(f"{run.setup_seconds:.0f}" for run in engine.runs)
    return f"{engine.engine} {seconds} s"


def rates_line(limits: MachineLimits) -> str:
    gemm = ", ".join(f"{rate / 1e9:.0f} at {rows}" for rows, rate in sorted(limits.gemm.items()))
    return (
        f"matrix products {gemm} rows (GFLOP/s); disk {limits.disk_read / 1e9:.2f} GB/s direct; "
        f"memory copy {limits.memory_copy / 1e9:.1f} GB/s"
    )


def print_policies(console: Console, title: str, grid: PolicyGrid) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("policy")
    for name in ("slots", "prompt tokens a pass", "weights on device", "seconds", "predicted", "tokens/s"):
        table.add_column(name, justify="right")
    ordered = sorted(grid.hand_made, key=lambda run: -run.outcome.rate)
    for name, runs in (("automatic", grid.automatic), ("best again", grid.best), ("hand-made", ordered)):
        for run in runs:
            table.add_row(name, *_policy_cells(run))
    console.print(table)
    console.print(
        f"The automatic policy reaches {grid.reached:.1%} of the throughput of the best of {len(ordered)} hand-made "
        "ones (medians of runs in turn).",
        highlight=False,
    )


def _policy_cells(run: PolicyRun) -> list[str]:
    if run.outcome.error:
        return [str(run.options.get("slots", "")), str(run.options.get("prefill_tokens", "")), run.outcome.error]
    policy = run.outcome.details["policy"]
    return [
        str(policy["slots"]),
        str(policy["prefill_tokens"]),
        f"{policy['weights']['device']:.0%}",
        f"{run.outcome.seconds:.1f}",
        f"{run.predicted:.1f}",
        f"{run.outcome.rate:.2f}",
    ]


def print_scaling(console: Console, title: str, runs: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("rows", "seconds", "ms per row", "ms per further row", "peak resident MiB"):
        table.add_column(name, justify="right")
    for run in runs:
        further = run["milliseconds_per_further_row"]
        table.add_row(
            f"{run['rows']:,}",
            f"{run['seconds']:.1f}",
            f"{run['milliseconds_per_row']:.2f}",
            "" if further is None else f"{further:.2f}",
            f"{run['peak_resident_bytes'] / (1 << 20):.0f}",
        )
    console.print(table)
