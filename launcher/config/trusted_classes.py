"""Importing recipe and optimizer classes that the user trusts, and refusing all others."""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Sequence

from launcher.config.keys import closest_match
from launcher.errors import UsageError
from launcher.system.garbage_collection import paused_garbage_collection

__all__ = ["TRUSTED_MODULES", "load_class"]


#: Classes defined under these modules are trusted without being listed in recipe.trust.
TRUSTED_MODULES = ("launcher.recipes", "torch")


def load_class(target: str, trust: Sequence[str], key: str = "recipe._target_") -> type:
    """Import the class at the dotted path `target` if it is trusted; a module that is not trusted is not imported.

    `key` is the configuration key that `target` comes from, for messages.

    Raises:
        UsageError: the target is not trusted, does not import, or is not a class.
    """
    module, _, name = target.rpartition(".")
    setting = f"{key}={target}"
    if not module:
        raise UsageError(f"{setting} has no module: type {key}=my_module.{target}")
    if isinstance(trust, str):  # iterating over it would give its characters
        raise UsageError(f"recipe.trust={trust} is not a list: type recipe.trust=[{trust}]")
    is_listed = any(_covers(entry, target) for entry in trust)
    if not is_listed and not any(_covers(entry, target) for entry in TRUSTED_MODULES):
        raise UsageError(f"{setting} is not trusted: add recipe.trust=[{module}] if the code is yours")
    loaded = getattr(_import_module(setting, module), name, None)
    if not inspect.isclass(loaded):
        raise UsageError(f"{setting} is not a class: {_suggest_class(module, name)}")
    if not is_listed and not any(_covers(entry, loaded.__module__) for entry in TRUSTED_MODULES):
        origin = f"{loaded.__module__}.{loaded.__name__}"
        raise UsageError(f"{setting} is only imported there: type {key}={origin}")
    return loaded


def _covers(entry: str, path: str) -> bool:
    """Match whole path components: `my` covers `my.recipe`, not `my_evil`."""
    return path == entry or path.startswith(f"{entry}.")


def _import_module(setting: str, module: str) -> types.ModuleType:
    try:
        with paused_garbage_collection(freeze=False):
            return importlib.import_module(module)
    except ImportError as problem:
        raise UsageError(f"{setting}: {module} does not import: {_join_lines(problem)}") from problem
    except Exception as problem:
        kind = type(problem).__name__
        raise UsageError(f"{setting}: {module} fails on import: {kind}: {_join_lines(problem)}") from problem


def _suggest_class(module: str, name: str) -> str:
    classes = [name for name, value in vars(importlib.import_module(module)).items() if inspect.isclass(value)]
    near = closest_match(name, classes)
    return f"did you mean {near}?" if near else f"name a class of {module}"


def _join_lines(problem: BaseException) -> str:
    return " ".join(str(problem).split())
