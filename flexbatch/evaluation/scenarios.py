"""A scenario as `conf/` describes it: data, adapter, metrics. Everything that can be wrong is said here, first.

name:
  data: {kind: shards, path: FILE}    or just a path; see `sources.LOADERS` for the other kinds
  adapter: {method: generation, ...}  keys of `adapter.AdapterSpec`
  metrics: [exact_match, f1_score]    `NAME@k`: best of the k likeliest completions
  main_metric: exact_match            the one in the printed table's first line; default: the first
  prompt_tokens: 1984                 longest prompt without special tokens; default: the job's
  run_name: "..."                     the name in HELM's files; default: the scenario's name
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from flexbatch.errors import ConfigError, DataError
from flexbatch.evaluation.adapter import ADAPTER_KEYS, GENERATION, JOINT, LANGUAGE_MODELING, METHODS, AdapterSpec
from flexbatch.evaluation.instance import SPLITS, TRAIN, Instance, number_instances
from flexbatch.evaluation.metrics import SET_METRICS, TEXT_METRICS
from flexbatch.evaluation.sources import LOADERS

SCENARIO_KEYS: Final = ("data", "adapter", "metrics", "main_metric", "prompt_tokens", "run_name")
_TUPLE_KEYS: Final = ("reference_prefix_characters", "stop_sequences", "eval_splits")
BITS_PER_BYTE: Final = "bits_per_byte"
_NOT_FOR_CHOICES: Final = (*SET_METRICS, "rouge_1", "rouge_2", "rouge_l")


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario, checked and loaded. `metrics` may have `@k` suffixes; `trials` is the number of draws of shots."""

    name: str
    spec: AdapterSpec
    metrics: tuple[str, ...]
    main_metric: str
    train: tuple[Instance, ...]
    evaluated: tuple[Instance, ...]
    prompt_tokens: int = 0
    run_name: str = ""
    data: Mapping[str, Any] | None = None


def load_scenario(name: str, options: Any, trials: int = 1) -> Scenario:
    """ConfigError for every option that does not fit, DataError for data that is missing or cannot be scored."""
    where = f"job.scenarios.{name}"
    options = _mapping(plain(options), where)
    _check_keys(options, SCENARIO_KEYS, ("data",), where)
    spec = _adapter(_mapping(options.get("adapter") or {}, f"{where}.adapter"), trials, f"{where}.adapter")
    metrics, main_metric = _metrics(options, spec, where)
    data = _data(options["data"], f"{where}.data")
    train, evaluated = _select(LOADERS[data["kind"]][0](data, f"{where}.data"), spec, where)
    _check_instances(spec, metrics, evaluated, where)
    _check_letters(spec, [*train, *evaluated], where)
    prompt_tokens = _natural(options.get("prompt_tokens") or 0, f"{where}.prompt_tokens")
    run_name = str(options.get("run_name") or name)
    return Scenario(name, spec, metrics, main_metric, train, evaluated, prompt_tokens, run_name, data)


def plain(value: Any) -> Any:
    """Mappings and sequences of any library as dict and list."""
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in value}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}", remedy="It is a mapping of keys to values.")
    return value


def _check_keys(options: Mapping[str, Any], known: Sequence[str], needed: Sequence[str], where: str) -> None:
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{where}.{key}: there is no such key", remedy=f"{hint}Known keys: {', '.join(known)}.")
    for key in needed:
        if options.get(key) in (None, ""):
            raise ConfigError(f"{where}.{key} is missing", remedy=f"Set {where}.{key}.")


def _data(value: Any, where: str) -> dict[str, Any]:
    data = {"path": value} if isinstance(value, str | list) else _mapping(value, where)
    data = {"kind": "shards", **data}
    if data["kind"] not in LOADERS:
        raise ConfigError(f"{where}.kind is {data['kind']!r}", remedy=f"Choose one of {', '.join(LOADERS)}.")
    _, needed, optional = LOADERS[data["kind"]]
    _check_keys(data, ("kind", *needed, *optional), needed, where)
    return data


def _adapter(options: dict[str, Any], trials: int, where: str) -> AdapterSpec:
    _check_keys(options, ADAPTER_KEYS, (), where)
    values = {key: value for key, value in options.items() if value is not None}
    for key in _TUPLE_KEYS:
        if key in values:
            values[key] = _strings(values[key], f"{where}.{key}")
    if "substitutions" in values:
        values["substitutions"] = tuple(
            _substitution(pair, f"{where}.substitutions") for pair in values["substitutions"]
        )
    values.setdefault("num_outputs", 1)
    values.setdefault("temperature", 0.0)
    values.setdefault("num_train_trials", trials)
    defaults = AdapterSpec()
    for key, value in values.items():
        default = getattr(defaults, key)
        expected = (int, float) if isinstance(default, float) else (int,) if default is None else (type(default),)
        if not isinstance(value, expected) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise ConfigError(f"{where}.{key} is {value!r}", remedy=f"Give a value of type {expected[-1].__name__}.")
    spec = AdapterSpec(**values)
    _regular_expression(spec.output_mapping_pattern, f"{where}.output_mapping_pattern")
    _check_adapter(spec, where)
    return spec


