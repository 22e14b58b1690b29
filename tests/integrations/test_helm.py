"""HELM runs on flexbatch. HELM lives in an environment of its own: FLEXBATCH_HELM_PYTHON names its interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
HELM_PYTHON = os.environ.get("FLEXBATCH_HELM_PYTHON", "")
RUNNER = ["--runner-class-name", "flexbatch.integrations.helm.FlexbatchRunner"]
FILES = ("run_spec.json", "scenario.json", "scenario_state.json", "stats.json", "per_instance_stats.json")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.realdata,
    pytest.mark.skipif(not HELM_PYTHON, reason="FLEXBATCH_HELM_PYTHON names no interpreter with crfm-helm"),
]


def helm_run(model: Path, folder: Path, suite: str, *options: str, python: str = sys.executable) -> Any:
    """Runs four instances of a scenario that needs no download."""
    arguments = [
        *("--enable-local-huggingface-models", str(model), "--suite", suite, "--output-path", str(folder)),
        *("--run-entries", f"synthetic_reasoning:mode=pattern_match,model=huggingface/{model.name}"),
        *(
            "--max-eval-instances",
            "4",
            "--num-train-trials",
            "1",
            "--disable-cache",
            "--local-path",
            str(folder / "env"),
        ),
    ]
    start = "import sys; from helm.benchmark.run import main; sys.exit(main())"
    own = {"FLEXBATCH_PYTHON": python, "FLEXBATCH_OVERRIDES": "offload.reader=buffered", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [HELM_PYTHON, "-c", start, *arguments, *options],
        cwd=folder,
        env={**os.environ, **own, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


def run_folder(folder: Path, suite: str) -> Path:
    (found,) = (folder / "runs" / suite).glob("synthetic_reasoning*")
    return found


def completions(folder: Path) -> list[dict[str, Any]]:
    states = json.loads((folder / "scenario_state.json").read_text())["request_states"]
    return [completion for state in states for completion in state["result"]["completions"]]


@pytest.mark.timeout(900)
def test_a_run_of_helm_has_the_files_and_the_texts_of_helms_own_client(realdata: Path, tmp_path: Path) -> None:
    model = realdata / "stories260k"
    ours = helm_run(model, tmp_path, "ours", *RUNNER)
    assert ours.returncode == 0, ours.stdout + ours.stderr
    theirs = helm_run(model, tmp_path, "theirs")
    assert theirs.returncode == 0, theirs.stdout + theirs.stderr
    folder = run_folder(tmp_path, "ours")
    assert all((folder / name).is_file() for name in FILES)
    made, expected = completions(folder), completions(run_folder(tmp_path, "theirs"))
    assert [completion["text"] for completion in made] == [completion["text"] for completion in expected]
    for completion in made:
        assert completion["finish_reason"]["reason"] in ("stop", "length", "endoftext")
        assert completion["logprob"] == pytest.approx(sum(token["logprob"] for token in completion["tokens"]))


@pytest.mark.timeout(900)
def test_what_flexbatch_says_is_wrong_is_said_by_helm(realdata: Path, tmp_path: Path) -> None:
    failed = helm_run(realdata / "stories260k", tmp_path, "ours", *RUNNER, python="/bin/false")
    assert failed.returncode != 0
    assert "flexbatch ended with exit code 1" in failed.stdout + failed.stderr
