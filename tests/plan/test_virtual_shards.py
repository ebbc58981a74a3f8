"""Virtual shards: reduction tree, and plans that are the same at any world size."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.plan.timeline import Timeline, Update
from launcher.plan.virtual_shards import ShardPlan, TreeSum, compute_tree_sum, num_training_ranks


def random_values(count: int) -> list[float]:
    generator = random.Random(count)
    return [generator.uniform(-1, 1) * 10 ** generator.uniform(-8, 8) for _ in range(count)]


# The tree
def test_tree_adds_neighbours_first() -> None:
    a, b, c, d, e = random_values(5)
    assert compute_tree_sum([]) == 0.0
    assert compute_tree_sum([a]) == a
    assert compute_tree_sum([a, b, c, d]) == (a + b) + (c + d)
    assert compute_tree_sum([a, b, c, d, e]) == ((a + b) + (c + d)) + e


@given(st.integers(1, 64), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_sums_of_ranks_equal_sum_of_values(count: int, ranks: int) -> None:
    values = random_values(count) + [0.0] * (64 - count)
    own = 64 // ranks
    sums = [compute_tree_sum(values[rank * own : (rank + 1) * own]) for rank in range(ranks)]
    assert compute_tree_sum(sums) == compute_tree_sum(values) == compute_tree_sum(values[:count])
    assert compute_tree_sum([*sums, 0.0, 0.0, 0.0]) == compute_tree_sum(values), "ranks that only follow add zeros"


def test_tree_holds_few_sums() -> None:
    tree = TreeSum()
    for value in random_values(64):
        tree.add(value)
        assert len(tree._held) <= 6


@pytest.mark.parametrize(("world", "active"), [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (9, 8), (100, 8)])
def test_training_ranks_are_a_power_of_two(world: int, active: int) -> None:
    assert num_training_ranks(world, 8) == active


# The plan
@given(st.integers(1, 200), st.integers(1, 12), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 30))
@example(samples=19, world=1, shards=2, cap=9)  # 10 and 9: the micro-batches of the first shard determine the size
def test_micro_batches_are_independent_of_world_size(samples: int, world: int, shards: int, cap: int) -> None:
    def pieces(workers: int) -> list[tuple[tuple[int, int], int]]:
        plan = ShardPlan.from_batch_size(samples, workers, shards, cap)
        assert plan.global_batch == samples
        assert [len(plan.micro_batches(rank)) for rank in range(workers)].count(plan.accumulation)
        ranks = range(workers)
        return [p for r in ranks for p in zip(plan.rng_keys(r), plan.micro_batches(r), strict=True)]

    assert pieces(world) == pieces(1)
    assert max(size for _, size in pieces(1)) <= cap


def test_shards_are_consecutive_and_not_split() -> None:
    plan = ShardPlan.from_batch_size(60, 3, 8, 5)
    assert plan.shards == (8, 8, 8, 8, 7, 7, 7, 7)
    assert plan.shares == (32, 28, 0)
    assert plan.micro_batches(1) == (4, 3) * 4
    assert plan.rng_keys(1)[:3] == ((4, 0), (4, 1), (5, 0))
    assert plan.truncated(3).shares == (3, 0, 0)


def test_micro_batch_addresses_ignore_world_size() -> None:
    def taken(world: int) -> list[Any]:
        updates: list[Update] = list(
            Timeline(103, 103, ((0, ShardPlan.from_batch_size(50, world, 8, 5)),)).iter_updates()
        )
        micro = [(u.index, m) for u in updates for rank in range(world) for m in u.micro_batches(rank)]
        return [(index, m.shard, m.index, m.spans) for index, m in micro if not m.is_padding]

    assert taken(1) == taken(2) == taken(3) == taken(8) == taken(16)
