"""The grammar of an extraction's target, in llguidance's form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import llguidance

from flexbatch.errors import ConfigError
from flexbatch.evaluation.fields import Target

SEPARATORS: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps
ASCII_CLASSES: Final = {r"\d": "0-9", r"\w": "0-9A-Za-z_", r"\s": r" \t\n\r\f\v"}


def grammar(target: Target) -> str:
    """The target in llguidance's form. A space may come first: most prompts end without one."""
    if target.schema is not None:
        rule = f"%json {json.dumps({**_ascii_patterns(target.schema), 'x-guidance': SEPARATORS})}"
    elif target.choices:
        rule = " | ".join(json.dumps(choice) for choice in target.choices)
    else:
        rule = "/" + ascii_classes(target.regex).replace("/", r"\/") + "/"
    return llguidance.LLMatcher.grammar_from_lark(f'start: " "? target\ntarget: {rule}\n')


def ascii_classes(pattern: str) -> str:
    r"""`\d`, `\w` and `\s` in ASCII: which characters beyond it are digits depends on the version of Unicode that
    Python and llguidance were built with, and what is generated must match in both."""
    inside, out, place = False, "", 0
    while place < len(pattern):
        piece = pattern[place : place + 2] if pattern[place] == "\\" else pattern[place]
        place += len(piece)
        if piece in ASCII_CLASSES:
            piece = ASCII_CLASSES[piece] if inside else f"[{ASCII_CLASSES[piece]}]"
        elif piece in ("[", "]"):
            inside = piece == "["
        out += piece
    return out


def _ascii_patterns(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        return {
            key: ascii_classes(value) if key == "pattern" and isinstance(value, str) else _ascii_patterns(value)
            for key, value in schema.items()
        }
    return [_ascii_patterns(item) for item in schema] if isinstance(schema, list) else schema


def check_grammar(target: Target) -> None:
    """ConfigError for a schema or expression that nothing can satisfy, or that llguidance cannot enforce."""
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar(target))
    if failed:
        key = "job.regex" if target.regex else "job.choices" if target.choices else "job.schema"
        raise ConfigError(
            f"{key} cannot be enforced: {' '.join(messages[0].split())}",
            remedy="Correct it, or generate without a constraint and have the output checked: job.constrain=false.",
        )
