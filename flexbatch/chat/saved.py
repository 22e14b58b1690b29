"""A conversation as a file: one JSON object with the model, when it was saved, and the messages."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from flexbatch.chat.templates import Message
from flexbatch.errors import OutputError


def save(path: Path, model: str, messages: Sequence[Message]) -> None:
    """Writes it. OutputError if the file cannot be written."""
    record = {"model": model, "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "messages": list(messages)}
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"'{path}' cannot be written: {error.strerror or error}.", remedy="Name another file: /save FILE."
        ) from error


def default_name() -> str:
    return time.strftime("chat-%Y%m%d-%H%M%S.json")
