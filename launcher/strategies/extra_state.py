"""What modules return from `get_extra_state()`: plain values and tensors are saved in a checkpoint and restored."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, load_model, save
from torch import nn

from launcher.checkpoint.tensor_io import LazyTensors
from launcher.checkpoint.value_tree import TreeEncoder, UnsavableValueError, decode_tree, find_tensor_keys
from launcher.errors import UsageError

__all__ = [
    "collect_extra_state",
    "load_exported_model",
    "load_extra_state",
    "load_model_tensors",
    "make_extra_metadata",
    "split_extra_state",
]

EXTRA_STATE = "_extra_state"
#: Prefix of the keys under which tensors of extra states are stored beside the optimizer's.
PREFIX = "extra state/"
METADATA = "launcher.extra_state"  # in an exported model


def split_extra_state(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split a model's `state_dict()` into its tensors and the extra states of its modules."""
    extra = {name: value for name, value in state.items() if name.rpartition(".")[2] == EXTRA_STATE}
    return {name: value for name, value in state.items() if name not in extra}, extra


def collect_extra_state(extra: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors in the extra states, and the extra states as JSON trees.

    Raises:
        UsageError: an extra state has values that are neither tensors nor plain; it is named.
    """
    tensors: dict[str, torch.Tensor] = {}
    encoder = TreeEncoder(tensors)
    try:
        return tensors, {name: encoder.encode(value, f"{PREFIX}{name}") for name, value in extra.items()}
    except UnsavableValueError as problem:
        raise UsageError(
            f"{str(problem).removeprefix(PREFIX)}, which a checkpoint cannot hold: return tensors, numbers and strings "
            "from get_extra_state(), also in lists, tuples and dicts, or register a buffer instead"
        ) from problem


def load_extra_state(
    module: nn.Module, trees: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    """Set the extra states of a checkpoint."""
    for name, tree in trees.items():
        value = decode_tree(tree, lambda key: tensors[key].to(device))
        module.get_submodule(name.removesuffix(EXTRA_STATE).removesuffix(".")).set_extra_state(value)


def load_model_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """As `load_state_dict`, which keeps each parameter's memory layout; extra states stay as they are.

    Raises:
        RuntimeError: the names are not those of the module.
    """
    missing, unexpected = module.load_state_dict(dict(tensors), strict=False)
    missing = [name for name in missing if name.rpartition(".")[2] != EXTRA_STATE]
    if missing or unexpected:
        raise RuntimeError(f"the model's state lacks {missing} and has {unexpected} beside it")


def make_extra_metadata(trees: Mapping[str, Any], tensors: LazyTensors) -> dict[str, str]:
    """The extra states of a checkpoint as metadata of an exported model, which as a safetensors file has no others."""
    if not trees:
        return {}
    own = {key: tensors[key] for key in find_tensor_keys(dict(trees))}
    return {METADATA: json.dumps({"trees": trees, "tensors": base64.b64encode(save(own)).decode()})}


def load_exported_model(
    model: nn.Module, path: Path | str, *, strict: bool = True
) -> tuple[list[str] | set[str], list[str]]:
    """As safetensors' `load_model`; then set the extra states that the file's metadata has.

    Raises:
        RuntimeError: with `strict`, the names are not those of the model.
    """
    if not split_extra_state(model.state_dict())[1]:
        return load_model(model, path, strict=strict)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    tensors, text = load_file(path), metadata.get(METADATA)
    tensors.update({alias: tensors[name] for alias, name in metadata.items() if name in tensors})
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if text is not None:
        missing = [name for name in missing if name.rpartition(".")[2] != EXTRA_STATE]
    if strict and (missing or unexpected):
        raise RuntimeError(f"missing in the file: {sorted(missing)}; not in the model: {sorted(unexpected)}")
    if text is not None:
        extra = json.loads(text)
        load_extra_state(model, extra["trees"], load(base64.b64decode(extra["tensors"])), torch.device("cpu"))
    return missing, unexpected
