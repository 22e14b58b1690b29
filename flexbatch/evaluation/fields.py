"""What an extraction asks for: a JSON Schema, a regular expression or choices, and the columns that come of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from flexbatch.config import JobConfig
from flexbatch.errors import ConfigError

PREFIX: Final = "extracted_"
VALID: Final = "extracted_valid"
VALUE: Final = "value"  # the one field of a regular expression or of choices
_SCALARS: Final = {"string": "string", "integer": "int64", "number": "float64", "boolean": "bool"}


@dataclass(frozen=True)
class Target:
    """What a completion has to be. Exactly one of `schema`, `regex` and `choices` is set."""

    schema: Mapping[str, Any] | None = None
    regex: str = ""
    choices: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields: an object's properties, else the single field `value`."""
        properties = self.schema.get("properties") if self.schema else None
        return tuple(properties) if properties else (VALUE,)

    def columns(self) -> dict[str, str]:
        """Columns that the output gains, with types as `data.columns` takes them; values of other types are JSON."""
        if self.schema is None:
            return {PREFIX + VALUE: "string", VALID: "bool"}
        properties = self.schema.get("properties") or {VALUE: self.schema}
        return {PREFIX + name: _column_type(value) for name, value in properties.items()} | {VALID: "bool"}

    def read(self, completion: str) -> dict[str, Any] | None:
        """The fields of a completion; None where it does not parse or does not validate."""
        text = completion.strip()
        if self.schema is None:
            for form in (text, completion.removeprefix(" ")):  # an expression may want the spaces around it
                if form in self.choices if self.choices else re.fullmatch(self.regex, form):
                    return {VALUE: form}
            return None
        try:
            value = json.loads(text)
        except ValueError:
            return None
        if not Draft202012Validator(self.schema).is_valid(value):
            return None
        return {name: value.get(name) for name in self.fields} if isinstance(value, dict) else {VALUE: value}

    def values(self, completion: str) -> dict[str, Any]:
        """The values of `columns()` for one completion; null where there is none."""
        found = self.read(completion) or {}
        kinds = self.columns()
        values = {PREFIX + name: _typed(found.get(name), kinds[PREFIX + name]) for name in self.fields}
        return values | {VALID: bool(found)}


def read_target(job: JobConfig) -> Target:
    """The target of `job.schema`, `job.regex` or `job.choices`. ConfigError for one that cannot be."""
    given = [name for name in ("schema", "regex", "choices") if getattr(job, name)]
    if len(given) != 1:
        raise ConfigError(
            f"job.schema, job.regex and job.choices: {', '.join(given) or 'none'} given",
            remedy="Give exactly one of them.",
        )
    if job.regex:
        try:
            re.compile(job.regex)
        except re.error as error:
            raise ConfigError(f"job.regex is {job.regex!r}: {error}", remedy="Correct the expression.") from error
        return Target(regex=job.regex)
    if job.choices:
        if not all(choice.strip() == choice != "" for choice in job.choices):
            raise ConfigError(f"job.choices is {list(job.choices)}", remedy="Give texts without spaces around them.")
        return Target(choices=tuple(job.choices))
    return Target(schema=_schema(job.schema))


def _schema(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = _schema_file(Path(value).expanduser())
    if isinstance(value, list):
        if not all(isinstance(name, str) and name for name in value) or len(set(value)) < len(value):
            raise ConfigError(f"job.schema is {value!r}", remedy="Give the names of the fields, each once.")
        properties = {name: {"type": "string"} for name in value}
        return {"type": "object", "properties": properties, "required": value, "additionalProperties": False}
    if not isinstance(value, dict):
        raise ConfigError(f"job.schema is {value!r}", remedy="Give a JSON Schema, its file, or a list of field names.")
    try:
        Draft202012Validator.check_schema(value)
    except SchemaError as error:
        raise ConfigError(f"job.schema is not a JSON Schema: {error.message}", remedy="Correct the schema.") from error
    return value


def _schema_file(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except OSError as error:
        raise ConfigError(f"job.schema: cannot read {path} ({error.strerror})", remedy="Give a schema file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"job.schema: {path} is not JSON: {error}", remedy="Correct the file.") from error


def _column_type(schema: Any) -> str:
    kind = schema.get("type") if isinstance(schema, dict) else None
    kinds = [name for name in (kind if isinstance(kind, list) else [kind]) if name != "null"]
    if len(kinds) == 1 and kinds[0] in _SCALARS:
        return _SCALARS[kinds[0]]
    if kinds == ["array"]:
        item = _column_type(schema.get("items"))
        if item in _SCALARS.values():
            return f"list<{item}>"
    return "string"


def _typed(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "string":
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if kind == "float64":
        return float(value)
    if kind == "int64":
        number = int(value)  # 3.0 is an integer in JSON Schema
        return number if -(2**63) <= number < 2**63 else None
    return value
