"""Whether a value has changed since it was looked at first, without copying it."""

from __future__ import annotations

import hashlib
import random
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch

from launcher.checkpoint.value_tree import is_plain

__all__ = ["make_fingerprint"]

#: Objects that change whenever they are used.
STATEFUL_TYPES = (torch.Tensor, torch.Generator, random.Random, Iterator)
MAX_DEPTH = 6
MAX_BYTES = 1 << 20  # of an array or tensor whose values are compared


def make_fingerprint(value: Any, fixed: Collection[int], depth: int = MAX_DEPTH, *, in_object: bool = False) -> Any:
    """A value that is equal for two states of `value` only if nothing in it has changed between them.

    Small arrays, random generators, and small tensors within an object are compared by what they hold. All other
    objects that change in place are never equal to themselves, except those whose ids are in `fixed`: a tensor that is
    not within an object can be saved, so it is, whether it has changed or not. Functions, modules and objects of
    libraries count as unchanged.
    """
    if id(value) in fixed or isinstance(value, type | Enum) or not depth:
        return id(value)
    make = partial(make_fingerprint, fixed=fixed, depth=depth - 1, in_object=in_object)
    if is_plain(value):
        return type(value), repr(value)
    if isinstance(value, Mapping):
        pairs = [(key, item) for key, item in value.items()]
        return type(value), tuple(make(part) for pair in pairs for part in pair)
    if isinstance(value, list | tuple | deque):
        return type(value), tuple(make(item) for item in value)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(value)
    state = get_generator_state(value)
    if state is not None:
        return type(value), make_fingerprint(state, (), in_object=True)
    content = read_content(value) if in_object or not isinstance(value, torch.Tensor) else None
    if content is not None:
        return type(value), hashlib.blake2b(content).digest()
    if changes_in_place(value):
        return object()
    return type(value), make(vars(value), in_object=True) if is_own_object(value) else id(value)


def get_generator_state(value: object) -> Any:
    """The state of a random generator that has one; None for other objects."""
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    return value.state if isinstance(value, np.random.BitGenerator) else None


def read_content(value: object) -> bytes | None:
    """All that an array or a tensor in host memory holds; None for other objects and if it is large."""
    if isinstance(value, np.dtype | np.ufunc):
        return repr(value).encode()
    if type(value) is np.ndarray or isinstance(value, np.generic):
        is_readable = not value.dtype.hasobject and value.nbytes <= MAX_BYTES
        return repr((value.dtype, value.shape)).encode() + value.tobytes() if is_readable else None
    return read_tensor_content(value) if isinstance(value, torch.Tensor) else None


def read_tensor_content(tensor: torch.Tensor) -> bytes | None:
    is_plain_kind = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_quantized
    if not is_plain_kind or tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.nbytes > MAX_BYTES:
        return None
    values = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return repr((tensor.dtype, tuple(tensor.shape))).encode() + values.numpy().tobytes()


def changes_in_place(value: object) -> bool:
    is_array = type(value).__module__.startswith("numpy")
    is_used_optimizer = isinstance(value, torch.optim.Optimizer) and bool(value.state)
    return isinstance(value, STATEFUL_TYPES) or is_array or is_used_optimizer


def is_own_object(value: object) -> bool:
    """Whether a value is an instance of a class that is neither Python's nor torch's, so that its attributes count."""
    package = type(value).__module__.partition(".")[0]
    is_library = package == "torch" or package in sys.stdlib_module_names or isinstance(value, torch.nn.Module)
    return hasattr(value, "__dict__") and not is_library
