"""One-line messages for errors of Hydra, OmegaConf and YAML, built from their attributes without importing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.config.keys import closest_match
from launcher.config.misnames import find_by_other_name

__all__ = ["format_hydra_error", "one_line", "unknown_choice_message"]

#: Names for tensor, pipeline, context and expert parallelism.
MODEL_PARALLEL = frozenset(
    {"context", "cp", "ep", "expert", "model", "pipeline", "pp", "sequence", "sp", "tensor", "tp"}
)


def format_hydra_error(error: Any) -> str:
    """The reason for an error and, if known, the fix. OmegaConf's error is the `__cause__` of the one Hydra raises."""
    if hasattr(error, "missing_cfg_file"):
        return _describe_missing_file(error)
    if hasattr(error, "override"):
        return _describe_unreadable(error.override, error.message)
    cause = error.__cause__ or error
    if getattr(cause, "full_key", None):
        return _describe_key_error(cause, type(cause).__name__)
    return one_line(str(error) or str(cause))


def unknown_choice_message(group: str, choice: str, options: Sequence[str]) -> str:
    """The message for a choice that its configuration group doesn't have."""
    choices = f"choose from {', '.join(sorted(options))}"
    if group == "batch" and choice.isdigit():
        return f"batch={choice}: {choices}; for a number type batch.per_device={choice} or batch.global={choice}"
    if group == "strategy" and choice.lower().replace("_", "").removesuffix("parallel") in MODEL_PARALLEL:
        return f"strategy={choice}: model parallelism within one sample is not supported: {choices}"
    match = closest_match(choice, options)
    return f"{group}={choice}: " + (f"did you mean {match}? " if match else "") + choices


def one_line(text: str) -> str:
    return " ".join(text.split())


def _describe_missing_file(error: Any) -> str:
    group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
    return unknown_choice_message(group, choice, error.options) if group and error.options else one_line(str(error))


def _describe_unreadable(override: str, message: str) -> str:
    name, _, value = override.partition("=")
    reason = one_line(message.partition("See https")[0])
    quoted = f"{name}='{value}'" if "'" not in value else f'{name}=\\"{value}\\"'
    return f'{override} cannot be read, {reason}: quote the value, e.g. "{quoted}"'


def _describe_key_error(error: Any, kind: str) -> str:
    name = str(error.full_key)
    if kind == "MissingMandatoryValue":
        return f"{name} has no value: type {name}=..."
    if kind in ("ConfigAttributeError", "ConfigKeyError"):
        return _describe_unknown_field(name, error.parent_node)
    return f"{name}: {one_line(str(error).splitlines()[0])}"


def _describe_unknown_field(name: str, parent: Any) -> str:
    """The message for a field that the chosen recipe, optimizer or sink doesn't have."""
    if "/" in name:
        return f"{name} is not a configuration group: launcher --help lists them"
    prefix, _, field = name.rpartition(".")
    names = [str(key) for key in parent] if prefix and parent is not None else []
    match, other_name = closest_match(field, names), find_by_other_name(name)
    if prefix == "optimizer" and match is None and other_name not in (None, name):
        return f"{name} is not a key here: did you mean {other_name}?"
    hint = f"did you mean {prefix}.{match}? " if match else f"known keys are {', '.join(names)}; " if names else ""
    return f"{name} is not a key here: {hint}type +{name}= to add a new one"
