"""The command line's `key=value` arguments, each turned into its option's type.

The values do not go through Hydra's grammar, in which `prompt.template={{ text }}` is a broken mapping and
`data(1).csv` a function call. A text option takes its argument as it stands; lists and mappings are YAML's flow form
(`[a, b]`, with escapes such as "\\n" inside double quotes); a list of one may leave its brackets out.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import MISSING

from flexbatch.config import Config
from flexbatch.errors import ConfigError

GROUPS = tuple(field.name for field in dataclasses.fields(Config))


@dataclass(frozen=True, slots=True)
class Key:
    """One option: its dotted name, its type, its rules, and the subkey for an entry of a mapping (else empty)."""

    name: str
    type: Any
    rules: Mapping[str, Any]
    subkey: str = ""


def keys() -> Iterator[Key]:
    """Every option that there is, in the order of `config.py`."""
    for group in dataclasses.fields(Config):
        group_class = typing.get_type_hints(Config)[group.name]
        hints = typing.get_type_hints(group_class)
        for field in dataclasses.fields(group_class):
            yield Key(f"{group.name}.{field.name}", hints[field.name], field.metadata)


def near_miss(word: str, known: Sequence[str]) -> str:
    """`Did you mean ...? ` or nothing; an option named without its group is found by its last part."""
    by_last_part = [name for name in known if "." in name and name.rsplit(".", 1)[1] == word.rsplit(".", 1)[-1]]
    close = by_last_part[:1] or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}? " if close else ""


def find_key(name: str) -> Key:
    """The option of this name, or an entry of a mapping option (`job.gold.total`)."""
    known = list(keys())
    for key in known:
        if key.name == name:
            return key
        if typing.get_origin(key.type) is dict and name.startswith(key.name + "."):
            return dataclasses.replace(key, type=typing.get_args(key.type)[1], subkey=name[len(key.name) + 1 :])
    raise ConfigError(
        f"There is no option {name!r}.",
        remedy=near_miss(name, [key.name for key in known] + list(GROUPS)) + "`flexbatch --help` lists all options.",
    )


def doc(name: str) -> str:
    return str(find_key(name).rules["doc"])


def unquoted(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def flow(name: str, text: str, loader: type[yaml.SafeLoader] | type[yaml.BaseLoader] = yaml.SafeLoader) -> Any:
    """A value in YAML's flow form; `{a:1}` without the space is what people type, and is a mapping too.

    With `yaml.BaseLoader` every scalar is a text: `no` is not false, `1.0` keeps its zero.
    """
    spaced = re.sub(r"([{,]\s*[\w-]+):(?=\S)", r"\1: ", text) if text.startswith("{") else text
    try:
        return yaml.load(spaced, Loader=loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{name}: {text!r} cannot be read: {getattr(error, 'problem', error)}.",
            remedy="Write a list as [a, b], a mapping as {a: 1, b: 2}; put quotes around texts with , : [ ] { }.",
        ) from None


def number(name: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise ConfigError(f"{name}: {text!r} is not a {what}.", remedy=f"Write {name}= and a {what}.") from None


def boolean(name: str, text: str) -> bool:
    value = flow(name, text)
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: {text!r} is neither true nor false.", remedy=f"Write {name}=true or {name}=false.")
    return value


def list_of(name: str, text: str, item: type[Any]) -> list[Any]:
    if item in (int, float):
        return [number(name, str(entry), item) for entry in flow(name, text if text.startswith("[") else f"[{text}]")]
    loader = yaml.BaseLoader if item is str else yaml.SafeLoader
    values = flow(name, text, loader) if text.startswith("[") else [unquoted(text)] if text else []
    return [entry if isinstance(entry, str) else str(entry) for entry in values] if item is str else list(values)


def convert(key: Key, text: str) -> Any:
    """The argument's text as the option's type; ConfigError names the option and the value."""
    name = f"{key.name}.{key.subkey}" if key.subkey else key.name
    if key.type is str:
        return unquoted(text)
    if key.type is bool:
        return boolean(name, text)
    if key.type in (int, float):
        return number(name, text, key.type)
    origin = typing.get_origin(key.type)
    if origin is list:
        return list_of(name, text, typing.get_args(key.type)[0])
    if origin is dict:
        value = flow(name, text)
        if not isinstance(value, dict):
            raise ConfigError(f"{name}: {text!r} is not a mapping.", remedy=f"Write {name}='{{key: value}}'.")
        return value
    if key.subkey or "count" in key.rules or text[:1] in ("[", "{") or text in ("", "null"):
        return flow(name, text)
    return unquoted(text)


def split_override(argument: str) -> tuple[str, str]:
    name, equals, value = argument.partition("=")
    if not equals or name.startswith("~"):
        raise ConfigError(
            f"{argument!r} is not of the form key=value.",
            remedy=near_miss(argument, [key.name for key in keys()] + list(GROUPS))
            + "Write for example generation.max_new_tokens=64; `flexbatch --help` lists all options.",
        )
    name = name.lstrip("+")
    if name.split(".")[0] == "hydra":
        raise ConfigError(
            f"{argument!r}: Hydra's own options are not used here.", remedy="The run's folder is output.dir."
        )
    return name, value


def type_name(key: Key) -> str:
    """What may be written for the option, in words for --help and the README."""
    if "one_of" in key.rules:
        return " | ".join(str(choice) for choice in key.rules["one_of"])
    if key.rules.get("count"):
        return "number | auto"
    if key.rules.get("bytes"):
        return "size | auto"
    names = {str: "text", int: "number", float: "decimal", bool: "true | false", Any: "text, list or mapping"}
    return names.get(key.type) or {list: "list", dict: "mapping"}[typing.get_origin(key.type)]


def default_text(key: Key) -> str:
    group, field = key.name.split(".", 1)
    value = getattr(getattr(Config(), group), field)
    if isinstance(value, bool):
        return str(value).lower()
    if value == MISSING:
        return "must be given"
    return "empty" if value in (None, "", [], {}) else str(value).replace("\n", "\\n")


def option_lines(group: str) -> list[str]:
    """The group's options with meaning and default, for --help."""
    return [
        f"  {key.name:28} {key.rules['doc']} [{default_text(key)}]"
        for key in keys()
        if key.name.startswith(f"{group}.")
    ]
