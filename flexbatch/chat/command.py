"""`flexbatch chat`: the model found, planned and opened, and the conversation with it."""

from __future__ import annotations

import sys

from flexbatch.chat.dialogue import Dialogue, Speaker
from flexbatch.chat.planning import context_size, opened, pass_times, plan_conversation
from flexbatch.chat.signals import AnswerSignal
from flexbatch.chat.templates import Template, choose_template
from flexbatch.chat.terminal import Terminal
from flexbatch.config import Config
from flexbatch.data.prompts import sampling_of
from flexbatch.errors import CapacityError
from flexbatch.report.plan_text import Plan, plan_lines
from flexbatch.stages.model import Model, find_model, say
from flexbatch.validation import refuse_unused

DEFAULTS = ("job=generate", "generation.max_new_tokens=512", "prompt.chat_template=true")
"""What a conversation begins with in place of a job's settings."""

NOT_FOR_TALKING = ("generation.min_new_tokens", "generation.logprobs", "generation.num_completions")


def chat(config: Config) -> int:
    """Talks until the input ends. The exit code: 0, or that of a CapacityError if a message found no room."""
    refuse_unused(config, NOT_FOR_TALKING, because="a conversation does not take it", remedy="Leave it out.")
    sampling = sampling_of(config.generation, config.generation.seed)
    model = find_model(config)
    template = choose_template(config, model.tokenizer)
    context = context_size(config, model.context_tokens)
    plan = plan_conversation(config, model, context)
    seconds = pass_times(config, plan)
    for line in introduction(model, plan, template, context):
        say(line)
    speaker = Speaker(model.tokenizer, template, sampling, model.end_tokens, seconds, config.prompt.system)
    with opened(config, model, plan, context) as conversation, AnswerSignal() as signals:
        terminal = Terminal(Dialogue(speaker, conversation), conversation, signals, config.model.name)
        terminal.run()
    return CapacityError.exit_code if terminal.unanswered and not sys.stdin.isatty() else 0


def introduction(model: Model, plan: Plan, template: Template, context: int) -> list[str]:
    """What is to be known before the first message."""
    pace = plan.prediction.decode_seconds / max(1.0, plan.prediction.generated_tokens)
    return [
        *plan_lines(plan)[:2],
        f"Chat     {context} tokens of context, template: {template.name}; about {pace:.2g} s a token, less where "
        "lookup finds what comes next",
        *model.warnings,
        "/help lists the commands.",
    ]
