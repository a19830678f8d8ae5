"""The types of settings, checked alike whether they come from Python, a recipe or a flag."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Range:
    """Bounds of a number; a lower one that is not `reached` is only approached."""

    low: float
    high: float = math.inf
    reached: bool = True

    def __contains__(self, value: float) -> bool:
        return (self.low <= value if self.reached else self.low < value) and value <= self.high

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"{self.low} to {self.high}"
        return f"{self.low} or more" if self.reached else f"more than {self.low}"


Count = Annotated[int, Range(1)]
Steps = Annotated[int, Range(0)]
Weight = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, reached=False)]


def hints_of(kind: type) -> dict[str, Any]:
    """The types of the fields of a dataclass, by name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def checked(name: str, value: Any, hint: Any) -> Any:
    """The value of a setting, if it is one of its type; lists become tuples, paths text.

    Nothing is guessed: "8" and 8.0 are no whole numbers, 1 is not True, text is no list; only
    "8,4,4" may stand for so many whole numbers.

    Raises:
        ValueError: it is not of the type, not finite or out of range; the message names it.
    """
    if typing.get_origin(hint) is Annotated:
        inner, *bounds = typing.get_args(hint)
        value = checked(name, value, inner)
        if any(value not in bound for bound in bounds if isinstance(bound, Range)):
            raise ValueError(f"{name}: got {value}, accepted is {bounds[0]}")
        return value
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise _refusal(name, value, hint)
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(name, value, hint)
    if origin is tuple:
        return _several(name, value, hint)
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    fits = type(value) is hint or (hint is float and type(value) is int)
    if hint in _NAMES and not fits:
        raise _refusal(name, value, hint)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, accepted is a finite number")
    return value


def from_text(name: str, text: str, hint: Any) -> Any:
    """The value of a flag.

    Raises:
        ValueError: the text stands for none of its type.
    """
    for kind in _plain(hint):
        if kind is type(None) and text.lower() == "none":
            return None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float):
            try:
                return checked(name, kind(text), hint)
            except ValueError:
                continue
        if typing.get_origin(kind) is tuple:
            first = typing.get_args(kind)[0]
            return checked(name, tuple(from_text(name, t, first) for t in text.split(",")), hint)
        if kind is str or typing.get_origin(kind) is Literal:
            return checked(name, text, hint)
    raise _refusal(name, text, hint)


def check_mapping(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Values of the fields of a dataclass, each checked; the names are known to be its fields."""
    hints = hints_of(kind)
    return {name: checked(name, value, hints[name]) for name, value in values.items()}


def accepted(hint: Any) -> str:
    """What a type takes, in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{accepted(inner[0])}, {inner[1]}"
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        some = [arg for arg in inner if arg is not type(None)]
        return " or ".join(["None", *map(accepted, some)] if len(some) < len(inner) else
                           map(accepted, some))  # fmt: skip
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"a list, each {accepted(inner[0])}"
        return f"{len(inner)} of {accepted(inner[0])}"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _plain(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is Annotated:
        return _plain(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        # Text last: it takes everything.
        kinds = [kind for arg in typing.get_args(hint) for kind in _plain(arg)]
        return tuple(sorted(kinds, key=lambda kind: kind is str))
    return (hint,)


def _one_of(name: str, value: Any, hint: Any) -> Any:
    inner = typing.get_args(hint)
    if value is None:
        if type(None) in inner:
            return None
        raise _refusal(name, value, hint)
    some = [arg for arg in inner if arg is not type(None)]
    for arg in some:
        try:
            return checked(name, value, arg)
        except ValueError:
            if len(some) == 1 and typing.get_origin(arg) is Annotated:
                raise  # it says the range
    raise _refusal(name, value, hint)


def _several(name: str, value: Any, hint: Any) -> tuple[Any, ...]:
    inner = typing.get_args(hint)
    if isinstance(value, str) and re.fullmatch(r"\d+(,\d+)+", value) and set(inner) == {int}:
        parts: Any = [int(part) for part in value.split(",")]
    elif isinstance(value, list | tuple):
        parts = value
    else:
        raise _refusal(name, value, hint)
    if inner[-1] is Ellipsis:
        inner = (inner[0],) * len(parts)
    if len(parts) != len(inner):
        raise _refusal(name, value, hint)
    return tuple(checked(name, v, arg) for v, arg in zip(parts, inner, strict=True))


def _refusal(name: str, value: Any, hint: Any) -> ValueError:
    verb = "are" if typing.get_origin(hint) is Literal else "is"
    return ValueError(f"{name}: got {value!r}, accepted {verb} {accepted(hint)}")
