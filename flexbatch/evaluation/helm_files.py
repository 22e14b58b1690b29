"""HELM's own files of a run, for its summariser and its web page: `helm-summarize --suite flexbatch -o FOLDER/helm`.

    FOLDER/helm/runs/flexbatch/RUN/run_spec.json            what was run
                                   scenario.json            name and description
                                   scenario_state.json      every request with its result
                                   stats.json               statistics of the run
                                   per_instance_stats.json  statistics of each trial and instance

The layout is HELM 0.5.16's. Made from the output's rows, like the scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from flexbatch.data.durable import write_file
from flexbatch.evaluation.adapter import GENERATION, JOINT, LANGUAGE_MODELING, AdapterSpec, letter_answers
from flexbatch.evaluation.answers import Answer
from flexbatch.evaluation.fitting import Tokenizer
from flexbatch.evaluation.helm_statistics import as_json, instance_statistics, run_statistics
from flexbatch.evaluation.scenarios import Scenario
from flexbatch.evaluation.scoring import InstanceScore

SUITE: Final = "flexbatch"
_SCENARIOS: Final = "helm.benchmark.scenarios"
_METRICS: Final = "helm.benchmark.metrics.basic_metrics"

Described = tuple[str, dict[str, Any], list[str]]  # class of HELM, its arguments, groups

# HELM's name for the scenario that a kind of data stands for, so that its schema finds the run.
_KINDS: Final[dict[str, Callable[[Mapping[str, Any]], Described]]] = {
    "synthetic_reasoning": lambda data: (
        f"{_SCENARIOS}.synthetic_reasoning_scenario.SyntheticReasoningScenario",
        {"mode": data["mode"]},
        ["synthetic_reasoning", f"synthetic_reasoning_{data['mode']}"],
    ),
    "synthetic_reasoning_natural": lambda data: (
        f"{_SCENARIOS}.synthetic_reasoning_natural_scenario.SRNScenario",
        {"difficulty": data["difficulty"]},
        ["synthetic_reasoning", "synthetic_reasoning_natural"],
    ),
    "mmlu": lambda data: (f"{_SCENARIOS}.mmlu_scenario.MMLUScenario", {"subject": data["subject"]}, ["mmlu"]),
    "wikifact": lambda _: (f"{_SCENARIOS}.wikifact_scenario.WIKIFactScenario", {}, ["wikifact"]),
    "summarization": lambda _: (
        f"{_SCENARIOS}.summarization_scenario.SummarizationScenario",
        {"dataset_name": "xsum"},
        ["summarization_xsum"],
    ),
}


def write_helm_files(
    folder: Path, scored: Sequence[tuple[Scenario, Sequence[InstanceScore]]], tokenizer: Tokenizer, model: str
) -> list[Path]:
    """Writes the files of every scenario below `folder/helm`; `scored` is what `Evaluation.instance_scores` gave.

    Returns the runs' folders. CapacityError or OutputError where they cannot be written.
    """
    written = []
    for scenario, scores in scored:
        run = folder / "helm" / "runs" / SUITE / f"{scenario.run_name},model={model}".replace("/", "_")
        for name, content in run_files(scenario, scores, tokenizer, f"{SUITE}/{model}").items():
            text = json.dumps(content, indent=1, allow_nan=False)
            write_file(run / name, text.encode(), folder / "_tmp")
        written.append(run)
    return written


def run_files(scenario: Scenario, scores: Sequence[InstanceScore], tokenizer: Tokenizer, model: str) -> dict[str, Any]:
    """Content by file name. `model` is HELM's name for it, with an organisation before a slash."""
    spec = _adapter_spec(scenario.spec, model)
    kind, arguments, groups = _described(scenario)
    return {
        "run_spec.json": {
            "name": f"{scenario.run_name},model={model.partition('/')[2]}".replace("/", "_"),
            "scenario_spec": {"class_name": kind, "args": arguments},
            "adapter_spec": spec,
            "metric_specs": _metric_specs(scenario),
            "data_augmenter_spec": {},
            "groups": groups,
        },
        "scenario.json": {"name": scenario.name, "description": scenario.run_name, "tags": groups},
        "scenario_state.json": {
            "adapter_spec": spec,
            "request_states": [
                state for score in scores for state in _request_states(scenario, score, tokenizer, model)
            ],
        },
        "stats.json": as_json(run_statistics(scenario, scores)),
        "per_instance_stats.json": [
            {
                "instance_id": score.instance,
                "train_trial_index": score.trial,
                "stats": as_json(instance_statistics(scenario, score)),
            }
            for score in scores
        ],
    }


