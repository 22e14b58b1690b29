"""Small datasets and the command line, for jobs from one end to the other."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.command_line import CommandLine


def write_rows(folder: Path, shards: int, rows: int, longest: int = 60, seed: int = 0) -> Path:
    """JSON lines with an id, a text of random length and a label, spread over `shards` files."""
    letters = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with (folder / f"rows-{shard}.jsonl").open("w") as file:
            for number in range(shard, rows, shards):
                text = "".join(letters.choices("abcdefgh ", k=letters.randint(5, longest)))
                file.write(json.dumps({"name": f"row {number}", "text": text, "label": number % 3}) + "\n")
    return folder


@pytest.fixture(scope="session")
def command_line() -> Iterator[CommandLine]:
    """A warm process that runs commands as `python -m flexbatch` would."""
    running = CommandLine()
    assert running.ready
    yield running
    running.close()
