"""Frozen dataclasses to plain JSON values and back, strictly.

Fields may be str, int, float, bool, None, Literal, dataclasses, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str,
X]` and unions with None. Floats that JSON does not know are written as the strings `"NaN"`, `"Infinity"`,
`"-Infinity"`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, Literal, TypeVar, Union

__all__ = ["from_plain", "parsed", "to_plain"]

T = TypeVar("T")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def parsed(text: str | bytes) -> Any:
    """Return what a report's text holds as plain JSON values.

    Raises:
        ValueError: The text is no JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is no report: not JSON ({error})") from error


def to_plain(value: Any) -> Any:
    """Turn a dataclass tree into dicts, lists, strings and numbers that `json.dumps(allow_nan=False)` takes.

    Raises:
        TypeError: A value is of a kind that has no place in a report.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    raise TypeError(f"a report holds plain values only, got {type(value).__name__} {value!r}")


def from_plain(kind: type[T], value: Any, where: str = "report") -> T:
    """Read back what `to_plain` wrote for a value of type `kind`.

    Args:
        kind: The dataclass (or any type that a field may have).
        value: Parsed JSON.
        where: Path of the value, for messages.

    Raises:
        ValueError: A field is missing, unknown or of the wrong type; the message gives its path.
    """
    return typing.cast(T, _read(kind, value, where))


def _read(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        return _read_union(kind, value, where)
    if origin is Literal:
        return _expect(value in typing.get_args(kind), kind, value, where)
    if origin is tuple:
        return _read_tuple(typing.get_args(kind), _expect(isinstance(value, list), kind, value, where), where)
    if origin is dict:
        _expect(isinstance(value, dict), kind, value, where)
        item = typing.get_args(kind)[1]
        return {key: _read(item, entry, f"{where}.{key}") for key, entry in value.items()}
    if kind is float:
        if isinstance(value, str) and value in _NON_FINITE:
            return _NON_FINITE[value]
        return float(
            _expect(isinstance(value, (int, float)) and not isinstance(value, bool), kind, value, where)
        )
    if kind is int:
        return _expect(isinstance(value, int) and not isinstance(value, bool), kind, value, where)
    if kind is type(None):
        return _expect(value is None, kind, value, where)
    return _expect(isinstance(value, kind), kind, value, where)


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), kind, value, where)
    names = [field.name for field in dataclasses.fields(kind)]
    missing, unknown = [n for n in names if n not in value], [n for n in value if n not in names]
    if missing or unknown:
        raise ValueError(
            f"{where}: missing fields {missing}, unknown fields {unknown}, expected exactly {names}"
        )
    hints = typing.get_type_hints(kind)
    return kind(**{name: _read(hints[name], value[name], f"{where}.{name}") for name in names})


def _read_union(kind: Any, value: Any, where: str) -> Any:
    options = [option for option in typing.get_args(kind) if option is not type(None)]
    if value is None and len(options) < len(typing.get_args(kind)):
        return None
    for option in options[:-1]:
        try:
            return _read(option, value, where)
        except ValueError:
            continue
    return _read(options[-1], value, where)


def _read_tuple(items: tuple[Any, ...], value: list[Any], where: str) -> tuple[Any, ...]:
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_read(items[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
    _expect(len(items) == len(value), f"{len(items)} items", value, where)
    return tuple(
        _read(item, entry, f"{where}[{i}]") for i, (item, entry) in enumerate(zip(items, value, strict=True))
    )


def _expect(ok: bool, kind: Any, value: Any, where: str) -> Any:
    if not ok:
        name = getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind)
        raise ValueError(f"{where}: expected {name}, got {value!r:.80}")
    return value
