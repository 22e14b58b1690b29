"""Rows, prompts and parts for the tests of what is written, and processes that can be killed."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from flexbatch.data.batcher import split_parts
from flexbatch.data.parts import PartAssembler
from flexbatch.records import Completion, Part, PassResult, Prompt, Row


def prompt(number: int, **carried: object) -> Prompt:
    return Prompt(Row(f"s:{number}", "s", number, carried), (1,) * (number % 5 + 1), carried=carried)


def completion(index: int) -> Completion:
    return Completion(index, (index, index + 1), f"text {index}", "stop", (-0.5, -0.25))


def parts(rows: int, part_rows: int) -> list[Part]:
    assembler = PartAssembler(part_rows)
    found = []
    for place in split_parts(map(prompt, range(rows)), part_rows):
        assembler.expect(place)
        part = assembler.complete(completion(place.index))
        found += [part] if part else []
    return found + list(assembler.close())


def pass_result(tokens: dict[int, tuple[int, ...]], *finished: Completion, logprobs: bool = False) -> PassResult:
    scores = {index: (-1.5,) * len(ids) for index, ids in tokens.items()} if logprobs else {}
    return PassResult(tuple(finished), tokens, scores, 0.1, len(tokens), 0, len(tokens))


def start_python(
    program: str, *arguments: str, extra: dict[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """A process of its own that runs a program text; it finds the package and this folder. `extra` is environment."""
    tests = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(tests.parent), str(tests)])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path} | (extra or {}),
        **options,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    return output
