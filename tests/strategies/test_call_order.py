"""The number by which ranks compare the order in which they called the parts of a sharded model."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.strategies.call_order import CallOrder


def make_layers() -> list[nn.Module]:
    return [nn.Linear(2, 2) for _ in range(3)]


def compute_order(calls: list[int], *, repeated: bool = True) -> float:
    layers = make_layers()
    order = CallOrder(layers, repeated=repeated)
    x = torch.zeros(1, 2)
    for number in calls:
        x = layers[number](x)
    return order.pop()


def test_equal_calls_give_equal_numbers_and_others_do_not() -> None:
    sequences = [[0, 1, 2], [0, 2, 1], [0, 1], [0, 2], [0, 1, 1, 2], []]
    numbers = [compute_order(calls) for calls in sequences]
    assert numbers == [compute_order(calls) for calls in sequences]
    assert len(set(numbers)) == len(sequences)


def test_repeated_calls_count_only_where_each_one_communicates() -> None:
    assert compute_order([0, 1, 1, 2], repeated=False) == compute_order([0, 1, 2], repeated=False)
    assert compute_order([0, 2, 1], repeated=False) != compute_order([0, 1, 2], repeated=False)


def test_validation_and_recomputation_do_not_count() -> None:
    layers = make_layers()
    order = CallOrder(layers, repeated=True)
    x = torch.zeros(1, 2, requires_grad=True)
    with torch.no_grad():
        layers[0](x)
    assert order.pop() == 0.0
    checkpoint(layers[1], x, use_reentrant=False).sum().backward()
    recomputed = order.pop()
    layers[1](x)
    assert recomputed == order.pop() != 0.0
