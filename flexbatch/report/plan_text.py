"""The plan in words: five lines at the start of a run, tables for `plan`, predicted beside measured at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexbatch.plan.advice import Advice
from flexbatch.plan.cost_model import Prediction
from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.limits import Limits, gibibytes
from flexbatch.plan.memory_need import cache_form, kv_units
from flexbatch.plan.model_spec import ModelSpec
from flexbatch.plan.policy import Shares, Tier
from flexbatch.plan.rows_in_flight import most_rows
from flexbatch.plan.terms import Resource
from flexbatch.plan.weight_need import weight_form
from flexbatch.plan.workload import Workload
from flexbatch.report.progress import duration_text


@dataclass(frozen=True)
class Plan:
    """All that a plan is made from and comes to."""

    spec: ModelSpec
    hardware: HardwareProfile
    workload: Workload
    limits: Limits
    prediction: Prediction


@dataclass(frozen=True)
class Measured:
    """What a run really took: sums over the passes of this attempt. `peak_bytes` by tier, `bytes_moved` by link."""

    seconds: float
    passes: int
    prefill_tokens: int
    decode_tokens: int
    waits: Mapping[str, float] = field(default_factory=dict)
    bytes_moved: Mapping[str, int] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)


def plan_lines(plan: Plan, advice: Sequence[Advice] = ()) -> list[str]:
    """The plan in five lines."""
    spec, made = plan.spec, plan.prediction
    policy = made.policy
    weights, kv = (
        gibibytes(spec.weight_bytes(weight_form(policy))),
        gibibytes(spec.kv_bytes_per_token(cache_form(policy))),
    )
    bits = "" if policy.weight_bits == 16 else f" in {policy.weight_bits} bits"
    compressed = f" (compressed to {100 * spec.compressed_share:.0f} %)" if policy.compressed else ""
    return [
        f"Model    {spec.name}: {spec.parameters / 1e9:.3g}B parameters, {weights}{bits}; KV cache {kv} per token",
        f"Lives    weights {shares_text(policy.weights)}{compressed}; KV cache {shares_text(policy.kv)}; "
        f"hidden states {shares_text(policy.hidden)}",
        f"Runs     {_rows_text(plan)} in flight, {policy.prefill_tokens} prompt tokens per pass; "
        + ", ".join(_use(plan, tier) for tier in Tier if made.peak[tier] and plan.limits.of(tier)),
        f"Takes    {duration_text(made.seconds)} for {plan.workload.rows} rows: {made.tokens_per_second:.3g} tokens/s, "
        f"prefill {duration_text(made.prefill_seconds)}, decode {duration_text(made.decode_seconds)}",
        f"Bound by {made.binding.value} ({_busy_text(made)})" + (f"; {_advice_text(advice)}" if advice else ""),
    ]


def _rows_text(plan: Plan) -> str:
    """Of the longest rows, and of the shortest, where the cache holds more of them."""
    policy = plan.prediction.policy
    most = most_rows(plan.workload, policy)
    return f"{policy.slots} rows" if most == policy.slots else f"{policy.slots} to {most} rows"


def print_plan(plan: Plan, advice: Sequence[Advice], notes: Sequence[str]) -> None:
    """The whole plan to standard output: tables, then the five lines, then what else is to be known."""
    console = Console(soft_wrap=True, highlight=False)
    for table in plan_tables(plan, advice):
        console.print(table)
        console.print()
    for line in (*plan_lines(plan, advice), *notes):
        console.print(Text(line))


def shares_text(shares: Shares) -> str:
    """`12 % device, 88 % disk`."""
    parts = {"device": shares.device, "host": shares.host, "disk": shares.disk}
    return ", ".join(f"{100 * share:.3g} % {tier}" for tier, share in parts.items() if share > 5e-4)


def plan_tables(plan: Plan, advice: Sequence[Advice] = ()) -> list[Table]:
    """What lives where, what each limit is used for, where the time goes, what would help."""
    tables = [placement_table(plan), memory_table(plan), terms_table(plan.prediction)]
    if advice:
        tables.append(advice_table(advice))
    return tables


def placement_table(plan: Plan) -> Table:
    """Bytes of each kind of tensor on each tier."""
    policy, spec = plan.prediction.policy, plan.spec
    table = _table("What lives where", "tensors", *(tier.value for tier in Tier))
    weights = spec.weight_bytes(weight_form(policy))
    form = "compressed" if policy.compressed else f"{policy.weight_bits} bits"
    table.add_row(f"weights ({form})", *_shares_of(policy.weights, weights))
    units = kv_units(spec, policy)
    kv = sum(item.nbytes for item in plan.prediction.needs if item.what == "KV cache")
    total = max(1, sum(units.values()))
    table.add_row(
        f"KV cache ({'compressed' if policy.compressed_cache else f'{policy.kv_bits} bits'}, {policy.slots} slots)",
        *(gibibytes(kv * units[tier] / total) if units[tier] else "" for tier in Tier),
    )
    table.add_row("hidden states", *(f"{100 * share:.3g} %" if share else "" for share in _by_tier(policy.hidden)))
    return table


def memory_table(plan: Plan) -> Table:
    """Every item of every tier, with its sum and its limit."""
    table = _table("Memory at the peak", "tier", "what for", "bytes", "of the limit")
    for tier in Tier:
        items = sorted((item for item in plan.prediction.needs if item.tier is tier), key=lambda item: -item.nbytes)
        limit = plan.limits.of(tier)
        for item in items:
            table.add_row(tier.value, item.what, gibibytes(item.nbytes), _percent(item.nbytes, limit))
        if items:
            peak = plan.prediction.peak[tier]
            table.add_row(tier.value, "all", gibibytes(peak), _percent(peak, limit), style="bold", end_section=True)
    return table


def terms_table(prediction: Prediction) -> Table:
    """Seconds of every term of the cost model over the whole job, by resource; the passes' own seconds last."""
    table = _table("Where the time goes", "resource", "what for", "seconds", "amount")
    for resource in Resource:
        terms = [term for term in prediction.terms.values() if term.resource is resource and term.seconds > 0]
        for term in sorted(terms, key=lambda term: -term.seconds):
            table.add_row(resource.value, term.what, f"{term.seconds:.3g}", _amount_text(term.amount, term.unit))
        if terms:
            busy = prediction.resource_seconds[resource]
            table.add_row(resource.value, "all", f"{busy:.3g}", "", style="bold", end_section=True)
    table.add_row("", "the job", f"{prediction.seconds:.3g}", f"{prediction.passes:.0f} passes", style="bold")
    return table


