"""Jinja templates over a row's columns: sandboxed, checked against the columns before the first row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flexbatch.data.columns import near_misses
from flexbatch.errors import PromptError


class RenderError(Exception):
    """A template cannot be rendered for one row. The message is for the row's `error`."""


def _printable(value: Any) -> Any:
    """Jinja would print null as "None" and bytes as "b'...'", which nobody means in a prompt."""
    if value is None:
        raise RenderError("prints a null value")
    if isinstance(value, bytes):
        raise RenderError("prints bytes, which are not text")
    return value


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, keep_trailing_newline=True, finalize=_printable, autoescape=False
)


class Template:
    """A compiled template. `variables` are the columns that it uses.

    Raises:
        PromptError: a syntax error, an include, or a variable that is no column; the message names `key`.
    """

    def __init__(self, source: str, columns: Iterable[str], *, key: str = "prompt.template") -> None:
        try:
            tree = _ENVIRONMENT.parse(source)
            used = meta.find_undeclared_variables(tree)
            included = list(meta.find_referenced_templates(tree))
            self._template = _ENVIRONMENT.from_string(source)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise PromptError(
                f"{key}: {error}{f' (line {line})' if line else ''}: {_shortened(source)}",
                remedy="Correct the template; columns are written as {{ column }}.",
            ) from error
        if included:
            raise PromptError(
                f"{key}: include, import and extends are not available ({included[0]!r}).",
                remedy="Put the whole text into one template.",
            )
        known = list(columns)
        self.variables = frozenset(used & set(known))
        missing = sorted(used - set(known) - set(_ENVIRONMENT.globals))
        if missing:
            raise PromptError(
                f"{key}: the template uses '{missing[0]}', which is no column of the dataset.",
                remedy=near_misses(missing[0], known),
            )

    def render(self, fields: Mapping[str, Any]) -> str:
        """The text for one row.

        Raises:
            RenderError: whatever went wrong; a template is the user's program and may fail in any way.
        """
        try:
            text = self._template.render(fields)
        except Exception as error:
            nulls = sorted(name for name in self.variables if fields.get(name) is None)
            hint = f" (null in this row: {', '.join(nulls)})" if nulls else ""
            raise RenderError(
                f"the template failed: {' '.join(str(error).split()) or type(error).__name__}{hint}"
            ) from error
        return text


def _shortened(source: str) -> str:
    line = " ".join(source.split())
    return line if len(line) <= 100 else line[:97] + "..."


def read_template(path: str) -> str:
    """The text of `prompt.template_file`.

    Raises:
        PromptError: the file cannot be read as UTF-8 text.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PromptError(
            f"prompt.template_file: '{path}' cannot be read: {reason}.",
            remedy="Give a text file in UTF-8, or use prompt.template.",
        ) from error
