"""Tab completion of verbs, groups, options and their values, for bash:

complete -o nospace -o default -C 'flexbatch --complete' flexbatch
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexbatch.composition import bundled, group_options
from flexbatch.overrides import GROUPS, keys


def candidates(word: str, verbs: Sequence[str], *, first: bool) -> list[str]:
    """Whole words that begin with `word`."""
    name, equals, _ = word.partition("=")
    if equals:
        return [choice for value in values(name) if (choice := f"{name}={value}").startswith(word)]
    words = [f"{group}=" for group in GROUPS]
    words += [f"{key.name}=" for key in keys()] if "." in word else [f"{group}." for group in GROUPS]
    return [choice for choice in [*(verbs if first else ()), *words] if choice.startswith(word)]


def values(name: str) -> list[str]:
    if name in GROUPS:
        return group_options(name, [bundled("conf")])
    for key in keys():
        if key.name == name:
            allowed = key.rules.get("one_of", ("true", "false") if key.type is bool else ())
            return [str(value) for value in allowed]
    return []


def complete(environment: Mapping[str, str], verbs: Sequence[str]) -> list[str]:
    """What bash is to offer for `COMP_LINE` at `COMP_POINT`. It breaks words at `=`, so what stands before goes."""
    line = environment.get("COMP_LINE", "")
    line = line[: int(environment.get("COMP_POINT", len(line)))]
    words = line.split(" ")
    word = words[-1]
    known = word.rpartition("=")[0] + "=" if "=" in word else ""
    return [choice.removeprefix(known) for choice in candidates(word, verbs, first=len(words) == 2)]