def advice_table(advice: Sequence[Advice]) -> Table:
    table = _table("What would help", "change", "speed", "but")
    for each in advice:
        table.add_row(each.change, f"{each.speedup:.1f}x", each.cost)
    return table


def predicted_against_measured(plan: Plan, measured: Measured) -> Table:
    """Every figure that a run also measures. Where this attempt ran only a part of the job, sums are scaled to it."""
    table = _table("Predicted and measured", "figure", "predicted", "measured", "measured / predicted")
    for what, predicted, real, unit in comparisons(plan, measured):
        ratio = f"{real / predicted:.2f}" if predicted > 0 else ""
        table.add_row(what, f"{predicted:.4g} {unit}", f"{real:.4g} {unit}", ratio)
    return table


def comparisons(plan: Plan, measured: Measured) -> Iterator[tuple[str, float, float, str]]:
    """(figure, predicted, measured, unit) for what both sides know."""
    made = plan.prediction
    part = min(1.0, measured.decode_tokens / max(1.0, made.generated_tokens))
    yield "time", made.seconds * part, measured.seconds, "s"
    yield "speed", made.tokens_per_second, measured.decode_tokens / max(measured.seconds, 1e-9), "tokens/s"
    yield "passes", made.passes * part, float(measured.passes), ""
    yield "time of a pass", made.pass_seconds, measured.seconds / max(1, measured.passes), "s"
    yield "waiting for weights", _waiting(made) * part, measured.waits.get("weights", 0.0), "s"
    for link, what in (("disk>device", "weights from disk"), ("host>device", "weights to device")):
        if link in measured.bytes_moved and what in made.terms:
            yield what, made.terms[what].amount * part / 1e9, measured.bytes_moved[link] / 1e9, "GB"
    for tier in Tier:
        if tier.value in measured.peak_bytes:
            yield (
                f"peak of {tier.value} memory",
                made.peak[tier] / 2**30,
                measured.peak_bytes[tier.value] / 2**30,
                "GiB",
            )


def _waiting(prediction: Prediction) -> float:
    return max(0.0, prediction.seconds - prediction.resource_seconds[Resource.COMPUTE])


def _use(plan: Plan, tier: Tier) -> str:
    return f"{gibibytes(plan.prediction.peak[tier])} of {gibibytes(plan.limits.of(tier))} {tier.value}"


def _busy_text(prediction: Prediction) -> str:
    """How busy each resource is that works at all, busiest first."""
    busy = sorted(prediction.resource_seconds.items(), key=lambda item: -item[1])
    shares = [(resource, seconds / prediction.seconds) for resource, seconds in busy]
    return ", ".join(f"{resource.value} busy {100 * share:.0f} %" for resource, share in shares if share > 0.005)


def _advice_text(advice: Sequence[Advice]) -> str:
    return ", ".join(f"{each.change}: {each.speedup:.1f}x" for each in advice[:2])


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for column in columns:
        numeric = column not in ("tensors", "tier", "what for", "resource", "change", "but", "figure")
        table.add_column(column, justify="right" if numeric else "left")
    return table


def _by_tier(shares: Shares) -> tuple[float, float, float]:
    return shares.device, shares.host, shares.disk


def _shares_of(shares: Shares, nbytes: float) -> list[str]:
    return [f"{gibibytes(share * nbytes)} ({100 * share:.3g} %)" if share > 5e-4 else "" for share in _by_tier(shares)]


def _percent(nbytes: float, limit: int) -> str:
    return f"{100 * nbytes / limit:.1f} %" if limit else ""


def _amount_text(amount: float, unit: str) -> str:
    """`12.3 TFLOP`, `4.1 GB`, `3 calls`."""
    short = {"bytes": "B", "numbers": "numbers", "FLOP": "FLOP"}.get(unit, unit)
    power = min(5, max(0, int(math.log10(max(amount, 1.0)) // 3)))
    if unit in ("calls", "passes"):
        return f"{amount:,.0f} {unit}"
    return f"{amount / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}{short}"
