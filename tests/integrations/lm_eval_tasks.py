"""Small tasks of lm-eval over local files: one of each kind of request."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml

STORIES = (
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park with her dog.",
    "Tom had a big red ball. He threw it high, and it fell into the tree. His mom helped him to get it back.",
    "One day a cat saw a bird. The bird said, hello cat! They were friends and went home to eat cake together.",
    "It was very cold. The boy wore his hat. He made a snowman and gave it a carrot for a nose.",
)
LETTERS = "ABCD"


def write_tasks(folder: Path, *, long_text: int = 0) -> list[str]:
    """Four tasks in `folder`; their names. `long_text` repeats the stories of the perplexity task."""
    words = [story.split() for story in STORIES]
    questions = [
        {
            "question": " ".join(word[:count]),
            "choices": [word[count], "tree", word[count] + " " + word[count + 1], "the end."],
            "label": number % 4,
        }
        for number, word in enumerate(words)
        for count in (4, 7, 9)
    ]
    prompts = [{"prompt": " ".join(word[:count]), "answer": word[count]} for word in words for count in (3, 8)]
    texts = [{"text": " ".join([story] * max(1, long_text))} for story in STORIES]
    letter = {"doc_to_choice": list(LETTERS), "doc_to_text": "{{question}} \nAnswer: ", "target_delimiter": " "}
    write_task(folder, "choices", questions, output_type="multiple_choice", doc_to_text="{{question}}",
               doc_to_target="label", doc_to_choice="choices", metric_list=metrics("acc", "acc_norm"))  # fmt: skip
    write_task(folder, "letters", questions, output_type="multiple_choice", doc_to_target="label", num_fewshot=2,
               fewshot_split="test", metric_list=metrics("acc"), **letter)  # fmt: skip
    write_task(folder, "generation", prompts, output_type="generate_until", doc_to_text="{{prompt}}",
               doc_to_target="answer", generation_kwargs={"until": [".", "\n"], "max_gen_toks": 12},
               metric_list=metrics("exact_match"))  # fmt: skip
    write_task(folder, "perplexity", texts, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text",
               metric_list=metrics("word_perplexity", "bits_per_byte"))  # fmt: skip
    return [f"local_{name}" for name in ("choices", "letters", "generation", "perplexity")]


def write_mmlu(folder: Path, realdata: Path, subject: str, rows: int | None = None, shots: int = 5) -> str:
    """A four-choice task of one MMLU subject (its first `rows`), with shots of its dev split; its name."""
    (source,) = (realdata / "mmlu" / "test").glob(f"{subject}*.csv")
    (examples,) = (realdata / "mmlu" / "dev").glob(f"{subject}*.csv")
    write_task(
        folder,
        f"mmlu_{subject}",
        _questions(source)[:rows],
        shots=_questions(examples),
        output_type="multiple_choice",
        doc_to_text="{{question}}\nA. {{a}}\nB. {{b}}\nC. {{c}}\nD. {{d}}\nAnswer:",
        doc_to_target="label",
        doc_to_choice=list(LETTERS),
        num_fewshot=shots,
        fewshot_split="shots",
        metric_list=metrics("acc"),
    )
    return f"local_mmlu_{subject}"


def write_task(
    folder: Path, name: str, rows: list[dict[str, Any]], shots: list[dict[str, Any]] | None = None, **settings: Any
) -> None:
    files = {"test": write_rows(folder / f"{name}.jsonl", rows)}
    if shots:
        files["shots"] = write_rows(folder / f"{name}-shots.jsonl", shots)
    task = {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def metrics(*names: str) -> list[dict[str, str]]:
    return [{"metric": name} for name in names]


def _questions(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {"question": row["question"], "label": int(row["answer"])}
            | {letter.lower(): row[f"choice{number}"] for number, letter in enumerate(LETTERS)}
            for row in csv.DictReader(file)
        ]
