"""The latency-throughput frontier as a picture: with more rows in flight, each row takes longer and the job less."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from flexbatch.plan.cost_model import Prediction

COLOURS = {"speed": "#2563eb", "row": "#d97706", "chosen": "#dc2626"}


def write_frontier(predictions: Sequence[Prediction], chosen: Prediction, file: Path, *, title: str = "") -> None:
    """Writes a PNG (or what the suffix of `file` says). `predictions` are the best policies for rising slots."""
    frontier_figure(predictions, chosen, title=title).savefig(file, dpi=110)


def frontier_figure(predictions: Sequence[Prediction], chosen: Prediction, *, title: str = "") -> Figure:
    """Two panels: tokens per second and seconds per row against slots; then one against the other."""
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    by_slots = {each.policy.slots: each for each in [*predictions, chosen]}
    ordered = [by_slots[slots] for slots in sorted(by_slots)]
    _against_slots(left, ordered, chosen)
    _against_each_other(right, ordered, chosen)
    for axes in (left, right):
        axes.spines[["top"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
    if title:
        figure.suptitle(title)
    return figure


def _against_slots(axes: Axes, ordered: Sequence[Prediction], chosen: Prediction) -> None:
    slots = [each.policy.slots for each in ordered]
    axes.plot(slots, [each.tokens_per_second for each in ordered], "o-", color=COLOURS["speed"], markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(slots[:: max(1, len(slots) // 12)])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("rows in flight (slots)")
    axes.set_ylabel("generated tokens per second", color=COLOURS["speed"])
    axes.set_ylim(bottom=0)
    axes.axvline(chosen.policy.slots, color=COLOURS["chosen"], linewidth=1)
    axes.annotate(
        f"chosen: {chosen.policy.slots}",
        (chosen.policy.slots, 0),
        xytext=(-4, 6),
        textcoords="offset points",
        ha="right",
        color=COLOURS["chosen"],
        fontsize=9,
    )
    beside = axes.twinx()
    beside.plot(slots, [each.row_seconds for each in ordered], "s--", color=COLOURS["row"], markersize=4)
    beside.set_ylabel("seconds from joining to last token", color=COLOURS["row"])
    beside.set_ylim(bottom=0)
    beside.spines[["top"]].set_visible(False)


def _against_each_other(axes: Axes, ordered: Sequence[Prediction], chosen: Prediction) -> None:
    rows, speeds = [each.row_seconds for each in ordered], [each.tokens_per_second for each in ordered]
    axes.plot(rows, speeds, "o-", color=COLOURS["speed"], markersize=4)
    labelled = 0.0
    for each in ordered:
        if each.tokens_per_second - labelled < 0.04 * max(speeds):
            continue
        labelled = each.tokens_per_second
        place = (each.row_seconds, each.tokens_per_second)
        axes.annotate(str(each.policy.slots), place, xytext=(6, -10), textcoords="offset points", fontsize=8)
    axes.plot([chosen.row_seconds], [chosen.tokens_per_second], "o", color=COLOURS["chosen"], markersize=8)
    axes.set_xlabel("seconds from joining to last token of a row")
    axes.set_ylabel("generated tokens per second (labels: slots)")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.spines[["right"]].set_visible(False)
