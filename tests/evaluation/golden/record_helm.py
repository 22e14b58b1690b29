"""Records what HELM itself computes. Run once, in an environment of its own, from the repository's root:

    python -m venv /tmp/helm && /tmp/helm/bin/pip install crfm-helm==0.5.16
    python -m tests.evaluation.helm_run /tmp/run
    /tmp/helm/bin/python tests/evaluation/golden/record_helm.py /tmp/run

It writes `text_metrics.json`, `calibration.json`, `prompts.json` and `statistics.json` beside itself. Needs no network
once HELM is installed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import calibration as uncertainty_calibration
import numpy as np
from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.adaptation.adapters.generation_adapter import GenerationAdapter
from helm.benchmark.adaptation.adapters.multiple_choice_calibrated_adapter import MultipleChoiceCalibratedAdapter
from helm.benchmark.adaptation.adapters.multiple_choice_joint_adapter import MultipleChoiceJointAdapter
from helm.benchmark.adaptation.adapters.multiple_choice_separate_adapter import MultipleChoiceSeparateAdapter
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.metrics import evaluate_reference_metrics as helm_metrics
from helm.benchmark.metrics.metric import create_metric
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.run_specs.classic_run_specs import (
    get_synthetic_reasoning_natural_spec,
    get_synthetic_reasoning_spec,
)
from helm.benchmark.run_specs.lite_run_specs import get_mmlu_spec
from helm.benchmark.runner import downsample_eval_instances
from helm.benchmark.scenarios.mmlu_scenario import MMLUScenario
from helm.benchmark.scenarios.scenario import EVAL_SPLITS, Instance, create_scenario, with_instance_ids
from helm.benchmark.window_services.window_service_factory import WindowServiceFactory
from helm.common.codec import from_json

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from pairs import pairs  # noqa: E402

NAMES = [
    "exact_match",
    "quasi_exact_match",
    "quasi_leave_articles_exact_match",
    "prefix_exact_match",
    "quasi_prefix_exact_match",
    "exact_match_indicator",
    "final_number_exact_match",
    "f1_score",
    "exact_set_match",
    "iou_set_match",
    "f1_set_match",
]
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
INSTANCES, TRIALS = 100, 3


def write(name: str, content: Any) -> None:
    packages = ("crfm-helm", "rouge-score", "nltk", "uncertainty-calibration", "numpy", "scikit-learn")
    versions = {package: version(package) for package in packages} | {"python": sys.version.split()[0]}
    (HERE / name).write_text(json.dumps({"versions": versions, **content}, separators=(",", ":")) + "\n")


def text_metrics() -> dict[str, Any]:
    functions = {name: getattr(helm_metrics, name) for name in NAMES}
    functions |= {name: helm_metrics.get_rouge_function(kind) for name, kind in ROUGE.items()}
    made = pairs()
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    return {"pairs": digest, "values": {name: [float(f(*pair)) for pair in made] for name, f in functions.items()}}


def calibration_cases() -> dict[str, Any]:
    rng = Random(3)
    cases = []
    for count in (1, 3, 12, 60, 300):
        for rounding in (None, 1):
            confidence = [min(1.0, rng.expovariate(1.5) / 2) for _ in range(count)]
            confidence = confidence if rounding is None else [round(value, rounding) for value in confidence]
            correct = [int(rng.random() < value) for value in confidence]
            cases.append({"confidence": confidence, "correct": correct, "values": _calibration(confidence, correct)})
    return {"cases": cases}


def _calibration(confidence: list[float], correct: list[int]) -> dict[str, float]:
    """As `compute_calibration_metrics` of HELM's basic_metrics calls the library."""
    area, top = uncertainty_calibration.get_selective_stats(confidence, correct)
    values = {
        "ece_10_bin": uncertainty_calibration.get_ece_em(confidence, correct, num_bins=10),
        "ece_1_bin": uncertainty_calibration.get_ece(confidence, correct, num_bins=1),
        "selective_cov_acc_area": area,
        "selective_acc@10": top,
        "platt_ece_10_bin": 0.0,
        "platt_ece_1_bin": 0.0,
    }
    if 0 < sum(correct) < len(correct):
        scaler, fit = uncertainty_calibration.get_platt_scaler(np.array(confidence), np.array(correct), get_clf=True)
        scaled = scaler(np.array(confidence))
        values |= {"platt_coef": fit.coef_[0][0], "platt_intercept": fit.intercept_[0]}
        values["platt_ece_10_bin"] = uncertainty_calibration.get_ece_em(scaled, correct, num_bins=10)
        values["platt_ece_1_bin"] = uncertainty_calibration.get_ece(scaled, correct, num_bins=1)
    return {name: float(value) for name, value in values.items()}


