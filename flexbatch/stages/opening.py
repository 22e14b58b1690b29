"""The engine of a job: its model under its plan."""

from __future__ import annotations

from pathlib import Path

from flexbatch.config import Config
from flexbatch.engine.engine import Engine, Vocabulary
from flexbatch.engine.opening import EngineOptions, Limits, open_engine
from flexbatch.memory.transfer import OnEvent
from flexbatch.report.plan_text import Plan
from flexbatch.stages.folders import working_folder
from flexbatch.stages.model import Model
from flexbatch.stages.work import Work


def open_for(
    config: Config, model: Model, work: Work, plan: Plan, scratch: Path, on_event: OnEvent | None = None
) -> Engine:
    """Loads what is resident and starts the stream of the rest. `scratch` takes what goes to disk;
    `on_event` is told what computes, reads and copies, when."""
    named = config.offload.disk_dir
    disk_folder = working_folder(named, "offload.disk_dir") if named else working_folder(str(scratch), "output.dir")
    limits, scan = plan.limits, work.scan
    longest = max(scan.lengths, default=1) if scan.complete else work.longest_prompt
    return open_engine(
        model.checkpoint(Path(config.model.cache_dir).expanduser()),
        plan.prediction.policy,
        Limits(limits.device, limits.host, limits.disk, disk_folder, limits.one_memory),
        Vocabulary(model.tokenizer, model.end_tokens),
        EngineOptions(
            span=longest + work.longest_new,
            own_span=scan.longest_own + work.longest_new if scan.complete else 0,
            dtype=model.dtype,
            device=model.device,
            padded_width=work.longest_prompt if config.prompt.padding == "max_length" else 0,
            reader=config.offload.reader,
            packed_folder=Path(config.model.cache_dir).expanduser() / "packed",
            constraints=work.constraints,
            on_event=on_event,
        ),
    )
