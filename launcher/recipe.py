"""The recipe: the user's definition of model, data and loss, built from the section `recipe` of the configuration.

    @dataclass(frozen=True)
    class MyRecipe:
        width: int = 64                                   # recipe.width=128
        def model(self) -> nn.Module: ...
        def dataset(self, split: str) -> Dataset: ...     # "train" or "val"; len() and [i]
        def loss(self, model, batch) -> Loss: ...         # sums, not means

A field that does not alter what is learned (where the data is, a cache, a log level) may change when a run is resumed:
`data: str = field(default="data", metadata={"learned": False})`.

Optional: `size(split)`, `tokens_per_sample`, `count(batch)`, `collate(items)`, `param_groups(model)`,
`synthetic(split)`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from operator import index
from typing import Any, Protocol, get_args, get_type_hints

from launcher.config.coercion import CoercionError, coerce
from launcher.config.keys import closest_match
from launcher.config.trusted_classes import load_class
from launcher.errors import UsageError
from launcher.plan.training_plan import DatasetSizes
from launcher.system.redaction import mask_nested_secrets

__all__ = ["Loss", "Recipe", "build_recipe", "check_map_style", "find_unlearned_defaults", "get_dataset_sizes"]

REQUIRED_METHODS = ("model", "dataset", "loss")
NON_FIELD_KEYS = ("_target_", "trust")


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch as sums, never means.

    `total` is a scalar tensor with a gradient. `count` is the number of items it sums over (samples or tokens).
    `metrics` maps a name to a sum, which is divided by the count over the whole validation set to give `val/<name>`.
    """

    total: Any
    count: Any
    metrics: Mapping[str, Any] = field(default_factory=dict)


class Recipe(Protocol):
    """The methods a recipe must have; its dataclass fields are its configuration."""

    def model(self) -> Any: ...

    def dataset(self, split: str) -> Any: ...

    def loss(self, model: Any, batch: Any) -> Loss: ...


def build_recipe(spec: Mapping[str, Any]) -> Any:
    """Build the recipe that `spec` describes: `_target_`, `trust`, and the fields of the class.

    Raises:
        UsageError: the target is missing, not trusted, does not import or is not a recipe; or a field is wrong.
    """
    target = spec.get("_target_")
    if not isinstance(target, str) or target in ("", "???"):
        raise UsageError("recipe._target_ is missing: type recipe._target_=my_module.MyRecipe recipe.trust=[my_module]")
    values = {name: value for name, value in spec.items() if name not in NON_FIELD_KEYS}
    for name, value in values.items():
        _refuse_targets(value, f"recipe.{name}")
    kind = load_class(target, spec.get("trust") or ())
    missing = [name for name in REQUIRED_METHODS if not callable(getattr(kind, name, None))]
    if not is_dataclass(kind) or missing:
        why = f"it has no {' and no '.join(missing)}" if missing else "it is not a dataclass"
        raise UsageError(
            f"recipe._target_={target} is not a recipe: {why}; "
            f"a recipe is a dataclass with {', '.join(REQUIRED_METHODS)}"
        )
    return kind(**_check_fields(kind, values))


def get_dataset_sizes(recipe: Any, opened: MutableMapping[str, Any] | None = None) -> DatasetSizes:
    """The dataset sizes of a recipe, from its `size(split)`, else by opening the data, which is kept in `opened`.

    Raises:
        UsageError: the data has no length, or the training data is empty.
    """
    sizes = DatasetSizes(
        _get_split_size(recipe, "train", opened),
        _get_split_size(recipe, "val", opened),
        getattr(recipe, "tokens_per_sample", None),
    )
    if sizes.train < 1:
        raise UsageError(f"the training data of {type(recipe).__name__} is empty: check the recipe's fields")
    return sizes


def find_unlearned_defaults(recipe: Any) -> dict[str, Any]:
    """The keys of the fields with `field(metadata={"learned": False})`, which do not alter what is learned.

    Each key has the default of its field, None if that is not plain text or a number, so that a value which a run did
    not set can be compared with one that another command sets.
    """
    unlearned = [item for item in fields(recipe) if item.metadata.get("learned") is False]
    plain = {item.name: item.default if isinstance(item.default, str | int | float) else None for item in unlearned}
    masked: dict[str, Any] = mask_nested_secrets({"recipe": plain})["recipe"]
    return {f"recipe.{name}": default for name, default in masked.items()}


