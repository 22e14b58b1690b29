"""A conversation as a job of one row, for the plan: where everything lives, and what a pass with guesses takes."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from flexbatch.config import Config
from flexbatch.engine.conversation import NO_LOOKUP, Conversation
from flexbatch.engine.lookup import LONGEST_DRAFT
from flexbatch.engine.opening import EngineOptions, Limits, open_conversation
from flexbatch.errors import ConfigError
from flexbatch.plan.need import working_bytes
from flexbatch.plan.terms import by_resource, decode_terms, kv_terms, overhead_terms, pass_seconds, weight_terms
from flexbatch.plan.workload import PassLoad
from flexbatch.records import Prompt, Row
from flexbatch.report.packing_notice import PackingNotice
from flexbatch.report.plan_text import Plan
from flexbatch.stages.folders import working_folder
from flexbatch.stages.model import Model
from flexbatch.stages.opening import blocked_file_bytes, compile_for
from flexbatch.stages.planning import plan_run
from flexbatch.stages.work import Work

MOST_BY_DEFAULT = 4096
MOST_WITHOUT_POSITIONS = 2048


def context_size(config: Config, positions: int) -> int:
    """The tokens of `chat.context` for a model of so many positions (0: no bound). ConfigError if it has fewer."""
    wanted = config.chat.context
    if wanted == "auto":
        return min(positions, MOST_BY_DEFAULT) or MOST_WITHOUT_POSITIONS
    if positions and wanted > positions:
        raise ConfigError(
            f"chat.context is {wanted}, but the model has {positions} positions.",
            remedy=f"Set chat.context to at most {positions}, or leave it at auto.",
        )
    return int(wanted)


def plan_conversation(config: Config, model: Model, context: int) -> Plan:
    """The plan of a conversation of `context` tokens. CapacityError where the limits cannot be met."""
    new = max(1, min(config.generation.max_new_tokens, context // 2))
    prompt = Prompt(Row("chat", "chat", 0, {}), (0,) * max(1, context - new))
    work = Work(
        prompts=lambda: iter([prompt]),
        total=1,
        longest_prompt=len(prompt.token_ids),
        longest_new=new,
        carried={},
        identity={},
        window=1,
        part_rows=1,
    )
    # What is fed of one row sees all of it expanded: there a compressed cache would only take time.
    plain = replace(config, offload=replace(config.offload, compressed_cache="never"))
    return plan_run(plain, model, work, makes_copies=False)


def seconds_with_guesses(plan: Plan) -> tuple[float, ...]:
    """What a pass takes that feeds one token and 0, 1, 2 ... guesses: the arithmetic grows, the traffic does not."""
    spec, hardware, workload, policy = plan.spec, plan.hardware, plan.workload, plan.prediction.policy
    one = PassLoad(joining=0, decoding=1)
    traffic = [
        *weight_terms(spec, hardware, policy),
        *kv_terms(spec, hardware, workload, policy, one),
        *overhead_terms(spec, hardware, workload, policy, one),
    ]
    arithmetic = (
        decode_terms(spec, hardware, workload, policy, PassLoad(joining=0, decoding=count))
        for count in range(1, LONGEST_DRAFT + 2)
    )
    return tuple(pass_seconds(by_resource([*terms, *traffic])) for terms in arithmetic)


def pass_times(config: Config, plan: Plan) -> tuple[float, ...]:
    """For `Conversation.say`."""
    return seconds_with_guesses(plan) if config.chat.lookup else NO_LOOKUP


@contextmanager
def opened(config: Config, model: Model, plan: Plan, context: int) -> Iterator[Conversation]:
    """The conversation with its weights, for as long as the context lasts."""
    cache = working_folder(config.model.cache_dir, "model.cache_dir")
    named = config.offload.disk_dir
    place = working_folder(named, "offload.disk_dir") if named else cache
    limits = plan.limits
    compile_for(plan, model)
    with tempfile.TemporaryDirectory(prefix="chat-", dir=place) as scratch:
        conversation = open_conversation(
            model.checkpoint(cache),
            plan.prediction.policy,
            Limits(limits.device, limits.host, limits.disk, Path(scratch), limits.one_memory),
            EngineOptions(
                span=context,
                working_bytes=working_bytes(plan.prediction.needs),
                dtype=model.dtype,
                device=model.device,
                reader=config.offload.reader,
                packed_folder=cache / "packed",
                blocked_file_bytes=blocked_file_bytes(config.offload.blocked_file, plan, cache, to_do=0.0),
                on_packing=PackingNotice(sys.stderr, lambda: None),
            ),
        )
        try:
            yield conversation
        finally:
            conversation.close()
