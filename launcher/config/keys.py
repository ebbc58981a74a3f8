"""The configuration keys: their names and types, and conversion between plain values and a `RunConfig`.

A key's name is dotted, as users type it: `batch.global`. Types, defaults and documentation come from the
configuration classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, get_type_hints

from launcher.config.coercion import CoercionError, coerce, describe_type, example_value, format_value, list_choices
from launcher.config.misnames import WORLD_SIZE_NAMES, find_by_other_name
from launcher.config.schema import ALIASES, RunConfig
from launcher.errors import UsageError

__all__ = ["Key", "closest_match", "config_keys", "flatten", "from_mapping", "to_mapping", "unknown_key_error"]

#: Attribute -> name in the configuration.
NAME_BY_ATTRIBUTE = {attribute: name for name, attribute in ALIASES.items()}

EXAMPLE_BY_KEY = {
    "batch.ramp": "[[0dur,0.25],[0.2dur,1]]",
    "checkpoint.best": "val/accuracy",
    "lr.base": "0.1",
    "lr.base_batch": "128",
    "plan.noise": "500",
    "plan.world_sizes": "[1,2,8]",
    "run.dir": "runs/first",
    "run.name": "first",
    "schedule.every": "1ep",
    "schedule.milestones": "[0.5dur,0.75dur]",
    "schedule.momentum": "[0.85,0.95]",
    "train.target.metric": "val/accuracy",
    "tune.budget_s": "120",
    "tune.max": "256",
    "tune.out": "tuned",
    "tune.sizes": "[20,45]",
}


@dataclass(frozen=True)
class Key:
    """One configuration key: its dotted name, type annotation, default and one line of documentation."""

    name: str
    type: Any
    default: Any
    doc: str

    def format_example(self) -> str:
        if self.name in EXAMPLE_BY_KEY:
            return f"{self.name}={EXAMPLE_BY_KEY[self.name]}"
        if self.default not in (None, {}, ()):
            return f"{self.name}={format_value(self.default)}"
        return f"{self.name}={example_value(self.type)}"


# --- names -----------------------------------------------------------------------------------------------------


@cache
def config_keys() -> Mapping[str, Key]:
    """Every key by its dotted name, in the order of `RunConfig`."""
    return {key.name: key for key in _iter_keys(RunConfig, "")}


def _iter_keys(kind: type, prefix: str) -> Iterator[Key]:
    for field, annotation in _get_fields(kind):
        name = prefix + _get_key_name(field)
        if is_dataclass(annotation):
            yield from _iter_keys(annotation, name + ".")  # type: ignore[arg-type]
        else:
            yield Key(name, annotation, _get_default(field), field.metadata["doc"])


@cache
def _get_fields(kind: type) -> tuple[tuple[Field[Any], Any], ...]:
    hints = get_type_hints(kind)
    return tuple((field, hints[field.name]) for field in fields(kind))


def _get_key_name(field: Field[Any]) -> str:
    return NAME_BY_ATTRIBUTE.get(field.name, field.name)


def _get_default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def closest_match(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that is closest to `name`, or None."""
    matches = get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_key_error(name: str, value: object = None) -> UsageError:
    """The error for an unknown key, with what to type instead if that is known. `value`: as typed."""
    last = name.rpartition(".")[2]
    if last in WORLD_SIZE_NAMES:
        return UsageError(
            f"{name} is not a key: the world size comes from the job: launch.workers=2, or torchrun --nproc-per-node=2"
        )
    other_name = find_by_other_name(name, value)
    within = [key for key in config_keys() if key.startswith(name + ".")]
    if within:
        usual = other_name if other_name and "=" in other_name else f"{other_name or within[0]}="
        return UsageError(f"{name} is a section, not a key: type {usual} or one of its {len(within)} keys")
    same_end = [key for key in config_keys() if key.rpartition(".")[2] == last]
    match = other_name or (same_end[0] if len(same_end) == 1 else closest_match(name, config_keys()))
    return UsageError(f"{name} is not a key: {_suggest(match)}")


def _suggest(setting: str | None) -> str:
    if setting is None:
        return "launcher --help lists them all"
    key, _, value = setting.partition("=")
    return f"did you mean {key}? Type {setting}" if value and key in config_keys() else f"did you mean {setting}?"


# --- from plain values --------------------------------------------------------------------------------------------


def from_mapping(mapping: Mapping[str, Any]) -> RunConfig:
    """Build the frozen `RunConfig` from nested plain values; missing keys take their defaults.

    Raises:
        UsageError: a key is unknown or a value does not fit its key.
    """
    config: RunConfig = _build(RunConfig, mapping, "")
    return config


def _build(kind: Any, mapping: Any, prefix: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise UsageError(
            f"{prefix[:-1]}={format_value(mapping)}: expected a mapping of keys, e.g. {_find_first_example(prefix)}"
        )
    parts = {_get_key_name(field): (field.name, annotation) for field, annotation in _get_fields(kind)}
    for name in mapping:
        if name not in parts:
            raise unknown_key_error(f"{prefix}{name}", mapping[name])
    return kind(
        **{parts[name][0]: _build_value(parts[name][1], value, prefix + name) for name, value in mapping.items()}
    )


def _build_value(kind: Any, value: Any, name: str) -> Any:
    if is_dataclass(kind):
        return _build(kind, value, name + ".")
    try:
        return coerce(value, kind)
    except CoercionError as error:
        where = f"{name}.{error.where}" if error.where else name
        raise UsageError(
            f"{where}={format_value(error.value)}: expected {_describe_expected(name, kind, error)}"
        ) from None


def _find_first_example(prefix: str) -> str:
    return next(key.format_example() for name, key in config_keys().items() if name.startswith(prefix))


def _describe_expected(name: str, kind: Any, error: CoercionError) -> str:
    if error.expected:
        return error.expected
    if describe_type(kind).startswith("text") and isinstance(error.value, bool | float):
        return f"""text, in quotes: "{name}='{format_value(error.value)}'\""""
    expected = f"{describe_type(kind)}, e.g. {config_keys()[name].format_example()}"
    named = [choice for choice in list_choices(kind) if isinstance(choice, str)]
    match = closest_match(error.value, named) if isinstance(error.value, str) else None
    return f"{describe_type(kind)}: did you mean {name}={match}?" if match else expected


# --- to plain values ----------------------------------------------------------------------------------------------


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested JSON values; `from_mapping(to_mapping(config)) == config`."""
    mapping: dict[str, Any] = _convert_to_plain(config)
    return mapping


def _convert_to_plain(value: Any) -> Any:
    if is_dataclass(value):
        return {_get_key_name(field): _convert_to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: _convert_to_plain(item) for name, item in value.items()}
    return [_convert_to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every value by its dotted name, e.g. `batch.global` or `optimizer.momentum`; used to compare two runs."""
    return dict(_iter_leaves(to_mapping(config), ""))


def _iter_leaves(mapping: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _iter_leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
