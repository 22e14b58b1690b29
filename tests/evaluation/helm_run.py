"""A finished run with invented completions, from which HELM's files are made.

`python -m tests.evaluation.helm_run FOLDER` writes them, for `golden/record_helm.py FOLDER` to score with HELM itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from typing import Any

from flexbatch.config import JobConfig
from flexbatch.evaluation import Evaluation, Limits, build_evaluation
from flexbatch.evaluation.helm_files import write_helm_files
from flexbatch.records import Prompt
from tests.evaluation.space_tokenizer import SpaceTokenizer

INVENTED = {"kind": "mmlu", "path": str(Path(__file__).parent / "golden" / "mmlu"), "subject": "invented"}
SIZES = {"train": 20, "valid": 12, "test": 15}
MATCHES = ["exact_match", "quasi_exact_match", "prefix_exact_match", "quasi_prefix_exact_match", "f1_score", "rouge_l"]
SCENARIOS: dict[str, Any] = {
    "induction": {
        "data": {"kind": "synthetic_reasoning", "mode": "induction", **SIZES},
        "adapter": {"max_tokens": 50, "num_outputs": 3, "temperature": 1.0, "stop_sequences": ["\n"]},
        "metrics": MATCHES,
    },
    "natural": {
        "data": {"kind": "synthetic_reasoning_natural", "difficulty": "easy", **SIZES},
        "adapter": {"max_tokens": 20, "stop_sequences": ["\n"]},
        "metrics": ["f1_set_match", "iou_set_match", "exact_set_match", "exact_match"],
    },
    "joint": {"data": INVENTED, "adapter": {"method": "multiple_choice_joint", "max_tokens": 1, "num_outputs": 5}},
    "original": {"data": INVENTED, "adapter": {"method": "multiple_choice_separate_original", "output_suffix": ""}},
    "calibrated": {"data": INVENTED, "adapter": {"method": "multiple_choice_separate_calibrated", "output_suffix": ""}},
}
TOKENIZER = SpaceTokenizer()


def helm_run() -> tuple[Evaluation, list[dict[str, Any]]]:
    """The evaluation and its output rows."""
    evaluation = build_evaluation(JobConfig(kind="helm_eval", trials=2, scenarios=SCENARIOS))
    return evaluation, [_row(prompt) for prompt in evaluation.prompts(TOKENIZER, Limits(4096))]


def _row(prompt: Prompt) -> dict[str, Any]:
    rng = Random(prompt.row.id)
    carried = prompt.carried
    text, ids = "", list(prompt.token_ids[-prompt.score_tokens :])
    if not prompt.score_tokens:
        right = carried["references"][carried["correct"].index(True)]
        choices = list("ABCDM") if carried["scenario"] == "joint" else [right, right + " more", "The cat is red."]
        text = rng.choice(choices)
        ids = TOKENIZER([text + " \n"], add_special_tokens=False)["input_ids"][0]
    return {
        **carried,
        "id": prompt.row.id,
        "shard": prompt.row.shard,
        "row": prompt.row.row,
        "prompt_tokens": len(prompt.token_ids),
        "completion": text,
        "completion_ids": ids,
        "finish_reason": "length" if prompt.score_tokens else "stop",
        "error": "",
        "logprobs": [-rng.random() for _ in ids],
    }


def write(folder: Path) -> list[Path]:
    evaluation, rows = helm_run()
    return write_helm_files(folder, evaluation.instance_scores(rows, TOKENIZER), TOKENIZER, "opt-tiny")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
