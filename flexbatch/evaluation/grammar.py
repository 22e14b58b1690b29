"""The grammar of an extraction's target, in llguidance's form."""

from __future__ import annotations

import json
from typing import Final

import llguidance

from flexbatch.errors import ConfigError
from flexbatch.evaluation.fields import Target

SEPARATORS: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps


def grammar(target: Target) -> str:
    """The target in llguidance's form. A space may come first: most prompts end without one."""
    if target.schema is not None:
        rule = f"%json {json.dumps({**target.schema, 'x-guidance': SEPARATORS})}"
    elif target.choices:
        rule = " | ".join(json.dumps(choice) for choice in target.choices)
    else:
        rule = "/" + target.regex.replace("/", r"\/") + "/"
    return llguidance.LLMatcher.grammar_from_lark(f'start: " "? target\ntarget: {rule}\n')


def check_grammar(target: Target) -> None:
    """ConfigError for a schema or expression that nothing can satisfy, or that llguidance cannot enforce."""
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar(target))
    if failed:
        key = "job.regex" if target.regex else "job.choices" if target.choices else "job.schema"
        raise ConfigError(
            f"{key} cannot be enforced: {' '.join(messages[0].split())}",
            remedy="Correct it, or generate without a constraint and have the output checked: job.constrain=false.",
        )
