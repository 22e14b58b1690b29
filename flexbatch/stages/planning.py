"""The plan of a run: the machine, the model's sizes and the work, and the policy that follows from them."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from flexbatch.composition import bundled
from flexbatch.config import Config, OffloadConfig
from flexbatch.engine.calibration import familiar_hardware, in_this_process, measure_hardware
from flexbatch.engine.model_shapes import spec_from_config
from flexbatch.memory.compressed_weight import compressed_share, estimated_share
from flexbatch.plan.compressed_file import has_room, is_wanted
from flexbatch.plan.cost_model import predict
from flexbatch.plan.hardware import HardwareProfile, profile_from_mapping
from flexbatch.plan.limits import limits_of
from flexbatch.plan.model_spec import ModelSpec
from flexbatch.plan.optimizer import choose_policy, frontier
from flexbatch.plan.workload import Workload
from flexbatch.report.plan_text import Plan
from flexbatch.stages.folders import working_folder
from flexbatch.stages.model import Model
from flexbatch.stages.work import Scan, Work

# A model this small beside the free memory needs no measured machine: everything is resident whatever the rates are.
SMALL_MODEL = 0.05

# The plan adds up its samples again and again; more of them say no more.
MOST_SAMPLES = 4096

HALF = ("bfloat16", "float16", "float32")


def plan_run(config: Config, model: Model, work: Work, *, makes_copies: bool = True) -> Plan:
    """The plan that a run follows; without `makes_copies` weights are not copied where they were not before.
    CapacityError where the limits cannot be met."""
    return make_plan(config, model, work, measure=False, makes_copies=makes_copies)


def make_plan(config: Config, model: Model, work: Work, *, measure: bool, makes_copies: bool = True) -> Plan:
    """With `measure` the machine is measured if it was not before; otherwise only where the figures matter."""
    spec = with_compression(model_spec(model), config, model, makes_copies=makes_copies)
    hardware = describe_hardware(config, model, spec, measure=measure)
    if config.hardware.profile and config.model.dtype == "auto":
        usual = usual_dtype(spec, hardware)
        spec = replace(spec, compute_dtype=usual, stored_dtype=spec.stored_dtype if model.found.index else usual)
    workload = describe_workload(work, work.scan)
    guesses = config.offload.lookup and config.prompt.padding != "max_length"  # padded rows do not lie side by side
    _, prediction = choose_policy(spec, hardware, workload, replace(config.offload, lookup=guesses))
    return Plan(spec, hardware, workload, limits_of(hardware, config.offload), prediction)


def with_plain_cache(plan: Plan, offload: OffloadConfig) -> Plan:
    """The plan for keys and values as the model makes them. CapacityError where those do not fit."""
    plain = replace(offload, compressed_cache="never", lookup=plan.prediction.policy.guesses)
    _, prediction = choose_policy(plan.spec, plan.hardware, plan.workload, plain)
    return replace(plan, prediction=prediction)


def with_fewer_slots(plan: Plan) -> Plan | None:
    """The plan with half the rows in flight and half the prompt tokens per pass; None where there is one row."""
    policy = plan.prediction.policy
    if policy.slots == 1:
        return None
    tokens = max(1, policy.prefill_tokens // 2)
    fewer = replace(policy, slots=policy.slots // 2, prefill_tokens=tokens, more_if_short=False, guesses=False)
    return replace(plan, prediction=predict(plan.spec, plan.hardware, plan.workload, fewer))


def model_spec(model: Model) -> ModelSpec:
    compute = str(model.dtype).removeprefix("torch.")
    entries = model.found.index.entries.values() if model.found.index else ()
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    amounts: dict[str, int] = {}
    for entry in entries:
        if entry.dtype in names:
            amounts[names[entry.dtype]] = amounts.get(names[entry.dtype], 0) + entry.nbytes
    stored = max(amounts, key=lambda name: amounts[name], default=compute)
    return spec_from_config(model.config, model.found.name, stored, compute)


def with_compression(spec: ModelSpec, config: Config, model: Model, *, makes_copies: bool) -> ModelSpec:
    """The model with what a compressed copy of its weights takes, where it is there or may be made."""
    index = model.found.index
    is_half = model.device.type == "cpu" and model.dtype == torch.bfloat16
    if index is None or not is_half or not is_wanted(config.offload):
        return spec
    entries = list(index.entries.values())
    if sum(math.prod(entry.shape) for entry in entries if len(entry.shape) == 2) < spec.packed_numbers:
        return spec  # some are stored in stacks, which are not compressed
    cache = working_folder(config.model.cache_dir, "model.cache_dir")
    known = compressed_share(entries, cache / "packed")
    if known is not None:
        return replace(spec, compressed_share=known, has_compressed_file=True)
    made = replace(spec, compressed_share=estimated_share(entries))
    allowed = makes_copies and has_room(made, shutil.disk_usage(cache).free)
    return made if allowed or config.offload.compressed_file == "always" else spec


def usual_dtype(spec: ModelSpec, hardware: HardwareProfile) -> str:
    """What `model.dtype=auto` means on another machine: the stored type, or the nearest that it computes in."""
    return next((kind for kind in (spec.compute_dtype, *HALF) if kind in hardware.gemm), spec.compute_dtype)


def describe_hardware(config: Config, model: Model, spec: ModelSpec, *, measure: bool) -> HardwareProfile:
    """The machine that `hardware=` names, or this one; without `measure` for a run here."""
    if config.hardware.profile:
        described = profile_from_mapping(config.hardware.profile, where=f"hardware={config.hardware.name}")
        return described if measure else in_this_process(described)
    cache = working_folder(config.model.cache_dir, "model.cache_dir")
    disk = working_folder(config.offload.disk_dir, "offload.disk_dir") if config.offload.disk_dir else cache
    if model.device.type == "cpu" and not measure:
        familiar = familiar_hardware(model.device, disk, cache, _typical_rates())
        if spec.weight_bytes(16) < SMALL_MODEL * familiar.device_memory:
            return familiar
    return measure_hardware(model.device, disk, cache)


def draw_frontier(config: Config, plan: Plan, folder: Path) -> Path:
    """A picture of speed against latency for rising slots, in the output folder."""
    from flexbatch.report.frontier import write_frontier  # it draws with Matplotlib: 30 MB that a run needs for rows

    predictions = frontier(plan.spec, plan.hardware, plan.workload, config.offload)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "frontier.png"
    write_frontier(predictions, plan.prediction, picture, title=f"{plan.spec.name} on {plan.hardware.name}")
    return picture


def describe_workload(work: Work, scan: Scan) -> Workload:
    """The scanned prompts stand for all rows; they bound them only where they are all."""
    rows = work.total if work.total is not None else max(len(scan.lengths), 1)
    shared = [tokens for tokens in scan.shared if tokens]
    every = math.ceil(len(scan.lengths) / MOST_SAMPLES) or 1
    alike = Workload.from_samples(
        max(1, rows), scan.lengths[::every] or (work.longest_prompt,), work.longest_new, new_lengths=scan.new[::every]
    )
    longest, longest_own = longest_prompts(work)
    alike = replace(alike, longest_prompt=longest, every=every)
    if not shared:
        return alike
    groups = len(shared) / max(1, scan.groups)
    mean = sum(shared) / len(scan.shared)
    return replace(alike, shared_tokens=mean, rows_per_group=groups, longest_own=longest_own)


def longest_prompts(work: Work) -> tuple[int, int]:
    """The most tokens of any prompt, and of any without its shared prefix: seen, or where not all were, allowed."""
    if work.scan.complete:
        return max(work.scan.lengths, default=1), work.scan.longest_own
    return work.longest_prompt, work.longest_prompt


def _typical_rates() -> dict[str, Any]:
    content = yaml.safe_load((bundled("conf") / "hardware" / "cpu-2core.yaml").read_text(encoding="utf-8"))
    rates: dict[str, Any] = content["profile"]
    return rates
