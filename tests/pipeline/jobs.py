"""What the tests say of a job: its overrides, and its output as rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml


def overrides(model: Path, dataset: Path, output: Path, **options: Any) -> list[str]:
    """The command line of a `generate` job; `options` are keys with `__` for the dot, and win."""
    values = {
        "job": "generate",
        "model": "hf",
        "model.path": model,
        "dataset.path": dataset,
        "output.dir": output,
        "offload.reader": "buffered",
    }
    values |= {name.replace("__", "."): value for name, value in options.items()}
    return [f"{name}={value}" for name, value in values.items() if value is not None]


def part_files(output: Path) -> list[Path]:
    return sorted((output / "data").glob("*")) if (output / "data").is_dir() else []


def output_rows(output: Path) -> list[dict[str, Any]]:
    """All rows in the order of their parts."""
    return [row for path in part_files(output) for row in pq.read_table(path).to_pylist()]


def scored_job(folder: Path, model: Path, scenarios: dict[str, Any]) -> list[str]:
    """The command line, from inside `folder`, of an evaluation of these scenarios; its file is written there."""
    job = {"job": {"name": "scored", "kind": "helm_eval", "scenarios": scenarios}}
    (folder / "conf" / "job").mkdir(parents=True)
    (folder / "conf" / "job" / "scored.yaml").write_text("# @package _global_\n" + yaml.safe_dump(job))
    return ["--config-dir=conf", "job=scored", "model=hf", f"model.path={model}", "prompt.max_tokens=200"]


def pattern_match(instances: int, **adapter: Any) -> dict[str, Any]:
    """A scenario that generates: HELM's patterns, one example, completions of a few tokens."""
    return {
        "data": {"kind": "synthetic_reasoning", "mode": "pattern_match", "seed": 42},
        "prompt_tokens": 200,
        "adapter": {"max_train_instances": 1, "max_eval_instances": instances, "max_tokens": 6, **adapter},
        "metrics": ["exact_match", "f1_score"],
    }