class WordWindow:
    """Stands in for HELM's window service: a token is a piece of text up to and with a space."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def fits_within_context_window(self, text: str, expected_completion_token_length: int = 0) -> bool:
        return len(text.split(" ")) + expected_completion_token_length <= self.limit

    def truncate_from_right(self, text: str, expected_completion_token_length: int = 0) -> str:
        return " ".join(text.split(" ")[: self.limit - expected_completion_token_length])


MODES = ("pattern_match", "variable_substitution", "induction")
LEVELS = ("easy", "hard")
TIGHT = {"synthetic_reasoning_pattern_match": 120, "synthetic_reasoning_natural_easy": 75}
ADAPTERS = {
    "generation": GenerationAdapter,
    "multiple_choice_joint": MultipleChoiceJointAdapter,
    "multiple_choice_separate_original": MultipleChoiceSeparateAdapter,
    "multiple_choice_separate_calibrated": MultipleChoiceCalibratedAdapter,
}


def prompts() -> dict[str, Any]:
    """What HELM's own scenario, sampling and adapter make: a digest of every prompt, and one in full."""
    specs = {f"synthetic_reasoning_{mode}": get_synthetic_reasoning_spec(mode) for mode in MODES}
    specs |= {f"synthetic_reasoning_natural_{level}": get_synthetic_reasoning_natural_spec(level) for level in LEVELS}
    made = {}
    for name, run_spec in specs.items():
        instances = create_scenario(run_spec.scenario_spec).get_instances("")
        for limit in (2048, TIGHT[name]) if name in TIGHT else (2048,):
            made[f"{name}/{limit}"] = adapted(run_spec.adapter_spec, instances, limit)
    questions = MMLUScenario("invented")
    instances = [
        *questions.process_csv(str(HERE / "mmlu/dev/invented_dev.csv"), "train"),
        *questions.process_csv(str(HERE / "mmlu/test/invented_test.csv"), "test"),
    ]
    for limit in (2048, 60):
        made[f"joint/{limit}"] = adapted(get_mmlu_spec("invented").adapter_spec, instances, limit)
    for method in ("multiple_choice_separate_original", "multiple_choice_separate_calibrated"):
        spec = AdapterSpec(
            method=method,
            input_prefix="Q: ",
            output_prefix="A: ",
            output_suffix="",
            max_train_instances=2,
            max_tokens=0,
        )
        made[f"{method}/2048"] = adapted(spec, instances, 2048)
    return {"scenarios": made}


def adapted(spec: AdapterSpec, instances: list[Instance], limit: int) -> dict[str, Any]:
    spec = replace(spec, max_eval_instances=INSTANCES, num_train_trials=TRIALS)
    instances = downsample_eval_instances(with_instance_ids(instances), INSTANCES, EVAL_SPLITS)
    adapter_class = ADAPTERS[spec.method]
    adapter = adapter_class.__new__(adapter_class)
    adapter.adapter_spec, adapter.window_service = spec, WordWindow(limit)
    states = adapter.adapt(instances, parallelism=1)
    return {
        "limit": limit,
        "first": states[0].request.prompt,
        "ids": hashlib.sha256(" ".join(state.instance.id for state in states).encode()).hexdigest(),
        "shots": "".join(str(state.num_train_instances) for state in states),
        "truncated": "".join(str(int(state.prompt_truncated)) for state in states),
        "digests": "".join(hashlib.sha256(state.request.prompt.encode()).hexdigest()[:12] for state in states),
    }


class SpaceWindow:
    def tokenize(self, text: str) -> list[str]:
        return text.strip().split(" ")

    def get_num_tokens(self, text: str) -> int:
        return len(text.split(" "))


def statistics(folder: Path) -> dict[str, Any]:
    """What HELM's metrics make of the scenario states that flexbatch wrote."""
    WindowServiceFactory.get_window_service = staticmethod(lambda *_: SpaceWindow())
    return {"runs": {run.name: _statistics(run) for run in sorted((folder / "helm/runs/flexbatch").iterdir())}}


def _statistics(run: Path) -> list[list[Any]]:
    spec = from_json((run / "run_spec.json").read_text(), RunSpec)
    state = from_json((run / "scenario_state.json").read_text(), ScenarioState)
    first: dict[str, Instance] = {}  # HELM tells instances apart by identity, which a file does not keep
    states = [
        replace(item, instance=first.setdefault(item.instance.id, item.instance)) for item in state.request_states
    ]
    state = ScenarioState(state.adapter_spec, states)
    made = [create_metric(metric).evaluate(state, None, "", 1) for metric in spec.metric_specs]
    stats = [stat for result in made for stat in result.aggregated_stats if stat.count]
    return [
        [s.name.name, s.name.split, s.name.perturbation.name if s.name.perturbation else "", s.count, s.mean]
        for s in stats
    ]


if __name__ == "__main__":
    write("text_metrics.json", text_metrics())
    write("calibration.json", calibration_cases())
    write("prompts.json", prompts())
    write("statistics.json", statistics(Path(sys.argv[1])))
