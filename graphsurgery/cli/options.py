"""Options of passes as the command line gives them: `pass-name.key=value`."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import graphsurgery as gs
from graphsurgery import Pass, export
from graphsurgery.cli.errors import UsageError, nearest

__all__ = ["check_opset", "with_options"]

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def check_opset(opset: int | None, output: Path | None) -> None:
    """See that an opset can be written, before any work is done.

    Raises:
        UsageError: It cannot, or no ONNX file is asked for.
    """
    if opset is None:
        return
    if output is None:
        raise UsageError("--opset says what an ONNX file is written in; name the file by -o.")
    try:
        export.check_opset(opset)
    except gs.ExportError as error:
        raise UsageError(f"--opset: {error}.") from error


def with_options(passes: Iterable[Pass], given: Iterable[str]) -> tuple[Pass, ...]:
    """The passes with the options that were given.

    A value is read as the type of the pass's field asks for: a word of a choice, a number, `true` or `false`,
    `none`, or items parted by commas.

    Args:
        passes: Those that will run.
        given: `pass-name.key=value`, each.

    Raises:
        UsageError: An option is not of that form, names no pass that runs or no option of it, or its value is
            not of the option's type.
        PassError: The pass refuses the value.
    """
    chosen = list(passes)
    for text in given:
        left, equals, value = text.partition("=")
        name, dot, key = left.strip().rpartition(".")
        if not (equals and dot and name and key):
            raise UsageError(
                f"--option {text!r} is not PASS.KEY=VALUE, as linear-to-conv1x1.layout=channels-last."
            )
        places = [place for place, item in enumerate(chosen) if item.name == name]
        if not places:
            names = [item.name for item in chosen]
            raise UsageError(
                f"--option {text!r}: no pass {name!r} runs{nearest(name, names)}; "
                f"those that do: {', '.join(names)}. Name more with --passes."
            )
        for place in places:
            chosen[place] = dataclasses.replace(
                chosen[place], **{key: _read(chosen[place], key, value, text)}
            )
    return tuple(chosen)


def _read(item: Pass, key: str, value: str, text: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(item) if field.init}
    if key not in fields:
        known = ", ".join(fields) or "none"
        raise UsageError(
            f"--option {text!r}: {item.name} has no option {key!r}{nearest(key, fields)}; it has: {known}."
        )
    wanted = get_type_hints(type(item)).get(key, str)
    for found in _readings(wanted, value.strip()):
        return found
    raise UsageError(f"--option {text!r}: expected {_describe(wanted)}, got {value!r}.")


def _readings(wanted: Any, value: str) -> Iterable[Any]:
    """What a text may mean as a value of a type, the likeliest first; nothing where it is none."""
    origin: Any = get_origin(wanted)
    inner = get_args(wanted)
    if origin is Literal:
        yield from (choice for choice in inner if str(choice) == value)
    elif origin in (Union, types.UnionType):
        # a choice before what takes any text
        for part in sorted(inner, key=_takes_any):
            yield from _readings(part, value)
    elif origin is tuple and inner[1:] == (...,):
        items = [list(_readings(inner[0], part.strip())) for part in value.split(",") if part.strip()]
        if all(items):
            yield tuple(found[0] for found in items)
    elif wanted is type(None):
        if value.lower() == "none":
            yield None
    elif wanted is bool:
        if value.lower() in _WORDS:
            yield _WORDS[value.lower()]
    elif wanted in (int, float):
        try:
            yield wanted(value)
        except ValueError:
            return
    elif wanted is str:
        yield value


def _takes_any(wanted: Any) -> int:
    """How much a type takes: a choice the least, text the most."""
    origin: Any = get_origin(wanted)
    return 0 if origin is Literal else 2 if wanted is str else 1


def _describe(wanted: Any) -> str:
    """A type in the words of a reader."""
    origin: Any = get_origin(wanted)
    inner = get_args(wanted)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in inner)
    if origin is tuple:
        return f"{_describe(inner[0])}, parted by commas"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}
    return words.get(wanted, f"a {getattr(wanted, '__name__', wanted)}, which the command line cannot give")
