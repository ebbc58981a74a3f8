"""Convert plain values to annotated types, without any lossy conversion: the one coercion of keys and recipe fields.

Configuration keys accept what a user types for them: a whole number as text (`run.name=2024`) and `1e2` as 100. With
`exact`, as for a recipe's fields, a value must have its annotated type; only int becomes float, and a list a tuple.

pydantic is not used: in neither mode does it follow these rules (by default true is a whole number and 'yes' is true;
strictly, a YAML list is not a tuple and 1e2 is not 100), and it would add 0.13 s to the start of every command.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["CoercionError", "accepts_list", "coerce", "describe_type", "example_value", "format_value", "list_choices"]


_LARGEST = sys.float_info.max


class CoercionError(Exception):
    """`value` does not match the annotation; `where` is its path inside the key."""

    def __init__(self, value: Any, expected: str | None = None, where: str = "") -> None:
        super().__init__(value)
        self.value, self.expected, self.where = value, expected, where


def coerce(value: Any, kind: Any, *, exact: bool = False) -> Any:
    """Convert `value` to the annotation `kind` losslessly.

    Raises:
        CoercionError: the value does not match, or, with `exact`, has another type.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _coerce_to_any(value, inner, exact)
    if origin is Literal:  # True == 1 and 18.0 == 18, but the type must match too
        return _check_holds(value, any(value == choice and type(value) is type(choice) for choice in inner))
    if (origin or kind) in (tuple, list):
        return (origin or kind)(_coerce_items(value, origin or kind, inner, exact))
    if exact:
        return _coerce_exactly(value, origin or kind)
    if origin is not None and issubclass(origin, Mapping):
        return _coerce_mapping(value, inner[1])
    return SCALAR_COERCIONS[kind](value)


def _coerce_to_any(value: Any, kinds: tuple[Any, ...], exact: bool) -> Any:
    """The conversion that keeps the value's type, otherwise the first that succeeds."""
    results = []
    for kind in kinds:
        with suppress(CoercionError):
            results.append(coerce(value, kind, exact=exact))
    if not results:
        raise CoercionError(value)
    return next((result for result in results if type(result) is type(value)), results[0])


def _coerce_items(value: Any, kind: type, inner: tuple[Any, ...], exact: bool) -> list[Any]:
    _check_holds(value, isinstance(value, list | tuple))
    if kind is list or not inner or inner[-1] is Ellipsis:
        inner = (inner[0] if inner else Any,) * len(value)
    _check_holds(value, len(inner) == len(value))
    return [coerce(item, item_kind, exact=exact) for item, item_kind in zip(value, inner, strict=True)]


def _coerce_exactly(value: Any, kind: Any) -> Any:
    """The value if it is a `kind`, and int as float; any value if the annotation cannot be checked."""
    if kind is float and type(value) is int:
        return float(value)
    if kind is Any or not isinstance(kind, type):
        return value
    return _check_holds(value, isinstance(value, kind) and not (isinstance(value, bool) and kind is int))


def _coerce_mapping(value: Any, kind: Any) -> dict[str, Any]:
    _check_holds(value, isinstance(value, Mapping))
    return {
        str(_check_holds(name, isinstance(name, str | int))): _coerce_item(name, item, kind)
        for name, item in value.items()
    }


def _coerce_item(name: Any, value: Any, kind: Any) -> Any:
    try:
        return coerce(value, kind)
    except CoercionError as error:
        where = f"{name}.{error.where}" if error.where else f"{name}"
        raise CoercionError(error.value, error.expected or describe_type(kind), where) from None


def _check_holds(value: Any, holds: bool) -> Any:
    if not holds:
        raise CoercionError(value)
    return value


def _coerce_integer(value: Any) -> int:
    is_whole = (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and value.is_integer()
    )
    return int(_check_holds(value, is_whole))


def _coerce_number(value: Any) -> float:
    _check_holds(value, isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST)
    return float(value)


def _coerce_text(value: Any) -> str:
    """Accept text and integers, which print as they were typed (run.name=2024); floats and booleans may not."""
    return str(_check_holds(value, isinstance(value, str | int) and not isinstance(value, bool)))


def _coerce_plain(value: Any) -> Any:
    """Any JSON value, for keys that belong to torch, the recipe or a sink. Lists stay lists."""
    if isinstance(value, Mapping):
        return _coerce_mapping(value, Any)
    if isinstance(value, list | tuple):
        return [_coerce_plain(item) for item in value]
    return value if value is None or isinstance(value, str | bool | int | float) else _refuse_plain(value)


def _refuse_plain(value: Any) -> Any:
    raise CoercionError(value, f"text, a number, true, false, null, a list or a mapping, not {type(value).__name__}")


SCALAR_COERCIONS: Mapping[Any, Any] = {
    Any: _coerce_plain,
    bool: lambda value: _check_holds(value, isinstance(value, bool)),
    int: _coerce_integer,
    float: _coerce_number,
    str: _coerce_text,
    type(None): lambda value: _check_holds(value, value is None),
}

TYPE_DESCRIPTIONS = {
    Any: "a value",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}
EXAMPLE_BY_TYPE = {Any: "1", bool: "true", int: "4", float: "0.5", str: "text", type(None): "null"}


def describe_type(kind: Any) -> str:
    """Describe an annotation in words: `a whole number or full or null`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(part) for part in inner)
    if origin is Literal:
        return inner[0] if len(inner) == 1 else f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        parts = [describe_type(part) for part in inner if part is not Ellipsis]
        return f"a list of {parts[0]}" if inner[-1] is Ellipsis else f"[{', '.join(parts)}]"
    return TYPE_DESCRIPTIONS.get(kind, "a mapping {name: value}")


def accepts_list(kind: Any) -> bool:
    """Whether a list is a possible value of the annotation."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(accepts_list(part) for part in get_args(kind))
    return kind is Any or (origin or kind) in (tuple, list)


def example_value(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return example_value(inner[0])
    if origin is tuple:
        return f"[{','.join(example_value(part) for part in inner if part is not Ellipsis)}]"
    return str(inner[0]) if origin is Literal else EXAMPLE_BY_TYPE.get(kind, "{name: value}")


def list_choices(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(choice for part in get_args(kind) for choice in list_choices(part))


def format_value(value: Any) -> str:
    """Format a value as it is typed on the command line; long text is truncated."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{format_value(item)}" for name, item in value.items()) + "}"
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
