"""Column types: what a source column holds, what an output column shall hold, and whether a value fits.

Callers outside `data` treat a `ColumnType` as opaque; they make one from a short description ("list<string>"), so that
they need no pyarrow.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from flexbatch.errors import ConfigError, DataError

_SCALARS: dict[str, Any] = {
    "string": pa.string(),
    "bool": pa.bool_(),
    "int8": pa.int8(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "binary": pa.binary(),
}


@dataclass(frozen=True, slots=True)
class ColumnType:
    """The type of one column. `arrow` is a pyarrow DataType in canonical form (no dictionary, no large_string)."""

    arrow: Any

    @staticmethod
    def parse(description: str) -> ColumnType:
        """From `string`, `bool`, `int8` to `int64`, `float32`, `float64`, `binary`, `list<T>`, `struct<name: T, ...>`.

        Raises:
            ConfigError: the description is none of these.
        """
        return ColumnType(_parse(description.strip(), description))

    @property
    def name(self) -> str:
        return str(self.arrow)

    @property
    def is_null(self) -> bool:
        """Nothing but nulls was seen: the type is not known yet."""
        return bool(pa.types.is_null(self.arrow))

    def accepts(self, value: Any) -> bool:
        """Whether a Python value fits this type without a change of meaning; null fits everywhere."""
        return value is None or _accepts(self.arrow, value)


def _parse(text: str, whole: str) -> Any:
    if text in _SCALARS:
        return _SCALARS[text]
    if text.startswith("list<") and text.endswith(">"):
        return pa.list_(_parse(text[5:-1].strip(), whole))
    if text.startswith("struct<") and text.endswith(">"):
        fields = [part.partition(":") for part in _split_top_level(text[7:-1])]
        if all(colon and name.strip() for name, colon, _ in fields):
            return pa.struct([(name.strip(), _parse(kind.strip(), whole)) for name, _, kind in fields])
    raise ConfigError(
        f"'{whole}' is not a column type.",
        remedy=f"Use {', '.join(_SCALARS)}, list<T> or struct<name: T, ...>.",
    )


def _split_top_level(text: str) -> list[str]:
    """Split at the commas that are not inside angle brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def _accepts(kind: Any, value: Any) -> bool:
    if value is None:
        return True
    if pa.types.is_string(kind):
        return isinstance(value, str) and is_encodable(value)
    if pa.types.is_boolean(kind):
        return isinstance(value, bool)
    if pa.types.is_integer(kind):
        return isinstance(value, int) and not isinstance(value, bool) and _integer_fits(kind, value)
    if pa.types.is_floating(kind):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if pa.types.is_list(kind):
        return isinstance(value, list | tuple) and all(_accepts(kind.value_type, item) for item in value)
    if pa.types.is_struct(kind):
        names = {field.name for field in kind}
        return (
            isinstance(value, dict)
            and value.keys() <= names
            and all(_accepts(field.type, value.get(field.name)) for field in kind)
        )
    # Dates, decimals and the like come from typed formats only, which have checked them.
    return not pa.types.is_null(kind)


def _integer_fits(kind: Any, value: int) -> bool:
    bits = int(kind.bit_width)
    if pa.types.is_signed_integer(kind):
        return -(1 << (bits - 1)) <= value < 1 << (bits - 1)
    return 0 <= value < 1 << bits


def is_encodable(text: str) -> bool:
    """False for text with lone surrogates (JSON can spell them): neither a tokenizer nor a Parquet file takes those."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def canonical(kind: Any) -> ColumnType:
    """The type as a reader of values sees it: encodings that differ only in memory layout are one type."""
    return ColumnType(_canonical(kind))


def _canonical(kind: Any) -> Any:
    types = pa.types
    if types.is_dictionary(kind):
        return _canonical(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.binary()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        return pa.list_(_canonical(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([(field.name, _canonical(field.type)) for field in kind])
    if isinstance(kind, pa.BaseExtensionType):
        return _canonical(kind.storage_type)
    return kind


class Inference:
    """Column types of untyped records (JSON), seen a batch at a time.

    A column has the type of the most of its values, widened to hold others where that is possible (whole numbers and
    fractions, objects with different keys). What then does not fit is a value of the wrong type.
    """

    def __init__(self) -> None:
        self._counts: dict[str, Counter[Any]] = {}

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        values: dict[str, list[Any]] = {}
        for record in records:
            for name, value in record.items():
                values.setdefault(name, []).append(value)
        for name, column in values.items():
            self._counts.setdefault(name, Counter()).update(_count_types(column))

    def columns(self) -> dict[str, ColumnType]:
        """The types; string for a column of nothing but nulls."""
        return {name: without_nulls(_widest(counts)) for name, counts in self._counts.items()}


def _widest(counts: Counter[Any]) -> ColumnType:
    widest = ColumnType(pa.null())
    for kind, _ in counts.most_common():
        widest = merge(widest, ColumnType(kind), widen=True) or widest
    return widest


def _count_types(values: list[Any]) -> Counter[Any]:
    present = [value for value in values if value is not None]
    if present and (common := _arrow_type(present)) is not None:
        return Counter({common: len(present)})
    kinds = (_arrow_type([value]) for value in present)  # a mixture, or a value that no column can hold
    return Counter(kind for kind in kinds if kind is not None)


def _arrow_type(values: list[Any]) -> Any:
    try:
        return _canonical(pa.array(values).type)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return None


def merge(first: ColumnType, second: ColumnType, *, widen: bool) -> ColumnType | None:
    """The type that holds both, or None. Null joins anything; `widen` lets int64 join float64 (untyped formats)."""
    if first == second:
        return first
    merged = _merge(first.arrow, second.arrow, widen)
    return None if merged is None else ColumnType(merged)


def _merge(first: Any, second: Any, widen: bool) -> Any:
    types = pa.types
    if first == second or types.is_null(second):
        return first
    if types.is_null(first):
        return second
    if types.is_list(first) and types.is_list(second):
        inner = _merge(first.value_type, second.value_type, widen)
        return None if inner is None else pa.list_(inner)
    if types.is_struct(first) and types.is_struct(second):
        return _merge_structs(first, second, widen)
    numbers = {pa.int64(), pa.float64()}
    return pa.float64() if widen and {first, second} == numbers else None


def _merge_structs(first: Any, second: Any, widen: bool) -> Any:
    ours, theirs = ({field.name: field.type for field in kind} for kind in (first, second))
    if not widen and ours.keys() != theirs.keys():
        return None
    merged = {name: _merge(ours.get(name, pa.null()), theirs.get(name, pa.null()), widen) for name in ours | theirs}
    return None if None in merged.values() else pa.struct(list(merged.items()))


def without_nulls(kind: ColumnType) -> ColumnType:
    """The type for a written column: what is null-typed becomes string, because a Null column breaks every reader."""
    return ColumnType(_without_nulls(kind.arrow))


def _without_nulls(kind: Any) -> Any:
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_nulls(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _without_nulls(field.type)) for field in kind])
    return kind


def near_misses(name: str, known: Iterable[str]) -> str:
    """A hint such as "Did you mean 'text'? The columns are ..." for a column that is not there."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    close = close or [other for other in names if other.lower() == name.lower()]
    hint = f"Did you mean {' or '.join(repr(other) for other in close)}? " if close else ""
    shown = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")
    return f"{hint}The columns are: {shown}." if names else "The dataset has no columns."


def missing_column(key: str, name: str, known: Iterable[str]) -> DataError:
    return DataError(f"{key}: the dataset has no column '{name}'.", remedy=near_misses(name, known))
