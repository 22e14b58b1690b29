"""flexbatch as the engine of HELM (crfm-helm 0.5.16): all requests of a run in one batch.

    export FLEXBATCH_PYTHON=/path/to/the/environment/of/flexbatch/bin/python
    helm-run --runner-class-name flexbatch.integrations.helm.FlexbatchRunner --enable-local-huggingface-models FOLDER
        --run-entries synthetic_reasoning:mode=pattern_match,model=huggingface/NAME --suite S --max-eval-instances 100

HELM's pinned libraries do not fit beside those of the engine. So this module runs in HELM's environment with nothing
but the standard library and HELM, and the engine in its own: FLEXBATCH_PYTHON names that environment's interpreter.
Further options of flexbatch are in FLEXBATCH_OVERRIDES, as on the command line. Scenarios, adaptation, metrics and
files are HELM's. A run that was stopped goes on where it was, from the folder `flexbatch` beside the run's files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import ExecutionSpec, Executor, ExecutorError
from helm.benchmark.model_deployment_registry import get_model_deployment
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import Runner
from helm.clients.client import truncate_sequence
from helm.common.request import GeneratedOutput, Request, RequestResult, Token

MODEL_ARGUMENT = "pretrained_model_name_or_path"


class FlexbatchRunner(Runner):  # type: ignore[misc]  # HELM has no types here
    """HELM's runner with another executor."""

    def __init__(self, execution_spec: ExecutionSpec, *rest: Any, **named: Any) -> None:
        super().__init__(execution_spec, *rest, **named)
        self.executor = FlexbatchExecutor(execution_spec)

    def run_one(self, run_spec: RunSpec) -> None:
        self.executor.folder = Path(self._get_run_path(run_spec)) / "flexbatch"
        super().run_one(run_spec)


class FlexbatchExecutor(Executor):  # type: ignore[misc]
    """Hands all requests of a scenario to flexbatch at once. `folder` keeps what it has done."""

    folder = Path("flexbatch")

    def execute(self, scenario_state: ScenarioState) -> ScenarioState:
        """Fills in the results. ExecutorError where a request is not for a text model, or flexbatch fails."""
        states: list[RequestState] = scenario_state.request_states
        if self.execution_spec.dry_run or not states:
            return scenario_state
        started = time.time()
        lines = [prompt for state in states for prompt in to_prompts(state.request)]
        answers = iter(ask(lines, self.folder, *model_of(states[0].request)))
        seconds = (time.time() - started) / len(states)
        answered = [replace(state, result=to_result(state.request, answers, seconds, started)) for state in states]
        return replace(scenario_state, request_states=answered)


def model_of(request: Request) -> tuple[str, list[str]]:
    """What `model.path` is for HELM's deployment, and the options that follow from it."""
    arguments = get_model_deployment(request.model_deployment).client_spec.args or {}
    options = [f"model.revision={arguments['revision']}"] if arguments.get("revision") else []
    return str(arguments.get(MODEL_ARGUMENT, request.model)), options


def to_prompts(request: Request) -> list[dict[str, Any]]:
    """The worker's lines for a request, one for each completion."""
    if request.embedding or request.messages or request.multimodal_prompt:
        raise ExecutorError(f"flexbatch answers plain prompts only. Request: {request}")
    arguments = get_model_deployment(request.model_deployment).client_spec.args or {}
    return [
        {
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "stop": request.stop_sequences,
            "seed": seed_of(request, number),
            "echo": request.echo_prompt,
            "chat": arguments.get("apply_chat_template"),
        }
        for number in range(request.num_completions)
    ]


def seed_of(request: Request, number: int) -> int:
    """31 bits that follow from the prompt, HELM's `random` and the completion's number."""
    text = json.dumps([request.prompt, request.random, number])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def ask(prompts: Sequence[Mapping[str, Any]], folder: Path, model: str, options: Sequence[str]) -> list[dict[str, Any]]:
    """The worker's answers, in the order of the prompts. ExecutorError where it fails."""
    interpreter = os.environ.get("FLEXBATCH_PYTHON")
    if not interpreter:
        raise ExecutorError("Set FLEXBATCH_PYTHON to the Python interpreter of the environment that has flexbatch.")
    folder.mkdir(parents=True, exist_ok=True)
    asked, answered = folder / "prompts.jsonl", folder / "answers.jsonl"
    asked.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")
    answered.unlink(missing_ok=True)
    overrides = [*options, *shlex.split(os.environ.get("FLEXBATCH_OVERRIDES", ""))]
    worker = [interpreter, "-m", "flexbatch.integrations.worker", str(asked), str(answered), str(folder), model]
    done = subprocess.run([*worker, *overrides], check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ExecutorError(f"flexbatch ended with exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    answers = [json.loads(line) for line in answered.read_text(encoding="utf-8").splitlines()]
    if len(answers) != len(prompts):
        raise ExecutorError(f"flexbatch answered {len(answers)} of {len(prompts)} prompts: {answered}")
    return answers


def to_result(request: Request, answers: Iterator[Mapping[str, Any]], seconds: float, started: float) -> RequestResult:
    """HELM's record of a request. `seconds` is its share of the batch."""
    completions = [_completion(request, next(answers)) for _ in range(request.num_completions)]
    return RequestResult(
        success=True,
        embedding=[],
        completions=completions,
        cached=False,
        request_time=seconds,
        request_datetime=int(started),
    )


def _completion(request: Request, answer: Mapping[str, Any]) -> GeneratedOutput:
    """Cut at the first stop string by HELM's own rule."""
    tokens = [Token(text=text, logprob=logprob) for text, logprob in answer["tokens"]]
    output = GeneratedOutput(
        text=answer["text"],
        logprob=sum(token.logprob for token in tokens),
        tokens=tokens,
        finish_reason={"reason": answer["finish_reason"]},
    )
    return replace(truncate_sequence(output, request, print_warning=False), finish_reason=output.finish_reason)
