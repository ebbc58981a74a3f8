"""Hydra's override grammar: parsing the overrides of the command line, and refusing wrong ones by name.

Values are checked after composition, in `launcher.config.validation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override
from omegaconf import DictConfig

from launcher.config.coercion import accepts_list, format_value
from launcher.config.hydra_errors import unknown_choice_message
from launcher.config.keys import config_keys, unknown_key_error
from launcher.config.search_space import SearchAxis
from launcher.errors import UsageError

__all__ = [
    "RUN_DIR_KEYS",
    "check_key",
    "get_typed_value",
    "parse_axis",
    "parse_overrides",
    "refuse_outside_sweeps",
    "refuse_unsweepable_keys",
    "with_force_add",
]

#: The keys that set the folder of a run or of a whole sweep.
RUN_DIR_KEYS = ("run.name", "run.dir")
BUILTIN_GROUPS = ("strategy", "batch", "optimizer", "schedule", "launch", "sink", "recipe", "experiment")
SINGLE_CHOICE_GROUPS = ("strategy", "batch", "optimizer", "schedule", "launch", "recipe")
#: Sections with free keys: the recipe's fields, the optimizer's arguments, a sink's options, environment variables.
FREE_FORM_GROUPS = ("recipe.", "optimizer.", "sink.", "launch.env.")
#: Keys whose text may contain a comma.
ANY_TEXT_KEYS = frozenset(
    {"checkpoint.dir", "launch.constraint", "launch.partition", "model.init", "resume", "strategy.config", "tune.out"}
)


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not name or not (equals or name.startswith("~")):
            raise UsageError(
                f"{override or repr('')} is not an override: type the command first, then KEY=VALUE, e.g. seed=1"
            )
    return list(parser.parse_overrides(list(overrides)))


def with_force_add(overrides: Sequence[str]) -> list[str]:
    """Prefix overrides of free-form keys with ++, so that the user need not type a +.

    These are launch.env, which is empty, and the fields of a custom recipe (recipe=own), which no YAML lists; they
    are checked when the recipe is built.
    """
    chosen = [override for override in overrides if override.startswith("recipe=")]
    own = ("recipe.",) if chosen[-1:] == ["recipe=own"] else ()
    free = ("launch.env.", "launch.env=", *own)
    return [f"++{override}" if override.startswith(free) else override for override in overrides]


def refuse_outside_sweeps(override: Override, read_value: Callable[[str], Any] = lambda _: None) -> None:
    """Refuse a sweep, and Hydra's own keys, on a single run.

    `read_value`: returns the composed value of a free-form key, None if there is none.
    """
    line, name = str(override.input_line), override.key_or_group
    if override.is_sweep_override():
        raise UsageError(f"{line} is a sweep: {_suggest_for_sweep(override, read_value)}")
    if override.is_hydra_override() and name != "hydra.searchpath":
        raise UsageError(f"{line} has no effect on a single run: add -m, or set the run directory with run.dir=")


def _suggest_for_sweep(override: Override, read_value: Callable[[str], Any]) -> str:
    """What to type instead of a sweep: -m, a list where the key takes one, or quotes where it takes any text."""
    name, typed = override.key_or_group, get_typed_value(override)
    if name in RUN_DIR_KEYS:
        return f"a run has one folder: type {name}= with one value"
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return "add -m and sweep.trials=20 to search it"
    suggestion = "add -m for one run per value"
    if not isinstance(sweep, ChoiceSweep) or not sweep.simple_form:  # range(), interval(), choice(), ...
        return suggestion
    if _takes_list(name, read_value):
        return f"{suggestion}, or type {name}=[{typed}] for a list"
    if _takes_any_text(name, read_value):
        return f"""{suggestion}, or quote it if the comma is part of the text: "{name}='{typed}'\""""
    return suggestion


def _takes_list(name: str, read_value: Callable[[str], Any]) -> bool:
    if name == "sink":
        return True
    if name in config_keys():
        return accepts_list(config_keys()[name].type)
    if name.startswith("launch.env.") or name.endswith("._target_"):
        return False
    value = read_value(name)  # a free-form key has no type; None may become a list
    return name.startswith(FREE_FORM_GROUPS) and not isinstance(value, str | int | float)


