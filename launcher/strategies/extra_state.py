"""What modules return from `get_extra_state()`: plain values and tensors are saved in a checkpoint and restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from launcher.checkpoint.tensor_io import LazyTensors
from launcher.checkpoint.value_tree import TreeEncoder, UnsavableValueError, decode_tree
from launcher.errors import UsageError

__all__ = ["collect_extra_state", "load_extra_state", "load_model_tensors", "split_extra_state"]

EXTRA_STATE = "_extra_state"
#: Prefix of the keys under which tensors of extra states are stored beside the optimizer's.
PREFIX = "extra state/"


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


def load_extra_state(module: nn.Module, trees: Mapping[str, Any], tensors: LazyTensors, device: torch.device) -> None:
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
