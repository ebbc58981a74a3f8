"""Whether a value has changed since it was looked at first, without copying it."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from typing import Any

import torch

from launcher.checkpoint.value_tree import is_plain

__all__ = ["make_fingerprint"]

#: Objects that change whenever they are used.
STATEFUL_TYPES = (torch.Tensor, torch.Generator, random.Random, Iterator)
MAX_DEPTH = 6


def make_fingerprint(value: Any, fixed: Collection[int], depth: int = MAX_DEPTH) -> Any:
    """A value that is equal for two states of `value` only if nothing in it has changed between them.

    Tensors, generators and other objects that change in place are never equal to themselves, except those whose ids
    are in `fixed`. Functions, modules and objects of libraries count as unchanged.
    """
    if id(value) in fixed or isinstance(value, type | Enum) or not depth:
        return id(value)
    if is_plain(value):
        return type(value), repr(value)
    if isinstance(value, Mapping):
        pairs = [(key, item) for key, item in value.items()]
        return type(value), tuple(make_fingerprint(part, fixed, depth - 1) for pair in pairs for part in pair)
    if isinstance(value, list | tuple | deque):
        return type(value), tuple(make_fingerprint(item, fixed, depth - 1) for item in value)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(value)
    if changes_in_place(value):
        return object()
    return type(value), make_fingerprint(vars(value), fixed, depth - 1) if is_own_object(value) else id(value)


def changes_in_place(value: object) -> bool:
    is_array = type(value).__module__.startswith("numpy")
    is_used_optimizer = isinstance(value, torch.optim.Optimizer) and bool(value.state)
    return isinstance(value, STATEFUL_TYPES) or is_array or is_used_optimizer


def is_own_object(value: object) -> bool:
    """Whether a value is an instance of a class that is neither Python's nor torch's, so that its attributes count."""
    package = type(value).__module__.partition(".")[0]
    is_library = package == "torch" or package in sys.stdlib_module_names or isinstance(value, torch.nn.Module)
    return hasattr(value, "__dict__") and not is_library
