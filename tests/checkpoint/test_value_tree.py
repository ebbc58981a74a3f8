"""Nested values as JSON trees."""

from __future__ import annotations

import json
import math
from collections import OrderedDict, defaultdict, deque
from typing import Any

import pytest
import torch

from launcher.checkpoint.value_tree import TreeEncoder, UnsavableValueError, decode_tree, find_tensor_keys

VALUES: dict[str, Any] = {
    "none": None,
    "bool": True,
    "int": 2**70,
    "float": -0.1,
    "infinity": math.inf,
    "text": "a/b",
    "list": [1, [2.5, (True, None)], []],
    "dict": {1: "one", (2, "b"): [3], "z": 0, "a": 1},
    "ordered": OrderedDict([("b", 1), ("a", 2)]),
    "deque": deque([1, 2], maxlen=3),
}


@pytest.mark.parametrize("name", VALUES)
def test_plain_values_are_restored_with_their_types(name: str) -> None:
    value = VALUES[name]
    tree = json.loads(json.dumps(TreeEncoder({}).encode(value, "here")))
    result = decode_tree(tree, lambda key: torch.empty(0))
    assert repr(result) == repr(value)
    assert getattr(result, "maxlen", None) == getattr(value, "maxlen", None)


def test_tensors_are_kept_apart_under_keys_of_their_own() -> None:
    tensors: dict[str, torch.Tensor] = {"w/q[0]": torch.zeros(2)}
    value = {"q": [torch.ones(3), torch.tensor(5)], "n": 1}
    tree = json.loads(json.dumps(TreeEncoder(tensors).encode(value["q"], "w/q")))
    assert list(tensors) == ["w/q[0]", "w/q[0]'", "w/q[1]"]
    assert find_tensor_keys({"slots": [tree]}) == {"w/q[0]'", "w/q[1]"}
    first, second = decode_tree(tree, tensors.__getitem__)
    assert torch.equal(first, torch.ones(3))
    assert second.dtype == torch.int64


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"a": {1, 2}}, r"here\['a'\] is a set"),
        ([lambda: 0], r"here\[0\] is a function"),
        (torch.Generator(), "here is a torch._C.Generator"),
        (defaultdict(int), "here is a collections.defaultdict"),
        (torch.zeros(2).to_sparse(), "here is a tensor of torch.sparse_coo"),
        ({torch.zeros(1): 1}, "a key of here is a tensor|a key of here is a torch.Tensor"),
        ([[1]] * 2 + [(shared := [1]), shared], r"here\[1\] is the same list as here\[0\]"),
    ],
)
def test_other_values_are_refused_by_place_and_kind(value: Any, named: str) -> None:
    with pytest.raises(UnsavableValueError, match=named):
        TreeEncoder({}).encode(value, "here")


@pytest.mark.parametrize("keyed", [True, False])
def test_ids_of_parameters_are_refused(keyed: bool) -> None:
    """A restarted process has others, so what they stand for would be lost without a word."""
    parameter = torch.zeros(1)
    value = {id(parameter): 1} if keyed else [id(parameter)]
    with pytest.raises(UnsavableValueError, match=r"id\(weight\), which is another one after a restart"):
        TreeEncoder({}, {id(parameter): "weight"}).encode(value, "self.seen")
