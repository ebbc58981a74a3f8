"""Nested values as JSON, with their tensors apart: how a checkpoint holds what is neither a tensor nor a number.

A tree is the JSON form of one value; a tensor in it is the key under which the tensor is stored. Kinds are restored
exactly: lists, tuples, dicts in their order, OrderedDicts, deques, tensors, None, bools, numbers and strings.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch

from launcher.checkpoint.tensor_io import DTYPES

__all__ = ["TreeEncoder", "UnsavableValueError", "decode_tree", "find_tensor_keys", "is_plain"]

SEQUENCES: Mapping[str, Callable[..., Any]] = {"list": list, "tuple": tuple, "deque": deque}
MAPPINGS: Mapping[str, Callable[..., Any]] = {"dict": dict, "ordered": OrderedDict}
KIND_NAMES: Mapping[Any, str] = {kind: name for name, kind in (*SEQUENCES.items(), *MAPPINGS.items())}
MAX_DEPTH = 50


class UnsavableValueError(TypeError):
    """A value cannot be stored; `place` says where it is, and the message what it is."""

    def __init__(self, place: str, kind: str) -> None:
        super().__init__(f"{place} is {kind}")
        self.place = place


def is_plain(value: object) -> bool:
    """Whether a value is None, a bool, a number or a string, which JSON holds as it is."""
    return value is None or isinstance(value, bool | int | float | str)


class TreeEncoder:
    """Encodes values as trees, and collects their tensors in `tensors` under the keys that the trees name.

    `names` maps the ids of the model's parameters to their names: a value that is one of them is stored as its name.
    """

    def __init__(self, tensors: MutableMapping[str, torch.Tensor], names: Mapping[int, str] | None = None) -> None:
        self._tensors = tensors
        self._names = names or {}
        self._containers: dict[int, str] = {}

    def encode(self, value: Any, place: str) -> dict[str, Any]:
        """Encode a value; its own tensor is stored under `place`, those within it under `place[0]` and so on.

        Raises:
            UnsavableValueError: the value, or one within it, is of another kind, or a container is in two places.
        """
        return self._encode(value, place, MAX_DEPTH)

    def _encode(self, value: Any, place: str, depth: int) -> dict[str, Any]:
        if id(value) in self._names:
            return {"parameter": self._names[id(value)]}
        if isinstance(value, torch.Tensor):
            return {"tensor": self.add_tensor(value, place)}
        if is_plain(value):
            if type(value) is int and value in self._names:
                raise UnsavableValueError(place, f"id({self._names[value]}), which is another one after a restart")
            return {"value": value}
        if type(value) not in KIND_NAMES or not depth:
            raise UnsavableValueError(place, describe_kind(value) if depth else "nested too deeply")
        first = place if isinstance(value, tuple) else self._containers.setdefault(id(value), place)
        if first != place:
            raise UnsavableValueError(place, f"the same {type(value).__name__} as {first}")
        kind = KIND_NAMES[type(value)]
        if kind in MAPPINGS:
            pairs = [
                [self._encode_key(key, place), self._encode(item, f"{place}[{key!r}]", depth - 1)]
                for key, item in value.items()
            ]
            return {kind: pairs}
        items = [self._encode(item, f"{place}[{index}]", depth - 1) for index, item in enumerate(value)]
        return {kind: items} | ({"maxlen": value.maxlen} if isinstance(value, deque) else {})

    def add_tensor(self, value: torch.Tensor, place: str) -> str:
        """Store a tensor under `place`, or a similar key if that is taken; return the key.

        Raises:
            UnsavableValueError: the tensor is sparse or of a dtype that safetensors does not support.
        """
        if value.layout != torch.strided or value.dtype not in DTYPES or value.is_meta:
            raise UnsavableValueError(place, f"a tensor of {value.layout}, {value.dtype} on {value.device.type}")
        while place in self._tensors:
            place += "'"
        self._tensors[place] = value
        return place

    def _encode_key(self, key: Any, place: str) -> dict[str, Any]:
        if not is_plain(key) and not isinstance(key, tuple):
            raise UnsavableValueError(f"a key of {place}", describe_kind(key))
        return self._encode(key, f"a key of {place}", MAX_DEPTH)


def describe_kind(value: object) -> str:
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def find_tensor_keys(trees: Any) -> set[str]:
    """The keys of all tensors in trees, or in JSON values that hold trees."""
    if isinstance(trees, Mapping):
        if isinstance(trees.get("tensor"), str):
            return {trees["tensor"]}
        return {key for value in trees.values() for key in find_tensor_keys(value)}
    return {key for value in trees for key in find_tensor_keys(value)} if isinstance(trees, list) else set()


def decode_tree(
    tree: Mapping[str, Any],
    read: Callable[[str], torch.Tensor],
    parameters: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """Decode a tree. `read` returns the tensor of a key, `parameters` are the model's by name."""
    if "tensor" in tree:
        return read(tree["tensor"])
    if "parameter" in tree:
        return (parameters or {})[tree["parameter"]]
    if "value" in tree:
        return tree["value"]
    for kind, make in MAPPINGS.items():
        if kind in tree:
            return make(tuple(decode_tree(part, read, parameters) for part in pair) for pair in tree[kind])
    kind = next(kind for kind in SEQUENCES if kind in tree)
    items = [decode_tree(item, read, parameters) for item in tree[kind]]
    return deque(items, tree["maxlen"]) if kind == "deque" else SEQUENCES[kind](items)
