"""Where the instances of a scenario come from: shards, files in the form that a benchmark is published in, or a seed.

Every loader is named by `data.kind` and takes the other keys of `data`; nothing is ever downloaded. A loader reads
local files fully: an evaluation set fits in memory, and shots are drawn from all of its training instances.
"""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from flexbatch.config import DatasetConfig
from flexbatch.data.reader import read_rows
from flexbatch.errors import ConfigError, DataError
from flexbatch.evaluation.instance import SPLITS, TEST, TRAIN, VALID, Instance, Reference
from flexbatch.evaluation.synthetic import (
    NATURAL_DIFFICULTIES,
    PATTERN_MODES,
    SplitSizes,
    synthetic_reasoning,
    synthetic_reasoning_natural,
)
from flexbatch.records import Row

Options = Mapping[str, Any]


def _from_shards(options: Options, where: str) -> list[Instance]:
    """Arrow, Parquet, JSONL, CSV: columns input, references, and, if there, correct, split and id."""
    names = {name: name for name in ("id", "split", "input", "references", "correct")}
    names |= options.get("columns") or {}
    dataset = DatasetConfig(path=options["path"], format=options.get("format", "auto"))
    instances = []
    for row in _shard_rows(dataset, where):
        place = f"{where}: row {row.row} of {row.shard}"
        fields = row.fields
        text = fields.get(names["input"])
        if not isinstance(text, str):
            raise DataError(
                f"{place} has no text in column '{names['input']}' but {text!r}",
                remedy=f"Columns there: {', '.join(fields)}. Name the right one in data.columns.input.",
            )
        references = _row_references(fields.get(names["references"]), fields.get(names["correct"]), place)
        split = str(fields.get(names["split"]) or options.get("split", TEST))
        instances.append(Instance(text, references, split, str(fields.get(names["id"]) or "")))
    return instances


def _shard_rows(dataset: DatasetConfig, where: str) -> Iterator[Row]:
    """The rows; what is wrong with them is said under the scenario's keys."""
    try:
        yield from read_rows(dataset)
    except DataError as error:
        message, remedy = (text.replace("dataset.", f"{where}.") for text in (error.message, error.remedy))
        raise DataError(message, remedy=remedy) from error


def _row_references(texts: Any, correct: Any, place: str) -> tuple[Reference, ...]:
    texts = [texts] if isinstance(texts, str) else list(texts or [])
    flags = [True] * len(texts) if correct is None else [bool(flag) for flag in correct]
    if len(flags) != len(texts):
        raise DataError(
            f"{place}: {len(texts)} references but {len(flags)} values in 'correct'",
            remedy="Give one true or false for each reference.",
        )
    return tuple(Reference(str(text), flag) for text, flag in zip(texts, flags, strict=True))


def _from_mmlu(options: Options, where: str) -> list[Instance]:
    """`PATH/{dev,val,test}/SUBJECT_{dev,val,test}.csv`; dev gives the shots. See `_mmlu_rows` for the columns."""
    subject, folder = options["subject"], Path(options["path"])
    instances: list[Instance] = []
    for part, split in (("auxiliary_train", TRAIN), ("dev", TRAIN), ("val", VALID), ("test", TEST)):
        file = folder / part / f"{subject}_{part}.csv"
        if file.exists():
            instances.extend(_mmlu_rows(file, split))
    if not instances:
        raise DataError(
            f"{where}: no file {folder}/test/{subject}_test.csv",
            remedy="data.path is the folder with dev/ and test/; data.subject is the file's name up to _test.csv.",
        )
    return instances


def _mmlu_rows(file: Path, split: str) -> Iterator[Instance]:
    """Question, choices, answer; the answer is a letter (no header line) or an index (with a header line).

    Cells stay text, so that a choice such as "0" or "1.50" is shown as it is written. As in HELM, a choice with the
    same text as the right one is right as well.
    """
    with file.open(newline="", encoding="utf-8") as lines:
        for number, cells in enumerate(csv.reader(lines), 1):
            if number == 1 and cells[-1:] == ["answer"]:
                continue
            if len(cells) < 4:
                raise DataError(f"{file}, record {number}: {len(cells)} cells", remedy="Question, choices, answer.")
            question, choices, answer = cells[0], cells[1:-1], cells[-1].strip()
            index = int(answer) if answer.isdigit() else string.ascii_uppercase.find(answer.upper() or "?")
            if not 0 <= index < len(choices):
                raise DataError(
                    f"{file}, record {number}: the answer is {answer!r} and there are {len(choices)} choices",
                    remedy="The last cell is a letter from A on, or an index from 0 on.",
                )
            references = tuple(Reference(choice, choice == choices[index]) for choice in choices)
            yield Instance(question, references, split)


