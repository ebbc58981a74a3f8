"""Convert plain values to annotated types, without any lossy conversion."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["MisfitError", "choices", "fit", "sample", "shown", "words"]


class MisfitError(Exception):
    """`value` does not match the annotation; `where` is its path inside the key."""

    def __init__(self, value: Any, expected: str | None = None, where: str = "") -> None:
        super().__init__(value)
        self.value, self.expected, self.where = value, expected, where


def fit(value: Any, kind: Any) -> Any:
    """Convert `value` to `kind` losslessly; raises if that is not possible."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _fit_any(value, inner)
    if origin is Literal:
        return _check(value, any(value == choice and type(value) is type(choice) for choice in inner))
    if origin is tuple:
        return _fit_tuple(value, inner)
    if origin is not None and issubclass(origin, Mapping):
        return _fit_mapping(value, inner[1])
    return SCALARS[kind](value)


def _fit_any(value: Any, kinds: tuple[Any, ...]) -> Any:
    for kind in kinds:
        with suppress(MisfitError):
            return fit(value, kind)
    raise MisfitError(value)


def _fit_tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    _check(value, isinstance(value, list | tuple))
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    _check(value, len(kinds) == len(value))
    return tuple(fit(item, kind) for item, kind in zip(value, kinds, strict=True))


def _fit_mapping(value: Any, kind: Any) -> dict[str, Any]:
    _check(value, isinstance(value, Mapping))
    return {
        str(_check(name, isinstance(name, str | int))): _fit_under(name, item, kind) for name, item in value.items()
    }


def _fit_under(name: Any, value: Any, kind: Any) -> Any:
    try:
        return fit(value, kind)
    except MisfitError as misfit:
        where = f"{name}.{misfit.where}" if misfit.where else f"{name}"
        raise MisfitError(misfit.value, misfit.expected or words(kind), where) from None


def _check(value: Any, holds: bool) -> Any:
    if not holds:
        raise MisfitError(value)
    return value


def _whole(value: Any) -> int:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
    return int(_check(value, whole))


def _number(value: Any) -> float:
    return float(_check(value, isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)))


def _text(value: Any) -> str:
    """Accept text and integers, which print as they were typed (run.name=2024); floats and booleans may not."""
    return str(_check(value, isinstance(value, str | int) and not isinstance(value, bool)))


def _plain(value: Any) -> Any:
    """Any JSON value, for keys that belong to torch, the recipe or a sink. Lists stay lists."""
    if isinstance(value, Mapping):
        return _fit_mapping(value, Any)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | bool | int | float) else _refuse_plain(value)


def _refuse_plain(value: Any) -> Any:
    raise MisfitError(value, f"text, a number, true, false, null, a list or a mapping, not {type(value).__name__}")


SCALARS: Mapping[Any, Any] = {
    Any: _plain,
    bool: lambda value: _check(value, isinstance(value, bool)),
    int: _whole,
    float: _number,
    str: _text,
    type(None): lambda value: _check(value, value is None),
}

WORDS = {
    Any: "a value",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}
SAMPLES = {Any: "1", bool: "true", int: "4", float: "0.5", str: "text", type(None): "null"}


def words(kind: Any) -> str:
    """Describe an annotation in words: `a whole number or full or null`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(words(part) for part in inner)
    if origin is Literal:
        return inner[0] if len(inner) == 1 else f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        parts = [words(part) for part in inner if part is not Ellipsis]
        return f"a list of {parts[0]}" if inner[-1] is Ellipsis else f"[{', '.join(parts)}]"
    return WORDS.get(kind, "a mapping {name: value}")


def sample(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return sample(inner[0])
    if origin is tuple:
        return f"[{','.join(sample(part) for part in inner if part is not Ellipsis)}]"
    return str(inner[0]) if origin is Literal else SAMPLES.get(kind, "{name: value}")


def choices(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(choice for part in get_args(kind) for choice in choices(part))


def shown(value: Any) -> str:
    """Format a value as it is typed on the command line; long text is truncated."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{shown(item)}" for name, item in value.items()) + "}"
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
