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

from launcher.errors import RequestError
from launcher.settings import ALIASES, Run
from launcher.typed import MisfitError, choices, fit, sample, shown, words

__all__ = ["Key", "flat", "from_mapping", "keys", "nearest", "no_such_key", "to_mapping"]

#: Attribute -> name in the configuration.
NAMES = {attribute: name for name, attribute in ALIASES.items()}

#: Names used by other frameworks -> the key with that meaning here.
HABITS = {
    "batch_size": "batch.per_device",
    "bs": "batch.per_device",
    "data": "recipe.data",
    "device": "train.device",
    "epochs": "train.duration",
    "gpus": "launch.workers",
    "grad_accum": "batch.accumulation",
    "gradient_accumulation_steps": "batch.accumulation",
    "learning_rate": "lr.base",
    "lr": "lr.base",
    "max_epochs": "train.duration",
    "momentum": "optimizer.momentum",
    "name": "run.name",
    "nodes": "launch.nodes",
    "precision": "train.precision",
    "warmup": "schedule.warmup",
    "weight_decay": "optimizer.weight_decay",
    "workers": "launch.workers",
}
WORLD = frozenset({"world", "world_size", "nproc", "nproc_per_node", "num_processes", "num_gpus", "devices"})

EXAMPLES = {
    "batch.ramp": "[[0dur,0.25],[0.2dur,1]]",
    "checkpoint.best": "val/accuracy",
    "lr.base": "0.1",
    "lr.base_batch": "128",
    "plan.noise": "500",
    "plan.worlds": "[1,2,8]",
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
    kind: Any
    default: Any
    doc: str

    def example(self) -> str:
        if self.name in EXAMPLES:
            return f"{self.name}={EXAMPLES[self.name]}"
        if self.default not in (None, {}, ()):
            return f"{self.name}={shown(self.default)}"
        return f"{self.name}={sample(self.kind)}"


# --- names -----------------------------------------------------------------------------------------------------


@cache
def keys() -> Mapping[str, Key]:
    """Every key by its dotted name, in the order of `RunConfig`."""
    return {key.name: key for key in _walk(Run, "")}


def _walk(kind: type, prefix: str) -> Iterator[Key]:
    for field, annotation in _parts(kind):
        name = prefix + _name(field)
        if is_dataclass(annotation):
            yield from _walk(annotation, name + ".")  # type: ignore[arg-type]
        else:
            yield Key(name, annotation, _default(field), field.metadata["doc"])


@cache
def _parts(kind: type) -> tuple[tuple[Field[Any], Any], ...]:
    hints = get_type_hints(kind)
    return tuple((field, hints[field.name]) for field in fields(kind))


def _name(field: Field[Any]) -> str:
    return NAMES.get(field.name, field.name)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The closest match to `word`, or None."""
    found = get_close_matches(word, list(words), n=1, cutoff=0.6)
    return found[0] if found else None


def no_such_key(name: str) -> RequestError:
    """The error for an unknown key, with the closest known key or a pointer to the list of all keys."""
    last = name.rpartition(".")[2]
    if last in WORLD:
        return RequestError(
            f"{name} is not a key: the world size comes from the job: launch.workers=2, or torchrun --nproc-per-node=2"
        )
    within = [key for key in keys() if key.startswith(name + ".")]
    if within:
        return RequestError(
            f"{name} is a section, not a key: type {HABITS.get(name, within[0])}= or one of its {len(within)} keys"
        )
    same_end = [key for key in keys() if key.rpartition(".")[2] == last]
    meant = HABITS.get(last) if "." not in name else None
    meant = meant or (same_end[0] if len(same_end) == 1 else nearest(name, keys()))
    return RequestError(
        f"{name} is not a key: " + (f"did you mean {meant}?" if meant else "launcher --help lists them all")
    )


# --- from plain values --------------------------------------------------------------------------------------------


def from_mapping(mapping: Mapping[str, Any]) -> Run:
    """Build the frozen `RunConfig` from nested plain values; missing keys take their defaults.

    Raises:
        UsageError: a key is unknown or a value does not fit its key.
    """
    run: Run = _build(Run, mapping, "")
    return run


def _build(kind: Any, mapping: Any, prefix: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise RequestError(f"{prefix[:-1]}={shown(mapping)}: expected a mapping of keys, e.g. {_first(prefix)}")
    parts = {_name(field): (field.name, annotation) for field, annotation in _parts(kind)}
    for name in mapping:
        if name not in parts:
            raise no_such_key(f"{prefix}{name}")
    return kind(**{parts[name][0]: _value(parts[name][1], value, prefix + name) for name, value in mapping.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    if is_dataclass(kind):
        return _build(kind, value, name + ".")
    try:
        return fit(value, kind)
    except MisfitError as misfit:
        where = f"{name}.{misfit.where}" if misfit.where else name
        raise RequestError(f"{where}={shown(misfit.value)}: expected {_expected(name, kind, misfit)}") from None


def _first(prefix: str) -> str:
    return next(key.example() for name, key in keys().items() if name.startswith(prefix))


def _expected(name: str, kind: Any, misfit: MisfitError) -> str:
    if misfit.expected:
        return misfit.expected
    if words(kind).startswith("text") and isinstance(misfit.value, bool | float):
        return f"""text, in quotes: "{name}='{shown(misfit.value)}'\""""
    expected = f"{words(kind)}, e.g. {keys()[name].example()}"
    named = [choice for choice in choices(kind) if isinstance(choice, str)]
    meant = nearest(misfit.value, named) if isinstance(misfit.value, str) else None
    return f"{words(kind)}: did you mean {name}={meant}?" if meant else expected


# --- to plain values ----------------------------------------------------------------------------------------------


def to_mapping(run: Run) -> dict[str, Any]:
    """The configuration as nested JSON values; `from_mapping(to_mapping(config)) == config`."""
    mapping: dict[str, Any] = _plain_of(run)
    return mapping


def _plain_of(value: Any) -> Any:
    if is_dataclass(value):
        return {_name(field): _plain_of(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain_of(item) for name, item in value.items()}
    return [_plain_of(item) for item in value] if isinstance(value, list | tuple) else value


def flat(run: Run) -> dict[str, Any]:
    """Every value by its dotted name, e.g. `batch.global` or `optimizer.momentum`; used to compare two runs."""
    return dict(_leaves(to_mapping(run), ""))


def _leaves(mapping: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