def _described(scenario: Scenario) -> Described:
    data = scenario.data or {}
    known = _KINDS.get(str(data.get("kind")))
    if known is not None:
        return known(data)
    return f"flexbatch.{data.get('kind', 'shards')}", {"path": str(data.get("path"))}, [scenario.name]


def _adapter_spec(spec: AdapterSpec, model: str) -> dict[str, Any]:
    values = {item.name: getattr(spec, item.name) for item in fields(spec)}
    values["substitutions"] = [{"source": source, "target": target} for source, target in spec.substitutions]
    optional = ("reference_prefix_characters", "output_mapping_pattern", "max_eval_instances")
    kept = {key: value for key, value in values.items() if key not in optional or value}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()} | {
        "model": model,
        "model_deployment": model,
        "num_trials": 1,
    }


def _metric_specs(scenario: Scenario) -> list[dict[str, Any]]:
    if scenario.spec.method == LANGUAGE_MODELING:
        kind = "helm.benchmark.metrics.language_modeling_metrics.LanguageModelingMetric"
        return [{"class_name": kind, "args": {"names": []}}]
    names = list(dict.fromkeys(name.partition("@")[0] for name in scenario.metrics))
    return [
        {"class_name": f"{_METRICS}.BasicGenerationMetric", "args": {"names": names}},
        {"class_name": f"{_METRICS}.BasicReferenceMetric", "args": {}},
        {"class_name": f"{_METRICS}.InstancesPerSplitMetric", "args": {}},
    ]


def _request_states(scenario: Scenario, score: InstanceScore, tokenizer: Tokenizer, model: str) -> list[dict[str, Any]]:
    """One for each prompt: completions of the same prompt belong to one request."""
    spec = scenario.spec
    if spec.generates:
        by_number = sorted(score.answers, key=lambda answer: answer.completion_index)
        return [_request_state(spec, by_number, tokenizer, model)]
    return [_request_state(spec, [answer], tokenizer, model) for answer in score.answers]


def _request_state(spec: AdapterSpec, answers: Sequence[Answer], tokenizer: Tokenizer, model: str) -> dict[str, Any]:
    first = answers[0]
    state: dict[str, Any] = {
        "instance": {
            "input": {"text": first.input},
            "references": [
                {"output": {"text": text}, "tags": ["correct"] if correct else []}
                for text, correct in zip(first.references, first.correct, strict=True)
            ],
            "split": first.split,
            "id": first.instance,
        },
        "train_trial_index": first.trial,
        "request": _request(spec, first.prompt, model),
        "result": {
            "success": not any(answer.error for answer in answers),
            "embedding": [],
            "completions": [_completion(spec, answer, tokenizer) for answer in answers],
            "cached": False,
        },
        "num_train_instances": first.shots,
        "prompt_truncated": first.truncated,
        "num_conditioning_tokens": 0,  # tokens that are not scored are not listed
    }
    if spec.scores_references:
        state |= {"reference_index": first.reference_index, "request_mode": first.mode}
    if spec.method == JOINT:
        state["output_mapping"] = letter_answers(spec, first.references)
    if first.error:
        state["result"]["error"] = first.error
    return state


def _request(spec: AdapterSpec, prompt: str, model: str) -> dict[str, Any]:
    scored = not spec.generates
    return {
        "model_deployment": model,
        "model": model,
        "embedding": False,
        "prompt": prompt,
        "temperature": 0.0 if scored else spec.temperature,
        "num_completions": spec.completions,
        "top_k_per_token": spec.num_outputs if spec.method == JOINT else 1,
        "max_tokens": 0 if scored else spec.max_tokens,
        "stop_sequences": list(spec.stop_sequences) if spec.method == GENERATION else [],
        "echo_prompt": scored,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    }


def _completion(spec: AdapterSpec, answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    """Scored requests echo their prompt, as HELM asks for; of its tokens only the reference's are listed."""
    return {
        "text": answer.text if spec.generates else answer.prompt,
        "logprob": sum(answer.logprobs),
        "tokens": [
            {"text": tokenizer.decode([token], skip_special_tokens=False), "logprob": logprob}
            for token, logprob in zip(answer.token_ids, answer.logprobs, strict=True)
        ],
        "finish_reason": {"reason": answer.finish},
    }