def _takes_any_text(name: str, read_value: Callable[[str], Any]) -> bool:
    is_free_form = name.startswith(FREE_FORM_GROUPS) and not name.endswith("._target_")
    return (
        name in ANY_TEXT_KEYS or name.startswith("launch.env.") or (is_free_form and isinstance(read_value(name), str))
    )


def check_key(override: Override, groups: Mapping[str, Sequence[str]]) -> None:
    """Refuse an unknown key with the closest known one as a hint; values are checked after composition."""
    name = override.key_or_group
    if override.input_line == "hydra/sweeper=optuna":
        raise UsageError("hydra/sweeper=optuna: Optuna is enabled by a key: type sweep.trials=20 instead")
    if name in groups:
        _check_choice(override, groups[name])
    elif name == "optimizer.lr":
        raise UsageError(
            f"{override.input_line}: the learning rate is set by lr.base and the schedule: "
            f"type lr.base={get_typed_value(override)}"
        )
    elif "/" not in name and not override.is_hydra_override() and not name.startswith(FREE_FORM_GROUPS):
        _check_settings_key(override)


def _check_choice(override: Override, options: Sequence[str]) -> None:
    name, value = override.key_or_group, override.value()
    if override.is_add() and name in BUILTIN_GROUPS:
        raise UsageError(f"{override.input_line}: {name} exists already: type it without +")
    if override.is_delete() or override.is_sweep_override() or isinstance(value, Mapping):
        return
    if isinstance(value, list) and len(value) != 1 and name in SINGLE_CHOICE_GROUPS:
        one = ",".join(map(format_value, value)) or "NAME"
        raise UsageError(
            f"{override.input_line}: {name} takes one choice, not a list: type -m {name}={one} for one run per choice"
        )
    for choice in value if isinstance(value, list) else [value]:
        if not isinstance(choice, str) or (choice not in options and "/" not in choice):
            raise UsageError(unknown_choice_message(name, format_value(choice), options))


def _check_settings_key(override: Override) -> None:
    name = override.key_or_group
    if name not in config_keys():
        raise unknown_key_error(name, get_typed_value(override))
    if override.is_delete():
        raise UsageError(f"{override.input_line}: {name} can't be removed: type {config_keys()[name].format_example()}")
    if override.is_add() and not override.is_force_add():
        raise UsageError(f"{override.input_line}: {name} exists already: type it without +")


def get_typed_value(override: Override) -> str:
    """The override's value as it was typed."""
    return str(override.input_line).partition("=")[2]


def parse_axis(override: Override) -> SearchAxis:
    """The search axis of `lr.base=interval(0.01,1)`, `tag(log,interval(…))`, `range(…)` or `a,b`.

    Raises:
        UsageError: the bounds are not ascending, or not above 0 under tag(log,...).
    """
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start or 0, value.end or 0, "log" in value.tags
        if not low < high or (log and low <= 0):
            raise UsageError(f"{override.input_line}: type the lower bound first; with tag(log,...) it must be above 0")
        return SearchAxis(key, low=low, high=high, whole=isinstance(low, int) and isinstance(high, int), log=log)
    return SearchAxis(key, choices=tuple(override.sweep_string_iterator()))


def refuse_unsweepable_keys(parsed: Sequence[Override], config: DictConfig) -> None:
    """Refuse sweeps over the folder or name, and Hydra's folder keys: points are numbered in the sweep's folder."""
    params = config.hydra.sweeper.get("params") or {}
    swept = [o.key_or_group for o in parsed if o.is_sweep_override()] + [str(name) for name in params]
    for name in swept:
        if name in RUN_DIR_KEYS:
            raise UsageError(
                f"{name} can't be swept over: it names the sweep's folder, in which the points are numbered"
            )
        if name.startswith("sweep."):
            raise UsageError(f"{name} can't be swept over, it configures the sweep itself: type one value")
    for override in parsed:
        if override.key_or_group in ("hydra.sweep.dir", "hydra.sweep.subdir", "hydra.run.dir", "hydra.mode"):
            raise UsageError(f"{override.input_line}: the sweep's folder is set by run.name= or run.dir=")
