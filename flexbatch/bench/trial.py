"""What a child process is told to do, and what it answers. Both cross as JSON files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Trial:
    """One engine's run. `model` is a folder in Hugging Face layout, `prompts` a file that `write_prompts` made.

    The engine runs the first `rows` prompts and generates exactly `new_tokens` tokens for each, greedily, `batch` rows
    at a time (0: it decides). `limit` bytes of main memory may be used (0: no limit). `dtype` is the type of the maths.
    `scratch` is a folder for whatever the engine keeps on disk; `options` are the user's groups `offload` and
    `hardware`, for flexbatch itself.
    """

    engine: str
    model: str
    prompts: str
    rows: int
    new_tokens: int
    dtype: str
    scratch: str
    cache_dir: str
    batch: int = 0
    limit: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a trial. `seconds` are those of generation: import and making the model ready are `setup_seconds`.

    `digest` is of all generated tokens in the order of the prompts. `prefill_seconds` is how long the first tokens of
    all batches took, where the engine works in batches. `read_bytes` came from the disk during generation;
    `processor_seconds` are those of all threads: near `seconds` times cores on a quiet machine, and the better guide
    on a busy one. `peak` is the memory limit's own count (page cache included), `peak_anonymous` that without the page
    cache, `peak_resident` the process's own. `load_before` is the machine's load average when the run began. With
    `error` nothing else counts.
    """

    engine: str
    rows: int = 0
    batch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    setup_seconds: float = 0.0
    prefill_seconds: float | None = None
    read_bytes: int = 0
    processor_seconds: float = 0.0
    peak: int = 0
    peak_anonymous: int = 0
    peak_resident: int = 0
    digest: str = ""
    load_before: float | None = None
    error: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Generated tokens per second; 0 where the run failed."""
        return self.tokens / self.seconds if self.seconds and not self.error else 0.0


@dataclass(frozen=True)
class Prompts:
    """Token ids of every prompt, and how many leading tokens of each are its group's."""

    token_ids: tuple[tuple[int, ...], ...]
    shared_tokens: int = 0
    note: str = ""

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) for prompt in self.token_ids]


def digest_of(tokens: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([list(map(int, row)) for row in tokens]).encode()).hexdigest()[:16]


def write_prompts(file: Path, prompts: Prompts) -> None:
    file.write_text(json.dumps(dataclasses.asdict(prompts)))


def read_prompts(file: Path, rows: int) -> Prompts:
    fields = json.loads(file.read_text())
    ids = tuple(tuple(prompt) for prompt in fields["token_ids"][:rows])
    return Prompts(ids, fields["shared_tokens"], fields["note"])


def write_record(file: Path, record: Trial | Outcome) -> None:
    """Written beside and renamed: a child that is killed while it writes leaves no half record."""
    beside = file.with_suffix(".partial")
    beside.write_text(json.dumps(dataclasses.asdict(record), indent=1))
    beside.replace(file)


def read_trial(file: Path) -> Trial:
    return Trial(**json.loads(file.read_text()))


def read_outcome(file: Path) -> Outcome:
    return Outcome(**json.loads(file.read_text()))
