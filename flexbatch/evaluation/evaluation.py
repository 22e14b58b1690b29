"""The evaluation of a job: its prompts before generation, its scores after it.

`build_evaluation` loads every scenario and every metric and raises what is wrong, so that nothing can fail on account
of a setting once tokens are being generated. Both directions are pure: the prompts follow from configuration, data and
tokenizer, and the scores from the rows of the output alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from flexbatch.config import JobConfig
from flexbatch.errors import ConfigError, DataError
from flexbatch.evaluation.adapter import GENERATION, LANGUAGE_MODELING, Query, draft, draw_shots, queries, shot_texts
from flexbatch.evaluation.fitting import Fitted, Limits, Tokenizer, encode, fit_all, shared_prefix
from flexbatch.evaluation.metrics import TEXT_METRICS, TextMetric, load_metric
from flexbatch.evaluation.scenarios import Scenario, load_scenario, plain
from flexbatch.evaluation.scoring import InstanceScore, score_scenario
from flexbatch.evaluation.summary import Scores, summarize
from flexbatch.evaluation.windows import windows
from flexbatch.records import Prompt, Row, Sampling

# What an evaluation adds to every output row; the types are those of `data.columns`.
COLUMNS: Final[dict[str, str]] = {
    "scenario": "string",
    "trial": "int32",
    "instance": "string",
    "split": "string",
    "input": "string",
    "references": "list<string>",
    "correct": "list<bool>",
    "reference_index": "int32",  # which reference this row scores; -1: the row generates
    "request_mode": "string",  # original or calibration, where references are scored
    "completion_index": "int32",  # which of the completions of one prompt, or of the windows of one text
    "shots": "int32",  # examples in the prompt after fitting
    "truncated": "bool",  # the prompt was cut after all shots were dropped
    "prompt": "string",
}


@dataclass(frozen=True)
class Evaluation:
    """Scenarios ready to run. `seed` is the job's; each row derives its own from it and from its id."""

    scenarios: tuple[Scenario, ...]
    metrics: Mapping[str, TextMetric]
    seed: int = 0
    special_tokens: bool = True

    @property
    def digest(self) -> str:
        """A hash of all instances and settings, for the run's fingerprint."""
        state = [asdict(scenario) for scenario in self.scenarios]
        text = json.dumps([state, self.seed, self.special_tokens], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def count(self) -> int | None:
        """How many prompts there will be, without making them; None where windows of texts must be counted first."""
        counts = [_count(scenario) for scenario in self.scenarios]
        return None if None in counts else sum(filter(None, counts))

    def prompts(self, tokenizer: Tokenizer, limits: Limits) -> Iterator[Prompt]:
        """All prompts: scenario by scenario, trial by trial, so that those which share their shots are neighbours."""
        for scenario in self.scenarios:
            for place, prompt in enumerate(self._scenario_prompts(scenario, tokenizer, limits)):
                yield _placed(prompt, scenario.name, place)

    def _scenario_prompts(self, scenario: Scenario, tokenizer: Tokenizer, limits: Limits) -> Iterator[_Draftling]:
        room = prompt_room(scenario, limits, special_count(tokenizer, self.special_tokens))
        if scenario.spec.method == LANGUAGE_MODELING:
            yield from self._windows(scenario, tokenizer, room)
            return
        for trial in range(scenario.spec.num_train_trials):
            shots = shot_texts(scenario.spec, draw_shots(scenario.spec, scenario.train, trial))
            asked = [query for instance in scenario.evaluated for query in queries(scenario.spec, instance)]
            drafts = (draft(scenario.spec, shots, query) for query in asked)
            fitted = fit_all(tokenizer, drafts, room, self.special_tokens)
            for query, prompt in zip(asked, fitted, strict=True):
                scored = _scored_tokens(scenario, tokenizer, query, prompt, self.special_tokens)
                for number in range(scenario.spec.completions):
                    yield _Draftling(scenario, trial, query, number, prompt, scored, self.seed)

    def _windows(self, scenario: Scenario, tokenizer: Tokenizer, room: int) -> Iterator[_Draftling]:
        """Texts have no shots; the windows of one text are numbered like completions of one prompt."""
        prefix = special_prefix(tokenizer) if self.special_tokens else ()
        for instance in scenario.evaluated:
            tokens = encode(tokenizer, [instance.input], special_tokens=False)[0]
            for number, (token_ids, scored) in enumerate(windows(prefix, tokens, room)):
                fitted = Fitted(tokenizer.decode(token_ids, skip_special_tokens=False), token_ids, 0)
                yield _Draftling(scenario, 0, Query(instance), number, fitted, scored, self.seed)

    def score(self, rows: Iterable[Mapping[str, Any]], tokenizer: Tokenizer) -> Scores:
        """Scores from the finished output rows (a mapping of column to value each), in any order."""
        return summarize(self.instance_scores(rows, tokenizer))

    def instance_scores(
        self, rows: Iterable[Mapping[str, Any]], tokenizer: Tokenizer
    ) -> list[tuple[Scenario, list[InstanceScore]]]:
        """What `score` averages: for each scenario, the statistics of each trial and instance."""
        return [
            (scenario, score_scenario(scenario, selected, self.metrics, tokenizer))
            for scenario, selected in self._by_scenario(rows)
        ]

    def _by_scenario(self, rows: Iterable[Mapping[str, Any]]) -> list[tuple[Scenario, list[Mapping[str, Any]]]]:
        sorted_rows: dict[str, list[Mapping[str, Any]]] = {scenario.name: [] for scenario in self.scenarios}
        for row in rows:
            if row["scenario"] not in sorted_rows:
                raise DataError(
                    f"the output has rows of the scenario {row['scenario']!r}, which the job does not have",
                    remedy="Score a folder with the configuration that it was made with.",
                )
            sorted_rows[row["scenario"]].append(row)
        for selected in sorted_rows.values():
            selected.sort(key=lambda row: int(row["row"]))
        return [(scenario, sorted_rows[scenario.name]) for scenario in self.scenarios]


@dataclass(frozen=True, slots=True)
class _Draftling:
    """Everything that one output row will need, before it has its place."""

    scenario: Scenario
    trial: int
    query: Query
    completion: int
    fitted: Fitted
    score_tokens: int
    seed: int


def build_evaluation(job: JobConfig, *, seed: int = 0, special_tokens: bool = True) -> Evaluation:
    """The evaluation of `job.scenarios`. ConfigError or DataError for anything that could not be run or scored."""
    options = plain(job.scenarios)
    if not options:
        raise ConfigError("job.scenarios is empty", remedy="Name at least one scenario, or use job=generate.")
    if job.trials < 1:
        raise ConfigError(f"job.trials is {job.trials}", remedy="It is at least 1.")
    scenarios = tuple(load_scenario(name, settings, job.trials) for name, settings in options.items() if settings)
    names = {metric.partition("@")[0] for scenario in scenarios for metric in scenario.metrics}
    metrics = {name: load_metric(name) for name in sorted(names & set(TEXT_METRICS))}
    return Evaluation(scenarios, metrics, seed, special_tokens)


def special_count(tokenizer: Tokenizer, special_tokens: bool) -> int:
    """How many special tokens the tokenizer puts around a text."""
    return len(encode(tokenizer, ["a"], special_tokens)[0]) - len(encode(tokenizer, ["a"], special_tokens=False)[0])


def prompt_room(scenario: Scenario, limits: Limits, specials: int) -> int:
    """Longest prompt in tokens, special ones included.

    HELM counts a prompt without special tokens, so `scenario.prompt_tokens` does; the job's own limit counts them.
    The model has a position for each token that it reads: the last one generated is never read.
    """
    spec = scenario.spec
    room = scenario.prompt_tokens + specials if scenario.prompt_tokens else limits.prompt_tokens
    generated = spec.max_tokens if spec.generates else 0
    if limits.context_tokens:
        room = min(room, limits.context_tokens - max(0, generated - 1))
    if room <= specials:
        raise ConfigError(
            f"job.scenarios.{scenario.name}.adapter.max_tokens is {generated}: with {limits.context_tokens} positions "
            f"the model has no room for a prompt",
            remedy="Lower max_tokens, or choose a model with a longer context.",
        )
    return room


def special_prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text."""
    [ids] = encode(tokenizer, ["a"])
    return tuple(ids[: next((place for place, token in enumerate(ids) if token not in tokenizer.all_special_ids), 0)])


def _count(scenario: Scenario) -> int | None:
    if scenario.spec.method == LANGUAGE_MODELING:
        return None
    each = sum(len(queries(scenario.spec, instance)) for instance in scenario.evaluated)
    return each * scenario.spec.num_train_trials * scenario.spec.completions


def _scored_tokens(scenario: Scenario, tokenizer: Tokenizer, query: Query, prompt: Fitted, special_tokens: bool) -> int:
    """Tokens at the prompt's end that belong to the reference: those that the prompt without it does not have."""
    if query.reference_index < 0 or prompt.truncated:
        return 0
    reference = query.instance.references[query.reference_index].text
    context = prompt.text[: len(prompt.text) - len(scenario.spec.global_suffix) - len(reference)].rstrip()
    before = encode(tokenizer, [context], special_tokens)[0] if context else []
    return min(len(prompt.token_ids) - shared_prefix(before, prompt.token_ids), len(prompt.token_ids) - 1)


def _placed(item: _Draftling, shard: str, place: int) -> Prompt:
    """The record for the pipeline: identity `(scenario name, place)`, an id that says which request it is."""
    scenario, query, fitted = item.scenario, item.query, item.fitted
    spec = scenario.spec
    name = _identifier(item)
    carried = {
        "scenario": scenario.name,
        "trial": item.trial,
        "instance": query.instance.id,
        "split": query.instance.split,
        "input": query.instance.input,
        "references": [reference.text for reference in query.instance.references],
        "correct": [reference.correct for reference in query.instance.references],
        "reference_index": query.reference_index,
        "request_mode": query.mode,
        "completion_index": item.completion,
        "shots": fitted.shots,
        "truncated": fitted.truncated,
        "prompt": fitted.text,
    }
    sampling = Sampling(
        max_new_tokens=spec.max_tokens if spec.generates else 0,
        temperature=spec.temperature if spec.generates else 0.0,
        seed=_row_seed(item.seed, name),
        stop=spec.stop_sequences if spec.method == GENERATION else (),  # HELM stops no other method
        logprobs=True,
    )
    error = ""
    if spec.scores_references and not item.score_tokens:
        error = f"the prompt does not fit and would lose its reference ({fitted.dropped_tokens} tokens too long)"
    return Prompt(
        row=Row(name, shard, place, carried),
        token_ids=fitted.token_ids,
        sampling=sampling,
        carried=carried,
        dropped_tokens=fitted.dropped_tokens,
        completion_index=item.completion,
        score_tokens=item.score_tokens,
        error=error,
    )


def _identifier(item: _Draftling) -> str:
    parts = [item.scenario.name, f"trial{item.trial}", item.query.instance.id]
    if item.query.reference_index >= 0:
        parts += [f"reference{item.query.reference_index}", item.query.mode]
    if item.scenario.spec.completions > 1:
        parts.append(f"completion{item.completion}")
    if item.scenario.spec.method == LANGUAGE_MODELING:
        parts.append(f"window{item.completion}")
    return "/".join(parts)


def _row_seed(seed: int, name: str) -> int:
    """31 bits that depend on nothing but the job's seed and the row's id."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
