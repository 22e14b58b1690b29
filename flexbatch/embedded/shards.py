"""The sample data of the ready-made jobs: `python -m flexbatch.embedded.shards --output jobs` writes it anew.

Pure functions make the tables; the same seed makes the same rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from random import Random

import pyarrow as pa

from flexbatch.embedded.instances import Instance, draw, record_extraction, summary
from flexbatch.embedded.tasks import EVALUATED, TASKS, Task, evaluation_examples

SEED = 11
TRAIN_ROWS, EVALUATION_ROWS = 40, 80

SCENARIO = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("input", pa.string()),
        ("references", pa.list_(pa.string())),
        ("correct", pa.list_(pa.bool_())),
    ]
)
RECORDS = pa.schema([(name, pa.string()) for name in ("id", "document", "name", "city", "item", "date", "total")])
ARTICLES = pa.schema([(name, pa.string()) for name in ("id", "article", "reference")])
TEXTS = pa.schema([(name, pa.string()) for name in ("id", "text")])


def scenario_table(task: Task) -> pa.Table:
    """A scenario's instances: `train` is the pool of the shots, `test` is held out from the model's training."""
    rng = Random(f"shards-{task.name}-{SEED}")
    rows = []
    for split, count in (("train", TRAIN_ROWS), ("test", EVALUATION_ROWS)):
        for number, instance in enumerate(_distinct(task, rng, count, evaluation=split == "test")):
            rows.append(
                {
                    "id": f"{task.name}-{split}-{number:03d}",
                    "split": split,
                    "input": instance.input,
                    "references": list(instance.references),
                    "correct": [place == instance.correct for place in range(len(instance.references))],
                }
            )
    return pa.Table.from_pylist(rows, schema=SCENARIO)


def _distinct(task: Task, rng: Random, count: int, *, evaluation: bool) -> list[Instance]:
    found: dict[Instance, None] = {}
    while len(found) < count:
        found.setdefault(draw(task.generator, rng, evaluation=evaluation))
    return list(found)


def records_table(part: int, count: int) -> pa.Table:
    """Order notices with their gold fields, held out from the model's training."""
    rng = Random(f"shards-records-{SEED}-{part}")
    made = [draw(record_extraction, rng, evaluation=True) for _ in range(count)]
    rows = [{"id": f"order-{part}-{n:03d}", "document": m.input, **json.loads(m.answer)} for n, m in enumerate(made)]
    return pa.Table.from_pylist(rows, schema=RECORDS)


def articles_table(count: int) -> pa.Table:
    """News items whose reference summary is their first sentence."""
    rng = Random(f"shards-articles-{SEED}")
    made = [draw(summary, rng, evaluation=True) for _ in range(count)]
    rows = [{"id": f"article-{n:03d}", "article": m.input, "reference": m.answer} for n, m in enumerate(made)]
    return pa.Table.from_pylist(rows, schema=ARTICLES)


def texts_table(part: int, count: int) -> pa.Table:
    """Whole prompts that ask for a text to be repeated."""
    examples = evaluation_examples(TASKS["copying"], count, 0, SEED + part)
    rows = [{"id": f"text-{part}-{n:03d}", "text": example.prompt} for n, example in enumerate(examples)]
    return pa.Table.from_pylist(rows, schema=TEXTS)


def tables() -> Mapping[str, pa.Table]:
    """Every sample shard by its path below the jobs folder."""
    made = {f"helm_eval/data/{name}.arrow": scenario_table(TASKS[name]) for name in EVALUATED}
    made |= {f"extract/data/orders-{part}.arrow": records_table(part, 100) for part in range(2)}
    made |= {"summarize/data/articles.arrow": articles_table(120)}
    made |= {f"generate/data/texts-{part}.arrow": texts_table(part, 100) for part in range(2)}
    return made


def write(folder: Path) -> None:
    """Writes the shards as Arrow IPC files."""
    for name, table in tables().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=64)


def main() -> None:
    """Writes all shards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("jobs"), help="the folder of the jobs")
    write(parser.parse_args().output)


if __name__ == "__main__":
    main()
