"""The recipe: what to train on what, written by a person in twenty lines. Which classes may be named is decided here.

    @dataclass(frozen=True)
    class MyRecipe:
        width: int = 64                                   # recipe.width=128
        def model(self) -> nn.Module: ...
        def dataset(self, split: str) -> Dataset: ...     # "train" or "val"; len() and [i]
        def loss(self, model, batch) -> Loss: ...         # sums, not means

Optional: `size(split)`, `tokens_per_sample`, `count(batch)`, `collate(items)`, `synthetic(split)`.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from launcher.errors import RequestError
from launcher.study import Sizes

__all__ = ["Loss", "Recipe", "build", "load_class", "sizes"]

#: Classes defined under these are trusted without being named.
TRUSTED = ("launcher.recipes", "torch")
METHODS = ("model", "dataset", "loss")


@dataclass(frozen=True)
class Loss:
    """What a micro-batch's loss adds up to: sums, never means.

    `total` is a scalar tensor with a gradient, `count` what it is a sum over (samples, or tokens), `metrics` maps a
    name to a sum that is divided by the count over the whole validation set to give `val/<name>`.
    """

    total: Any
    count: Any
    metrics: Mapping[str, Any] = field(default_factory=dict)


class Recipe(Protocol):
    """What a recipe must have; its dataclass fields are its configuration."""

    def model(self) -> Any: ...

    def dataset(self, split: str) -> Any: ...

    def loss(self, model: Any, batch: Any) -> Loss: ...


def build(spec: Mapping[str, Any]) -> Any:
    """The recipe that `spec` describes: `_target_`, `trust`, and the fields of the class.

    Raises:
        RequestError: the target is missing, not trusted, does not import or is no recipe; or a field is wrong.
    """
    target = spec.get("_target_")
    if not isinstance(target, str) or not target:
        raise RequestError(
            "recipe._target_ is missing: type recipe._target_=my_module.MyRecipe recipe.trust=[my_module]"
        )
    values = {name: value for name, value in spec.items() if name not in ("_target_", "trust")}
    for name, value in values.items():
        refuse_targets(value, f"recipe.{name}")
    kind = load_class(target, tuple(spec.get("trust") or ()))
    lacking = [name for name in METHODS if not callable(getattr(kind, name, None))]
    if not is_dataclass(kind) or lacking:
        why = f"it has no {' and no '.join(lacking)}" if lacking else "it is no dataclass"
        raise RequestError(
            f"recipe._target_={target} is no recipe: {why}; a recipe is a dataclass with {', '.join(METHODS)}"
        )
    return kind(**checked_fields(kind, values))


def refuse_targets(value: Any, key: str) -> None:
    """A value inside a recipe names no class: only what the recipe's own code imports is run."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            raise RequestError(f"{key}._target_={value['_target_']} is refused: build it in the recipe's own code")
        for name, inner in value.items():
            refuse_targets(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_targets(inner, key)


def load_class(target: str, trust: Sequence[str]) -> type:
    """The class of a dotted path, if it is trusted; nothing that is not is imported.

    Raises:
        RequestError: not trusted, does not import, or is no class.
    """
    module, _, name = target.rpartition(".")
    if not module:
        raise RequestError(f"_target_={target} has no module: type my_module.{target}")
    by_name = any(covers(entry, target) for entry in trust)
    shipped = any(covers(entry, target) for entry in TRUSTED)
    if not by_name and not shipped:
        raise RequestError(f"_target_={target} is not trusted: add recipe.trust=[{module}] if the code is yours")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as problem:
        raise RequestError(f"_target_={target}: {module} does not import: {one_line(problem)}") from problem
    except Exception as problem:
        kind = type(problem).__name__
        raise RequestError(f"_target_={target}: {module} fails on import: {kind}: {one_line(problem)}") from problem
    if not inspect.isclass(found):
        known = [n for n, v in vars(importlib.import_module(module)).items() if inspect.isclass(v)]
        near = get_close_matches(name, known, 1)
        mend = f"did you mean {near[0]}?" if near else f"name a class of {module}"
        raise RequestError(f"_target_={target} is no class: {mend}")
    if not by_name and not any(covers(entry, found.__module__) for entry in TRUSTED):
        raise RequestError(
            f"_target_={target} is only imported there: type _target_={found.__module__}.{found.__name__}"
        )
    return found


def covers(entry: str, path: str) -> bool:
    """Dot by dot: `my` covers `my.recipe`, not `my_evil`."""
    return path == entry or path.startswith(f"{entry}.")


def one_line(problem: BaseException) -> str:
    return " ".join(str(problem).split())


def checked_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    known = {f.name: f for f in fields(kind) if f.init}
    hints = get_type_hints(kind)
    for name in values:
        if name not in known:
            near = get_close_matches(name, known, 1)
            mend = f"did you mean recipe.{near[0]}?" if near else f"it has {', '.join(known) or 'no fields'}"
            raise RequestError(f"recipe.{name} is no field of {kind.__name__}: {mend}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise RequestError(f"recipe.{name} is missing: {kind.__name__} has no default for it")
    return {name: typed(f"recipe.{name}", value, hints[name]) for name, value in values.items()}


def typed(key: str, value: Any, hint: Any) -> Any:
    """The value as the field's annotation wants it: an int where a float is asked for, a list for a tuple.

    Raises:
        RequestError: it is of another type.
    """
    fit = fitted(value, hint)
    if fit is NO_FIT:
        wanted = getattr(hint, "__name__", None) if not get_args(hint) else None
        raise RequestError(
            f"{key}={value} is a {type(value).__name__}: expected {wanted or str(hint).replace('typing.', '')}"
        )
    return fit


NO_FIT = object()


def fitted(value: Any, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return next((fit for fit in (fitted(value, arm) for arm in args) if fit is not NO_FIT), NO_FIT)
    if origin is Literal:
        return value if value in args else NO_FIT
    if origin in (tuple, list) or hint in (tuple, list):
        return fitted_sequence(value, origin or hint, args)
    if hint is None or hint is type(None):
        return None if value is None else NO_FIT
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and hint is not bool:
        return NO_FIT
    return value if not isinstance(hint, type) or isinstance(value, hint) else NO_FIT


def fitted_sequence(value: Any, kind: type, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple):
        return NO_FIT
    inner = [a for a in args if a is not Ellipsis]
    hints = inner if len(inner) == len(value) and len(inner) > 1 else [inner[0] if inner else Any] * len(value)
    if len(inner) > 1 and len(inner) != len(value):
        return NO_FIT
    items = [fitted(item, hint) for item, hint in zip(value, hints, strict=True)]
    return NO_FIT if NO_FIT in items else kind(items)


def sizes(recipe: Any) -> Sizes:
    """How much data a recipe has: from its `size(split)`, else by opening the data.

    Raises:
        RequestError: there is nothing to train on.
    """
    length = getattr(recipe, "size", None) or (lambda split: len(recipe.dataset(split)))
    found = Sizes(int(length("train")), int(length("val")), getattr(recipe, "tokens_per_sample", None))
    if found.train < 1:
        raise RequestError(f"the training data of {type(recipe).__name__} is empty: check the recipe's fields")
    return found
