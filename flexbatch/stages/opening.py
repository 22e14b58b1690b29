"""The engine of a job: its model under its plan."""

from __future__ import annotations

import shutil
from pathlib import Path

from flexbatch.config import Config
from flexbatch.engine.compiling import COMPILER_BYTES, compile_ahead
from flexbatch.engine.engine import Engine
from flexbatch.engine.growing import Vocabulary
from flexbatch.engine.opening import UNLIMITED, EngineOptions, Limits, open_engine
from flexbatch.memory.packed_file import OnProgress
from flexbatch.memory.transfer import OnEvent
from flexbatch.plan.blocked_file import affordable_bytes
from flexbatch.plan.cost_model import guess_room
from flexbatch.plan.memory_need import prompts_bytes
from flexbatch.plan.need import peak_bytes, working_bytes
from flexbatch.plan.policy import Tier
from flexbatch.plan.rows_in_flight import most_rows
from flexbatch.report.plan_text import Plan
from flexbatch.stages.folders import working_folder
from flexbatch.stages.model import Model
from flexbatch.stages.planning import longest_prompts
from flexbatch.stages.work import Work


def open_for(
    config: Config,
    model: Model,
    work: Work,
    plan: Plan,
    scratch: Path,
    on_event: OnEvent | None = None,
    on_packing: OnProgress | None = None,
    to_do: float = 1.0,
) -> Engine:
    """Loads what is resident and starts the stream of the rest. `scratch` takes what goes to disk;
    `on_event` is told what computes, reads and copies, when, and `on_packing` how far a packed file is. This part of
    the job is still `to_do`."""
    named = config.offload.disk_dir
    disk_folder = working_folder(named, "offload.disk_dir") if named else working_folder(str(scratch), "output.dir")
    limits = plan.limits
    cache = working_folder(config.model.cache_dir, "model.cache_dir")
    longest, longest_own = longest_prompts(work)
    compile_for(plan, model)
    return open_engine(
        model.checkpoint(cache),
        plan.prediction.policy,
        Limits(limits.device, limits.host, limits.disk, disk_folder, limits.one_memory),
        Vocabulary(model.tokenizer, model.end_tokens),
        EngineOptions(
            span=longest + work.longest_new,
            own_span=longest_own + work.longest_new,
            planned_bytes=_main_memory_bytes(plan),
            working_bytes=working_bytes(plan.prediction.needs),
            prompts_bytes=prompts_bytes(plan.spec, plan.workload, plan.prediction.policy),
            most_slots=most_rows(plan.workload, plan.prediction.policy),
            guesses=guess_room(plan.spec, plan.workload, plan.prediction),
            dtype=model.dtype,
            device=model.device,
            padded_width=work.longest_prompt if config.prompt.padding == "max_length" else 0,
            reader=config.offload.reader,
            packed_folder=cache / "packed",
            blocked_file_bytes=blocked_file_bytes(config.offload.blocked_file, plan, cache, to_do),
            constraints=work.constraints,
            on_event=on_event,
            on_packing=on_packing,
        ),
    )


def compile_for(plan: Plan, model: Model) -> None:
    """Compiles the kernels of a run elsewhere where the plan leaves no room for the compiler."""
    if plan.limits.one_memory and plan.limits.device - _main_memory_bytes(plan) < COMPILER_BYTES:
        compile_ahead(plan.prediction.policy, model.dtype)


def _main_memory_bytes(plan: Plan) -> int:
    """What the plan takes of it where device and host are one memory."""
    used = peak_bytes(plan.prediction.needs)
    return used[Tier.DEVICE] + used[Tier.HOST]


def blocked_file_bytes(choice: str, plan: Plan, folder: Path, to_do: float) -> int | None:
    """How much a new copy of the weights in the processor's order may take in `folder`, with this part of the job still
    to do; None: none is to be used."""
    if choice == "never":
        return None
    if choice == "always":
        return UNLIMITED
    return affordable_bytes(plan.prediction, plan.hardware, shutil.disk_usage(folder).free, to_do)
