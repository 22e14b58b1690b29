"""Every value held to its option's rules, then values that do not go together. All of it before anything is read."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable
from typing import Any

from flexbatch.config import Config, parse_bytes
from flexbatch.errors import ConfigError
from flexbatch.overrides import Key, keys, near_miss

# The columns of every part; a carried column may not take one of these names.
OWN_COLUMNS = (
    "id", "shard", "row", "prompt_tokens", "completion", "completion_ids", "finish_reason", "error", "logprobs",
)  # fmt: skip


def check(config: Config) -> None:
    """Raise a ConfigError for the first value that cannot be: it names the key, the value and what to write."""
    for key in keys():
        group, field = key.name.split(".", 1)
        check_value(key, getattr(getattr(config, group), field))
    for rule in (check_percent, check_generation, check_prompt, check_job, check_dataset, check_output, check_device):
        rule(config)


def check_value(key: Key, value: Any) -> None:
    check_type(key, value)
    rules = key.rules
    for item in value if isinstance(value, list) else [value]:
        if "one_of" in rules and item not in rules["one_of"]:
            refuse(key.name, item, f"{near_miss(str(item), [str(choice) for choice in rules['one_of']])}"
                   f"It can be {listed(rules['one_of'])}.")  # fmt: skip
        if "least" in rules and not item >= rules["least"]:
            refuse(key.name, item, f"It must be at least {rules['least']:g}.")
        if "most" in rules and not item <= rules["most"]:
            refuse(key.name, item, f"It must be at most {rules['most']:g}.")
    if rules.get("bytes") and value != "auto":
        parse_bytes(value, key=key.name)
    if rules.get("count") and value != "auto" and (type(value) is not int or value < 1):
        refuse(key.name, value, "Give a whole number of at least 1, or auto.")
    if rules.get("not_empty") and not value:
        refuse(key.name, value, f"Give {rules['doc']}.")


def check_type(key: Key, value: Any) -> None:
    """Only for values that did not come through Hydra, which holds files to the schema's types itself."""
    expected = typing.get_origin(key.type) or key.type
    if expected is Any:
        return
    if expected is float and type(value) is int:
        return
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        refuse(key.name, value, f"It must be of type {expected.__name__}.")


def refuse_unused(config: Config, names: Iterable[str], because: str, remedy: str) -> None:
    """ConfigError for the first of these options that is not at its default: what is done reads none of them."""
    for name in names:
        group, field = name.split(".", 1)
        given = getattr(config, group)
        value = getattr(given, field)
        if value != getattr(type(given)(), field):
            raise ConfigError(f"{name}={value!r} means nothing here: {because}.", remedy=remedy)


def refuse(name: str, value: Any, remedy: str) -> typing.NoReturn:
    raise ConfigError(f"{name}={value!r} is not possible.", remedy=remedy)


def listed(values: typing.Sequence[Any]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def check_percent(config: Config) -> None:
    offload = config.offload
    manual = "Write offload.policy=manual offload.percent=[W1,W2,K1,K2,H1,H2]: weights, KV and hidden states, each on"
    remedy = f"{manual} device then on host, in percent; the rest is on disk."
    if offload.policy == "manual" and len(offload.percent) != 6:
        raise ConfigError(
            f"offload.policy=manual needs offload.percent with 6 numbers; it has {len(offload.percent)}.", remedy=remedy
        )
    if offload.policy == "auto" and offload.percent:
        raise ConfigError(f"offload.percent={offload.percent} is not read with offload.policy=auto.", remedy=remedy)
    for index, what in enumerate(("weights", "KV cache", "hidden states")):
        device, host = offload.percent[2 * index : 2 * index + 2] or (0.0, 0.0)
        if device + host > 100 + 1e-9:
            raise ConfigError(
                f"offload.percent={offload.percent}: {what} on device and host make {device + host:g} %.",
                remedy="Each pair can make at most 100; what is missing to 100 is on disk.",
            )


def check_generation(config: Config) -> None:
    generation = config.generation
    if generation.min_new_tokens > generation.max_new_tokens:
        refuse(
            "generation.min_new_tokens",
            generation.min_new_tokens,
            f"It is over generation.max_new_tokens={generation.max_new_tokens}.",
        )
    if generation.top_p == 0:
        refuse("generation.top_p", 0, "Give more than 0; for the likeliest token always: generation.temperature=0.")
    if "" in generation.stop:
        refuse(
            "generation.stop", generation.stop, "An empty stop string would end every completion at once; remove it."
        )
    if generation.num_completions > 1 and generation.temperature == 0 and config.job.kind != "helm_eval":
        raise ConfigError(
            f"generation.num_completions={generation.num_completions} with temperature 0 would all be the same.",
            remedy="Set generation.temperature above 0, or generation.num_completions=1.",
        )


def check_prompt(config: Config) -> None:
    prompt = config.prompt
    if prompt.template_file and prompt.template != type(prompt)().template:
        raise ConfigError(
            f"prompt.template and prompt.template_file={prompt.template_file!r} are both given.",
            remedy="Leave one of them out.",
        )
    if prompt.system and not prompt.chat_template:
        raise ConfigError(
            "prompt.system is given, but only a chat template has a place for it.",
            remedy="Add prompt.chat_template=true.",
        )
    is_path = any(isinstance(shot, str) for shot in prompt.shots)
    if prompt.shots and not is_path and prompt.shot_count > len(prompt.shots):
        refuse("prompt.shot_count", prompt.shot_count, f"prompt.shots has {len(prompt.shots)} examples.")


def check_job(config: Config) -> None:
    job = config.job
    if job.kind != "extract":
        return
    given = [name for name in ("schema", "regex", "choices") if getattr(job, name)]
    if len(given) != 1:
        raise ConfigError(
            f"job.kind=extract takes one of job.schema, job.regex, job.choices; given: {', '.join(given) or 'none'}.",
            remedy="Say what to extract, for example job.schema='[company, date, total]'.",
        )


def check_dataset(config: Config) -> None:
    if config.job.kind != "helm_eval" and not config.dataset.path:
        raise ConfigError(
            "dataset.path is not set.",
            remedy="Add dataset.path= and a file, a folder, a glob or a hub id (Arrow, Parquet, JSONL, CSV).",
        )


def check_output(config: Config) -> None:
    columns = config.output.columns
    for column in columns:
        if column in OWN_COLUMNS or columns.count(column) > 1:
            refuse(
                "output.columns", columns, f"{column!r} is twice in the output: every part has {listed(OWN_COLUMNS)}."
            )


def check_device(config: Config) -> None:
    device = config.offload.device
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        refuse("offload.device", device, f"{near_miss(device, ('auto', 'cpu', 'cuda', 'mps'))}"
               "It can be auto, cpu, mps, cuda or cuda:0.")  # fmt: skip
