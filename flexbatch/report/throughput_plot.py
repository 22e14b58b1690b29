"""The run over time as one SVG: tokens a second, bytes a second over each link, the share of time spent waiting."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexbatch.report.timeline import Stretch

COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#dc2626", "#0891b2")


def throughput_svg(stretches: Sequence[Stretch]) -> str:
    """Time is time at work: the gaps between attempts are cut out, a dashed line marks each new attempt."""
    ends, middles = [], []
    clock = 0.0
    for stretch in stretches:
        middles.append(clock + stretch.seconds / 2)
        clock += stretch.seconds
        ends.append(clock)
    scale, unit = (3600.0, "hours") if clock > 7200 else (60.0, "minutes") if clock > 180 else (1.0, "seconds")
    times = [middle / scale for middle in middles]
    figure = Figure(figsize=(9.6, 6.0), layout="constrained")
    tokens, traffic, waits = figure.subplots(3, 1, sharex=True)
    _tokens(tokens, times, stretches)
    _traffic(traffic, times, stretches)
    _waits(waits, times, stretches)
    for axes in (tokens, traffic, waits):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_ylim(bottom=0)
        for number in range(1, len(stretches)):
            if stretches[number].attempt != stretches[number - 1].attempt:
                axes.axvline(ends[number - 1] / scale, color="#9ca3af", linestyle="--", linewidth=0.8)
    waits.set_xlabel(f"{unit} at work")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _tokens(axes: Axes, times: Sequence[float], stretches: Sequence[Stretch]) -> None:
    generated = [stretch.decode_tokens / max(stretch.seconds, 1e-9) for stretch in stretches]
    prompts = [stretch.prefill_tokens / max(stretch.seconds, 1e-9) for stretch in stretches]
    marker = "o" if len(times) < 40 else ""
    axes.plot(times, generated, color=COLOURS[0], label="generated", marker=marker, markersize=2.5)
    axes.plot(times, prompts, color=COLOURS[1], label="prompt", marker=marker, markersize=2.5)
    axes.set_ylabel("tokens/s")
    axes.legend(frameon=False, fontsize=8, ncols=2)


def _traffic(axes: Axes, times: Sequence[float], stretches: Sequence[Stretch]) -> None:
    links = sorted({link for stretch in stretches for link, count in stretch.bytes_moved.items() if count})
    for link, colour in zip(links, COLOURS * len(links), strict=False):
        rates = [stretch.bytes_moved.get(link, 0) / max(stretch.seconds, 1e-9) / 1e9 for stretch in stretches]
        axes.plot(times, rates, color=colour, label=link.replace(">", " to "))
    axes.set_ylabel("GB/s")
    if links:
        axes.legend(frameon=False, fontsize=8, ncols=3)
    else:
        axes.text(0.5, 0.5, "nothing moved between tiers", transform=axes.transAxes, ha="center", color="#6b7280")


def _waits(axes: Axes, times: Sequence[float], stretches: Sequence[Stretch]) -> None:
    causes = sorted({cause for stretch in stretches for cause, seconds in stretch.waits.items() if seconds > 0})
    shares = [
        [100 * stretch.waits.get(cause, 0.0) / max(stretch.seconds, 1e-9) for stretch in stretches] for cause in causes
    ]
    axes.set_ylabel("waiting, %")
    axes.set_ylim(0, 100)
    if shares:
        axes.stackplot(times, *shares, labels=[f"for {cause}" for cause in causes], colors=COLOURS, alpha=0.7)
        axes.legend(frameon=False, fontsize=8, ncols=3)
    else:
        axes.text(0.5, 0.5, "no wait", transform=axes.transAxes, ha="center", color="#6b7280")