def _from_wikifact(options: Options, where: str) -> list[Instance]:
    """`PATH/{train,dev,test}.jsonl` with `property` (such as P31), `template` and `result_names` (lists of names)."""
    wanted = options["property"]
    instances = []
    for file, split in (("train.jsonl", TRAIN), ("dev.jsonl", VALID), ("test.jsonl", TEST)):
        for record in _json_lines(Path(options["path"]) / file, ("property", "template", "result_names"), where):
            if record["property"] == wanted:
                groups = ([names] if isinstance(names, str) else names for names in record["result_names"])
                references = tuple(Reference(name.strip()) for group in groups for name in group)
                instances.append(Instance(record["template"], references, split))
    if not instances:
        raise DataError(
            f"{where}: no line has the property {wanted}", remedy="data.property is a Wikidata id, such as P31."
        )
    return instances


def _from_summarization(options: Options, where: str) -> list[Instance]:
    """`PATH/{train,validation,test}.jsonl` with `document` and `summary`, cut and filtered as HELM does for XSum."""
    shortest, longest = options.get("sampling_min_length") or 0, options.get("sampling_max_length") or float("inf")
    instances = []
    for file, split in (("train.jsonl", TRAIN), ("validation.jsonl", VALID), ("test.jsonl", TEST)):
        for record in _json_lines(Path(options["path"]) / file, ("document", "summary"), where):
            words = record["document"].split()[: options.get("doc_max_length")]
            summary = record["summary"].split()
            if split == TRAIN and not shortest <= len(words) <= longest:
                continue
            article = " ".join(words)
            if split == TRAIN and options.get("xsum_filter", True) and _poor_example(article, len(words), len(summary)):
                continue
            instances.append(Instance(article, (Reference(" ".join(summary)),), split))
    return instances


def _poor_example(article: str, words: int, summary_words: int) -> bool:
    """HELM keeps such pairs out of the shots: leftovers of the web page, and summaries too short or too long."""
    leftovers = ("Media playback is unsupported on your device", "Last updated at")
    return any(text in article for text in leftovers) or summary_words <= 10 or summary_words / max(1, words) > 0.2


def _json_lines(file: Path, keys: tuple[str, ...], where: str) -> Iterator[dict[str, Any]]:
    if not file.exists():
        raise DataError(
            f"{where}: {file} does not exist", remedy=f"The folder needs {file.name} with {', '.join(keys)}."
        )
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{file}, line {number}: not JSON ({error})", remedy="Write one JSON object in each line."
                ) from error
            missing = [key for key in keys if key not in record]
            if missing:
                raise DataError(f"{file}, line {number}: no {', '.join(missing)}", remedy=f"Needed: {', '.join(keys)}.")
            yield record


def _sizes(options: Options) -> SplitSizes:
    chosen = {key: int(options[key]) for key in SPLITS if options.get(key) is not None}
    return SplitSizes(**chosen)


def _from_pattern_seed(options: Options, where: str) -> list[Instance]:
    mode = _one_of(options["mode"], PATTERN_MODES, f"{where}.mode")
    return synthetic_reasoning(mode, int(options.get("seed", 42)), _sizes(options))


def _from_natural_seed(options: Options, where: str) -> list[Instance]:
    difficulty = _one_of(options["difficulty"], NATURAL_DIFFICULTIES, f"{where}.difficulty")
    return synthetic_reasoning_natural(difficulty, int(options.get("seed", 42)), _sizes(options))


def _one_of(value: Any, allowed: tuple[str, ...], key: str) -> str:
    if value not in allowed:
        raise ConfigError(f"{key} is {value!r}", remedy=f"Choose one of {', '.join(allowed)}.")
    return str(value)


def _from_texts(options: Options, where: str) -> list[Instance]:
    """One text file, or the `*.txt` of a folder: each a test instance without references."""
    path = Path(options["path"])
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    try:
        return [Instance(file.read_text(encoding="utf-8"), (), TEST, file.stem) for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}.path: cannot read {path} ({error})", remedy="Name a UTF-8 text file.") from error


Loader = Callable[[Options, str], list[Instance]]

# kind: loader, keys that it needs, keys that it takes besides
LOADERS: Final[dict[str, tuple[Loader, tuple[str, ...], tuple[str, ...]]]] = {
    "shards": (_from_shards, ("path",), ("format", "columns", "split")),
    "texts": (_from_texts, ("path",), ()),
    "mmlu": (_from_mmlu, ("path", "subject"), ()),
    "wikifact": (_from_wikifact, ("path", "property"), ()),
    "summarization": (
        _from_summarization,
        ("path",),
        ("sampling_min_length", "sampling_max_length", "doc_max_length", "xsum_filter"),
    ),
    "synthetic_reasoning": (_from_pattern_seed, ("mode",), ("seed", *SPLITS)),
    "synthetic_reasoning_natural": (_from_natural_seed, ("difficulty",), ("seed", *SPLITS)),
}