def _strings(value: Any, where: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ConfigError(f"{where} is {value!r}", remedy="Give a list of strings.")
    return tuple(items)


def _substitution(pair: Any, where: str) -> tuple[str, str]:
    if not isinstance(pair, dict) or not all(isinstance(pair.get(key), str) for key in ("source", "target")):
        raise ConfigError(f"{where} has {pair!r}", remedy="Give {source: REGULAR_EXPRESSION, target: TEXT} for each.")
    return _regular_expression(pair["source"], where), pair["target"]


def _regular_expression(pattern: str, where: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{where}: {pattern!r} is not a regular expression ({error})", remedy="Correct it."
        ) from error
    return pattern


def _natural(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{where} is {value!r}", remedy="Give a whole number, 0 or more.")
    return value


def _check_adapter(spec: AdapterSpec, where: str) -> None:
    if spec.method not in METHODS:
        raise ConfigError(f"{where}.method is {spec.method!r}", remedy=f"Choose one of {', '.join(METHODS)}.")
    if "" in spec.stop_sequences:
        raise ConfigError(
            f"{where}.stop_sequences holds an empty string: it would end every completion at once",
            remedy="Remove it, or write the line break as a double-quoted \\n.",
        )
    for key in ("max_train_instances", "max_eval_instances", "max_tokens"):
        _natural(getattr(spec, key) or 0, f"{where}.{key}")
    for key in ("num_outputs", "num_train_trials"):
        if getattr(spec, key) < 1:
            raise ConfigError(f"{where}.{key} is {getattr(spec, key)}", remedy="It is at least 1.")
    if spec.temperature < 0:
        raise ConfigError(f"{where}.temperature is {spec.temperature}", remedy="It is 0 (greedy) or more.")
    unknown = [split for split in spec.eval_splits if split not in SPLITS or split == TRAIN]
    if unknown or not spec.eval_splits:
        raise ConfigError(f"{where}.eval_splits is {list(spec.eval_splits)}", remedy="Choose from valid and test.")
    if spec.scores_references:
        _check_scored(spec, where)
    elif spec.generates:
        _check_generated(spec, where)


def _check_scored(spec: AdapterSpec, where: str) -> None:
    if spec.output_suffix:
        raise ConfigError(
            f"{where}.output_suffix is {spec.output_suffix!r}: {spec.method} ends the prompt with the reference",
            remedy='Set output_suffix: "" and put what separates examples into instance_prefix.',
        )


def _check_generated(spec: AdapterSpec, where: str) -> None:
    if spec.max_tokens < 1:
        raise ConfigError(f"{where}.max_tokens is {spec.max_tokens}", remedy=f"{spec.method} needs at least 1.")
    if spec.completions > 1 and spec.temperature == 0:
        raise ConfigError(
            f"{where}.num_outputs is {spec.num_outputs} at temperature 0: the completions would all be the same",
            remedy="Set a temperature above 0, or num_outputs: 1.",
        )
    if spec.method == JOINT and not any(character.isalnum() for character in spec.reference_prefix):
        raise ConfigError(f"{where}.reference_prefix is {spec.reference_prefix!r}", remedy='It needs a letter: "A. ".')


def _metrics(options: Mapping[str, Any], spec: AdapterSpec, where: str) -> tuple[tuple[str, ...], str]:
    default = BITS_PER_BYTE if spec.method == LANGUAGE_MODELING else "exact_match"
    names = _strings(options.get("metrics") or [default], f"{where}.metrics")
    main = str(options.get("main_metric") or names[0])
    for name in names:
        _check_metric(name, spec, f"{where}.metrics")
    if main not in names:
        raise ConfigError(f"{where}.main_metric is {main!r}", remedy=f"Choose one of its metrics: {', '.join(names)}.")
    return tuple(dict.fromkeys(names)), main


def _check_metric(name: str, spec: AdapterSpec, where: str) -> None:
    base, _, best_of = name.partition("@")
    if spec.method == LANGUAGE_MODELING and name != BITS_PER_BYTE:
        raise ConfigError(
            f"{where}: {name} does not fit {spec.method}, which writes no text", remedy=f"Use {BITS_PER_BYTE}."
        )
    if spec.method == LANGUAGE_MODELING:
        return
    if base not in TEXT_METRICS:
        near = difflib.get_close_matches(base, TEXT_METRICS, 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{where}: there is no metric {base!r}", remedy=f"{hint}Known: {', '.join(TEXT_METRICS)}.")
    if "@" in name and not (best_of.isdigit() and 1 <= int(best_of) <= spec.num_outputs):
        raise ConfigError(
            f"{where}: {name} asks for the best of {best_of or '?'}, and adapter.num_outputs is {spec.num_outputs}",
            remedy="k is a number from 1 to num_outputs; raise num_outputs or lower k.",
        )
    if spec.scores_references and name != "exact_match":
        raise ConfigError(
            f"{where}: {name} does not fit {spec.method}, which writes no text", remedy="Use exact_match."
        )
    if spec.method == JOINT and base in _NOT_FOR_CHOICES:
        raise ConfigError(f"{where}: {name} does not fit {JOINT}, whose answer is a letter", remedy="Use exact_match.")


def _select(
    instances: list[Instance], spec: AdapterSpec, where: str
) -> tuple[tuple[Instance, ...], tuple[Instance, ...]]:
    """Training instances, and those to evaluate: a draw of `max_eval_instances` without replacement, HELM's own."""
    unknown = sorted({instance.split for instance in instances} - set(SPLITS))
    if unknown:
        raise DataError(f"{where}.data has the split {unknown[0]!r}", remedy=f"Splits are {', '.join(SPLITS)}.")
    instances = number_instances(instances)
    ids = [instance.id for instance in instances]
    if len(set(ids)) < len(ids):
        doubled = next(name for place, name in enumerate(ids) if name in ids[:place])
        raise DataError(f"{where}.data has the id {doubled!r} twice", remedy="Ids name instances: make them unique.")
    train = [instance for instance in instances if instance.split == TRAIN]
    evaluated = [instance for instance in instances if instance.split in spec.eval_splits]
    if spec.max_eval_instances and len(evaluated) > spec.max_eval_instances:
        chosen = np.random.RandomState(0).choice(len(evaluated), spec.max_eval_instances, replace=False)
        evaluated = [evaluated[place] for place in chosen]
    if not evaluated:
        found = sorted({instance.split for instance in instances}) or "none at all"
        raise DataError(
            f"{where}.data has no instance in {' or '.join(spec.eval_splits)} (splits there: {found})",
            remedy="Check data.path, or name the split to evaluate in adapter.eval_splits.",
        )
    return tuple(train), tuple(evaluated)


def _check_instances(spec: AdapterSpec, metrics: Sequence[str], evaluated: Sequence[Instance], where: str) -> None:
    if spec.method == LANGUAGE_MODELING:
        return
    bare = [instance.id for instance in evaluated if not instance.correct]
    if bare:
        raise DataError(
            f"{where}.data: {len(bare)} of {len(evaluated)} instances have no correct reference (first: {bare[0]})",
            remedy="References stand in the column 'references', or the one that data.columns.references names; use "
            "job=generate for prompts without any.",
        )
    if spec.method != GENERATION:
        single = [instance.id for instance in evaluated if len(instance.references) < 2]
        if single:
            raise DataError(
                f"{where}.data: {single[0]} has one reference, and {spec.method} needs the wrong choices as well",
                remedy="List all choices as references, with 'correct' for the right ones, or use method: generation.",
            )
    if any(metric.partition("@")[0] in SET_METRICS for metric in metrics):
        for instance in evaluated:
            for reference in instance.correct:
                if " is " not in reference.text and reference.text != "Nothing.":
                    raise ConfigError(
                        f"{where}.metrics: set metrics compare statements such as 'It is red and big.', and the "
                        f"reference of {instance.id} is {reference.text!r}",
                        remedy="Use exact_match or f1_score.",
                    )


def _check_letters(spec: AdapterSpec, instances: Sequence[Instance], where: str) -> None:
    """Every choice needs a letter of its own."""
    if spec.method != JOINT:
        return
    most = max(instances, key=lambda instance: len(instance.references))
    first = next(character for character in spec.reference_prefix if character.isalnum())
    letters = len(spec.reference_prefix_characters) or (ord("Z" if first.isupper() else "z") - ord(first) + 1)
    if len(most.references) > letters:
        raise ConfigError(
            f"{where}.adapter: {most.id} has {len(most.references)} choices and there are {letters} letters",
            remedy="Give more in adapter.reference_prefix_characters.",
        )


def with_limit(scenario: Scenario, count: int) -> Scenario:
    """The first `count` instances alone; 0 keeps all."""
    return replace(scenario, evaluated=scenario.evaluated[:count]) if count else scenario
