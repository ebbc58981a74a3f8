"""Exact mode without processes: reduction tree, plan in shards, refusals, and validation chunks."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.config.schema import BatchConfig, ElasticConfig, LaunchConfig, LrConfig, RunConfig, TrainConfig
from launcher.errors import UsageError
from launcher.plan.timeline import Timeline, Update
from launcher.plan.training_plan import DatasetSizes, TrainingPlan, make_training_plan
from launcher.plan.virtual_shards import ShardPlan, TreeSum, compute_tree_sum, num_training_ranks
from launcher.run_dir.resume import decide_resume

EXACT = RunConfig(
    optimizer={"_target_": "torch.optim.SGD"},
    lr=LrConfig(base=0.1, base_batch=64),
    batch=BatchConfig(policy="hold", global_batch=60, per_device=5),
    elastic=ElasticConfig(exact=True),
)


def studied(config: RunConfig = EXACT, world: int = 1) -> TrainingPlan:
    return make_training_plan(config, DatasetSizes(1003, 100), world)


def noise(count: int) -> list[float]:
    generator = random.Random(count)
    return [generator.uniform(-1, 1) * 10 ** generator.uniform(-8, 8) for _ in range(count)]


# The tree


def test_the_tree_adds_neighbours_first() -> None:
    a, b, c, d, e = noise(5)
    assert compute_tree_sum([]) == 0.0
    assert compute_tree_sum([a]) == a
    assert compute_tree_sum([a, b, c, d]) == (a + b) + (c + d)
    assert compute_tree_sum([a, b, c, d, e]) == ((a + b) + (c + d)) + e


@given(st.integers(1, 64), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_ranks_sums_give_what_all_values_at_one_rank_give(count: int, ranks: int) -> None:
    values = noise(count) + [0.0] * (64 - count)
    own = 64 // ranks
    sums = [compute_tree_sum(values[rank * own : (rank + 1) * own]) for rank in range(ranks)]
    assert compute_tree_sum(sums) == compute_tree_sum(values) == compute_tree_sum(values[:count])
    assert compute_tree_sum([*sums, 0.0, 0.0, 0.0]) == compute_tree_sum(values), "ranks that only follow add zeros"


def test_the_tree_holds_few_sums_at_a_time() -> None:
    tree = TreeSum()
    for value in noise(64):
        tree.add(value)
        assert len(tree._held) <= 6


@pytest.mark.parametrize(("world", "active"), [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (9, 8), (100, 8)])
def test_a_power_of_two_of_the_workers_trains(world: int, active: int) -> None:
    assert num_training_ranks(world, 8) == active


# The plan


@given(st.integers(1, 200), st.integers(1, 12), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 30))
@example(samples=19, world=1, shards=2, cap=9)  # 10 and 9: the micro-batches of the first shard determine the size
def test_micro_batches_are_the_same_at_any_world_size(samples: int, world: int, shards: int, cap: int) -> None:
    def pieces(workers: int) -> list[tuple[tuple[int, int], int]]:
        plan = ShardPlan.from_batch_size(samples, workers, shards, cap)
        assert plan.global_batch == samples
        assert [len(plan.micro_batches(rank)) for rank in range(workers)].count(plan.accumulation)
        ranks = range(workers)
        return [p for r in ranks for p in zip(plan.rng_keys(r), plan.micro_batches(r), strict=True)]

    assert pieces(world) == pieces(1)
    assert max(size for _, size in pieces(1)) <= cap


def test_the_shards_follow_one_another_and_none_spans_two_micro_batches() -> None:
    plan = ShardPlan.from_batch_size(60, 3, 8, 5)
    assert plan.shards == (8, 8, 8, 8, 7, 7, 7, 7)
    assert plan.shares == (32, 28, 0)
    assert plan.micro_batches(1) == (4, 3) * 4
    assert plan.rng_keys(1)[:3] == ((4, 0), (4, 1), (5, 0))
    assert plan.truncated(3).shares == (3, 0, 0)


def test_an_updates_micro_batches_carry_their_address() -> None:
    def taken(world: int) -> list[Any]:
        updates: list[Update] = list(
            Timeline(103, 103, ((0, ShardPlan.from_batch_size(50, world, 8, 5)),)).iter_updates()
        )
        micro = [(u.index, m) for u in updates for rank in range(world) for m in u.micro_batches(rank)]
        return [(index, m.shard, m.index, m.spans) for index, m in micro if not m.is_padding]

    assert taken(1) == taken(2) == taken(3) == taken(8) == taken(16)


def test_every_stage_of_a_study_is_in_shards() -> None:
    ramped = replace(EXACT, batch=replace(EXACT.batch, ramp=(("0dur", 0.25), ("0.5dur", 1))))
    assert [plan.shares for _, plan in studied(ramped, 2).stages] == [(8, 7), (32, 28)]
    assert studied(world=1).plan.per_device == studied(world=8).plan.per_device == 4


def test_what_it_costs_and_who_only_follows_is_said() -> None:
    costs, idle = studied(world=3).advice[:2]
    assert "elastic.exact=true is slower" in costs
    assert "trains on 2 of 3 workers" in idle
    assert not [line for line in studied(world=4).advice if "get no samples" in line]


# Refusals


def changed(**parts: Mapping[str, Any]) -> RunConfig:
    return replace(EXACT, **{part: replace(getattr(EXACT, part), **keys) for part, keys in parts.items()})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (changed(elastic={"shards": 6}), "elastic.shards=6 is not a power of two: type elastic.shards=4 or 8"),
        (changed(elastic={"shards": 0}), "elastic.shards=0 is not a power of two: type elastic.shards=1 or 2"),
        (changed(elastic={"shards": 64}), "elastic.shards=64 exceeds the 60 samples of a batch"),
        (changed(elastic={"balance": True}), "elastic.balance=true does not work with elastic.exact=true"),
        (changed(batch={"policy": "scale", "global_batch": None}), "batch.policy=scale with elastic.exact=true"),
        (changed(batch={"accumulation": 4}), "batch.accumulation=4 does not work with elastic.exact=true"),
        (replace(EXACT, train=TrainConfig(precision="fp16")), "train.precision=fp16 does not work with"),
        (replace(EXACT, train=TrainConfig(compile=True)), "train.compile=true does not work with"),
        (replace(EXACT, launch=LaunchConfig(threads=4)), "launch.threads=4 does not work with"),
        (changed(strategy={"name": "fsdp"}), "strategy.name=fsdp does not work with elastic.exact=true"),
    ],
)
def test_what_cannot_be_exact_is_refused(config: RunConfig, says: str) -> None:
    with pytest.raises(UsageError, match=says.replace(".", r"\.")):
        studied(config)


def test_the_micro_batch_may_not_change_on_resume(tmp_path: Any) -> None:
    old = {"batch.policy": "hold", "batch.per_device": 5, "elastic.exact": False}
    new = {**old, "batch.per_device": 9}
    assert decide_resume("auto", tmp_path, old, new).changed
    with pytest.raises(UsageError, match=r"batch\.per_device \(5 before, 9 now\)"):
        decide_resume("auto", tmp_path, {**old, "elastic.exact": True}, {**new, "elastic.exact": True})


# Validation


@pytest.mark.parametrize("size", [3, 8, 53])
def test_validation_chunks_do_not_depend_on_the_world_size(size: int) -> None:
    from launcher.train.validation import ValidationSampler

    def batches(world: int) -> list[Any]:
        slices = [ValidationSampler(size, rank, world, chunks=8, batch=5) for rank in range(world)]
        return [b for one in slices for b in zip(one.chunks, one, strict=True) if b[0] is not None]

    assert batches(1) == batches(2) == batches(3) == batches(11)
    assert sorted(sample for _, batch in batches(1) for _, sample in batch) == list(range(size))
