"""One-line messages for errors of Hydra, OmegaConf and YAML, built from their attributes without importing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.keys import nearest

__all__ = ["joined", "no_such_choice", "refusal"]

#: Names for tensor, pipeline, context and expert parallelism.
MODEL_PARALLEL = frozenset(
    {"context", "cp", "ep", "expert", "model", "pipeline", "pp", "sequence", "sp", "tensor", "tp"}
)


def refusal(error: Any) -> str:
    """The reason for an error and, if known, the fix. OmegaConf's error is the `__cause__` of the one Hydra raises."""
    if hasattr(error, "missing_cfg_file"):
        return _missing_file(error)
    if hasattr(error, "override"):
        return _unreadable(error.override, error.message)
    cause = error.__cause__ or error
    if getattr(cause, "full_key", None):
        return _at_key(cause, type(cause).__name__)
    return joined(str(error) or str(cause))


def no_such_choice(group: str, choice: str, options: Sequence[str]) -> str:
    """The message for a choice that its configuration group doesn't have."""
    known = f"choose from {', '.join(sorted(options))}"
    if group == "batch" and choice.isdigit():
        return f"batch={choice}: {known}; for a number type batch.per_device={choice} or batch.global={choice}"
    if group == "strategy" and choice.lower().replace("_", "").removesuffix("parallel") in MODEL_PARALLEL:
        return f"strategy={choice}: model parallelism within one sample is not supported: {known}"
    meant = nearest(choice, options)
    return f"{group}={choice}: " + (f"did you mean {meant}? " if meant else "") + known


def joined(text: str) -> str:
    return " ".join(text.split())


def _missing_file(error: Any) -> str:
    group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
    return no_such_choice(group, choice, error.options) if group and error.options else joined(str(error))


def _unreadable(override: str, message: str) -> str:
    name, _, value = override.partition("=")
    reason = joined(message.partition("See https")[0])
    quoted = f"{name}='{value}'" if "'" not in value else f'{name}=\\"{value}\\"'
    return f'{override} cannot be read, {reason}: quote the value, e.g. "{quoted}"'


def _at_key(error: Any, kind: str) -> str:
    name = str(error.full_key)
    if kind == "MissingMandatoryValue":
        return f"{name} has no value: type {name}=..."
    if kind in ("ConfigAttributeError", "ConfigKeyError"):
        return _no_such_field(name, error.parent_node)
    return f"{name}: {joined(str(error).splitlines()[0])}"


def _no_such_field(name: str, parent: Any) -> str:
    """The message for a field that the chosen recipe, optimizer or sink doesn't have."""
    if "/" in name:
        return f"{name} is not a configuration group: launcher --help lists them"
    prefix, _, field = name.rpartition(".")
    known = [str(key) for key in parent] if prefix and parent is not None else []
    meant = nearest(field, known)
    hint = f"did you mean {prefix}.{meant}? " if meant else f"known keys are {', '.join(known)}; " if known else ""
    return f"{name} is not a key here: {hint}type +{name}= to add a new one"