def _get_split_size(recipe: Any, split: str, opened: MutableMapping[str, Any] | None) -> int:
    try:
        if callable(getattr(recipe, "size", None)):  # `size` may also be a field
            return _check_size(split, recipe.size(split))
        data = recipe.dataset(split)
    except OSError as problem:
        raise UsageError(
            f"the {split} data of {type(recipe).__name__} cannot be opened: {problem}: check the paths in its fields"
        ) from problem
    check_map_style(recipe, split, data)
    if opened is not None:
        opened[split] = data
    return len(data)


def _check_size(split: str, size: Any) -> int:
    try:
        number = index(size)
    except TypeError:
        number = -1
    if number < 0:
        raise UsageError(f"the recipe's size({split!r}) is {size!r}: return the number of samples of its dataset")
    return number


def check_map_style(recipe: Any, split: str, data: Any) -> None:
    """Check that a dataset has samples that can be counted and addressed by number; streams do not.

    Raises:
        UsageError: the dataset lacks `__len__` or `__getitem__`; the message says what to return instead.
    """
    lacking = [
        name for name, present in (("len()", _has_length(data)), ("[i]", _has_own_getitem(type(data)))) if not present
    ]
    if not lacking:
        return
    kind, recipe_name = type(data).__name__, type(recipe).__name__
    fix = "a dataset with __len__ and __getitem__: list(stream) if it fits into memory, or an index over its files"
    if kind == "DataLoader":
        fix = "the DataLoader's own dataset: batch.per_device makes the batches"
    raise UsageError(
        f"the {split} data of {recipe_name} is not a map-style dataset ({kind} has no {' and no '.join(lacking)}): "
        f"samples are read by number, so that any number of workers reads each of them once per epoch; a size() alone "
        f"is not enough: let dataset({split!r}) return {fix}"
    )


def _has_length(data: Any) -> bool:
    try:
        len(data)
    except (TypeError, NotImplementedError):  # torch's streams may have a `__len__` that raises
        return False
    return True


def _has_own_getitem(kind: type) -> bool:
    """Whether the class has `[i]`; torch's Dataset has one that only raises, which its streams inherit."""
    torch_data = sys.modules.get("torch.utils.data")
    getitem = getattr(kind, "__getitem__", None)
    return getitem is not None and getitem is not getattr(getattr(torch_data, "Dataset", None), "__getitem__", None)


def _refuse_targets(value: Any, key: str) -> None:
    """Refuse `_target_` inside a recipe's values, so that they cannot cause an import.

    Raises:
        UsageError: a value contains `_target_`.
    """
    if isinstance(value, Mapping):
        if "_target_" in value:
            raise UsageError(f"{key}._target_={value['_target_']} is refused: build it in the recipe's own code")
        for name, inner in value.items():
            _refuse_targets(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_targets(inner, key)


def _check_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values converted to the types of the fields; an unknown or missing field is an error."""
    parameters = {parameter.name: parameter for parameter in fields(kind) if parameter.init}
    for name in values:
        if name not in parameters:
            near = closest_match(name, parameters)
            hint = f"did you mean recipe.{near}? " if near else ""
            names = f"its fields are {', '.join(parameters)}" if parameters else "it has no fields"
            raise UsageError(f"recipe.{name} is not a field of {kind.__name__}: {hint}{names}")
    for name, parameter in parameters.items():
        if name not in values and parameter.default is MISSING and parameter.default_factory is MISSING:
            raise UsageError(f"recipe.{name} is missing: {kind.__name__} has no default for it: type recipe.{name}=...")
    hints = _get_hints(kind)
    return {name: _convert_field(f"recipe.{name}", value, hints.get(name, Any)) for name, value in values.items()}


def _get_hints(kind: type) -> Mapping[str, Any]:
    """The annotations; empty if one of them refers to a name that is imported under TYPE_CHECKING only."""
    try:
        return get_type_hints(kind)
    except NameError:
        return {}


def _convert_field(key: str, value: Any, hint: Any) -> Any:
    try:
        return coerce(value, hint, exact=True)
    except CoercionError:
        expected = str(hint).replace("typing.", "") if get_args(hint) else getattr(hint, "__name__", str(hint))
        raise UsageError(f"{key}={value} is a {type(value).__name__}: expected {expected}") from None
