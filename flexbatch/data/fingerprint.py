"""Everything that changes a run's results, written once: a folder's second run must have the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch.data import durable
from flexbatch.errors import FingerprintError, OutputError

SHOWN = 12  # differences named in a message
ABSENT = "(absent)"


@dataclass(frozen=True, slots=True)
class Difference:
    """One key, as dotted path, with its value in the folder's run and in this one, as JSON."""

    key: str
    folder: str
    now: str


def differences(folder: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """The keys of two nested mappings whose values differ, sorted."""
    old, new = dict(_flatten(_plain(folder), "")), dict(_flatten(_plain(now), ""))
    keys = sorted(key for key in old | new if old.get(key, ABSENT) != new.get(key, ABSENT))
    return [Difference(key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in keys]


def _plain(value: Any) -> Any:
    """As JSON would give it back: tuples become lists, keys strings."""
    return json.loads(json.dumps(value, default=str))


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, json.dumps(value, ensure_ascii=False)


def check_fingerprint(path: Path, fingerprint: Mapping[str, Any], scratch: Path, *, folder: Path) -> None:
    """Compare with the fingerprint at `path`, or write it there where there is none.

    Raises:
        FingerprintError: they differ; the message names the keys.
        OutputError: the folder's fingerprint cannot be read.
    """
    if not path.exists():
        if (folder / "data").is_dir() and any((folder / "data").iterdir()):
            raise FingerprintError(
                f"output.dir: '{folder}' has a data folder that no run of flexbatch has left there.",
                remedy="Choose another output.dir.",
            )
        content = json.dumps(_plain(fingerprint), indent=1, sort_keys=True, ensure_ascii=False)
        durable.write_file(path, content.encode("utf-8", "backslashreplace"), scratch)
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"output.dir: '{path}' cannot be read: {error}",
            remedy="Choose another output.dir, or delete the folder to start again.",
        ) from error
    if changed := differences(known, fingerprint):
        raise FingerprintError(_describe(folder, changed), remedy=_REMEDY)


_REMEDY = (
    "Set these back to go on with that run; or choose another output.dir; or delete the folder to start again. "
    "What does not change results (offload, hardware) may change freely."
)


def _describe(folder: Path, changed: list[Difference]) -> str:
    lines = [f"  {item.key}: {_short(item.folder)} there, {_short(item.now)} now" for item in changed[:SHOWN]]
    if len(changed) > SHOWN:
        lines.append(f"  and {len(changed) - SHOWN} more")
    return f"output.dir: '{folder}' belongs to another run, which differs in:\n" + "\n".join(lines)


def _short(text: str) -> str:
    return text if len(text) <= 90 else f"{text[:60]}...{text[-25:]}"
