"""Batch plans: the documented numbers, invariants of every plan, and refused requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import UsageError
from launcher.plan.batch import BatchPlan, BatchPolicy, PlanError, most_divisible_batch, plan_batch

HOLD = BatchPolicy("hold", per_device=48, global_batch=256)
SCALE = BatchPolicy("scale", per_device=64)

SPEEDS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=24)


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    """Generate plans of every policy, with and without speeds."""
    kind = draw(st.sampled_from(["scale", "hold", "bounded"]))
    world = draw(st.integers(1, 24))
    speeds = draw(st.none() | st.lists(st.floats(0.05, 20), min_size=world, max_size=world))
    low = draw(st.integers(1, 300))
    policy = BatchPolicy(
        kind,
        per_device=draw(st.integers(1, 40)),
        accumulation=None if kind == "hold" else draw(st.none() | st.integers(1, 5)),
        global_batch=draw(st.integers(1, 600)) if kind == "hold" else None,
        min_global=low if kind == "bounded" else None,
        max_global=draw(st.integers(low, 600)) if kind == "bounded" else None,
        allow_idle=True,
    )
    return plan_batch(policy, world, speeds)


def all_micro_batches(plan: BatchPlan) -> list[tuple[int, ...]]:
    return [plan.micro_batches(rank) for rank in range(plan.world)]


# Documented numbers


@pytest.mark.parametrize(("world", "batch"), [(1, 64), (3, 192), (4, 256), (5, 320), (8, 512)])
def test_scale_grows_with_world_size(world: int, batch: int) -> None:
    plan = plan_batch(SCALE, world)
    assert plan == BatchPlan(world, (64,) * world, per_device=64, accumulation=1)
    assert plan.global_batch == batch


def test_scale_multiplies_by_accumulation() -> None:
    plan = plan_batch(BatchPolicy("scale", per_device=16, accumulation=3), 2)
    assert plan == BatchPlan(2, (48, 48), per_device=16, accumulation=3)
    assert plan.micro_batches(1) == (16, 16, 16)


@pytest.mark.parametrize(
    ("world", "shares", "per_device", "accumulation"),
    [
        (3, (86, 85, 85), 43, 2),
        (5, (52, 51, 51, 51, 51), 26, 2),
        (6, (43,) * 4 + (42,) * 2, 43, 1),
        (7, (37,) * 4 + (36,) * 3, 37, 1),
        (11, (24,) * 3 + (23,) * 8, 24, 1),
    ],
)
def test_hold_keeps_the_global_batch(world: int, shares: Sequence[int], per_device: int, accumulation: int) -> None:
    plan = plan_batch(HOLD, world)
    assert (plan.shares, plan.per_device, plan.accumulation) == (shares, per_device, accumulation)
    assert plan.global_batch == 256


def test_hold_splits_share_into_even_micro_batches() -> None:
    plan = plan_batch(replace(HOLD, global_batch=1000), 3)
    assert (plan.shares, plan.accumulation) == ((334, 333, 333), 7)
    assert plan.micro_batches(0) == (48, 48, 48, 48, 48, 47, 47)
    assert plan.micro_batches(2) == (48, 48, 48, 48, 47, 47, 47)


def test_hold_gives_ranks_equally_many_micro_batches() -> None:
    plan = plan_batch(BatchPolicy("hold", per_device=2, global_batch=5), 2)
    assert all_micro_batches(plan) == [(2, 1), (1, 1)]


def test_given_accumulation_is_kept_where_samples_suffice() -> None:
    plan = plan_batch(replace(HOLD, accumulation=8), 2)
    assert (plan.per_device, plan.accumulation) == (16, 8)
    plan = plan_batch(BatchPolicy("hold", per_device=8, global_batch=5, accumulation=3), 2)
    assert all_micro_batches(plan) == [(1, 1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("world", "batch", "accumulation"), [(1, 256, 8), (2, 256, 4), (8, 256, 1), (10, 320, 1), (100, 1024, 1)]
)
def test_bounded_stays_within_bounds(world: int, batch: int, accumulation: int) -> None:
    plan = plan_batch(BatchPolicy("bounded", per_device=32, min_global=256, max_global=1024), world)
    assert (plan.global_batch, plan.accumulation) == (batch, accumulation)


def test_bound_of_none_has_no_effect() -> None:
    assert plan_batch(BatchPolicy("bounded", per_device=32, accumulation=2), 4).global_batch == 256


def test_shares_follow_speeds() -> None:
    assert plan_batch(HOLD, 3, [1, 1, 0.5]).shares == (103, 102, 51)


def test_scale_with_speeds_keeps_total_batch() -> None:
    plan = plan_batch(SCALE, 3, [1, 1, 0.5])
    assert plan.global_batch == 192
    assert all_micro_batches(plan) == [(39, 38), (39, 38), (38,)]
    assert (plan.per_device, plan.accumulation) == (39, 2)


def test_equal_speeds_give_equal_shares() -> None:
    assert plan_batch(SCALE, 7, [0.3] * 7) == plan_batch(SCALE, 7)
    assert plan_batch(HOLD, 7, [0.3] * 7) == plan_batch(HOLD, 7)


def test_batch_of_one_sample_is_valid() -> None:
    assert plan_batch(replace(HOLD, global_batch=1), 1).micro_batches(0) == (1,)


def test_idle_worker_has_no_micro_batch() -> None:
    plan = plan_batch(replace(HOLD, global_batch=2, allow_idle=True), 4)
    assert plan.shares == (1, 1, 0, 0)
    assert all_micro_batches(plan) == [(1,), (1,), (), ()]


# Invariants of every plan


@given(plans())
def test_micro_batches_sum_to_shares_and_batch(plan: BatchPlan) -> None:
    micro = all_micro_batches(plan)
    assert tuple(map(sum, micro)) == plan.shares
    assert sum(plan.shares) == plan.global_batch
    assert max(size for sizes in micro for size in sizes) == plan.per_device
    assert max(map(len, micro)) == plan.accumulation


@given(plans())
def test_micro_batches_differ_by_at_most_one(plan: BatchPlan) -> None:
    for sizes in filter(None, all_micro_batches(plan)):
        assert max(sizes) - min(sizes) <= 1
        assert list(sizes) == sorted(sizes, reverse=True)


@given(st.integers(1, 3000), st.integers(1, 60), st.integers(1, 60))
def test_hold_takes_smallest_accumulation_that_fits(batch: int, cap: int, world: int) -> None:
    plan = plan_batch(BatchPolicy("hold", cap, global_batch=batch, allow_idle=True), world)
    assert plan.per_device <= cap
    assert plan.accumulation == 1 or math.ceil(max(plan.shares) / (plan.accumulation - 1)) > cap
    assert max(plan.shares) - min(plan.shares) <= 1
    assert list(plan.shares) == sorted(plan.shares, reverse=True)


def assign_greedily(total: int, speeds: Sequence[float]) -> list[int]:
    """Reference implementation: each sample goes to the smallest (share + 1) / speed, ties to the lower rank."""
    exact = [Fraction(speed) for speed in speeds]
    shares = [0] * len(exact)
    for _ in range(total):
        rank = min(range(len(exact)), key=lambda r: ((shares[r] + 1) / exact[r], r))
        shares[rank] += 1
    return shares


@given(st.integers(1, 200), st.lists(st.integers(1, 64).map(lambda n: n / 16), min_size=1, max_size=8))
def test_shares_match_greedy_assignment_by_speed(batch: int, speeds: list[float]) -> None:
    plan = plan_batch(BatchPolicy("hold", 10, global_batch=batch, allow_idle=True), len(speeds), speeds)
    assert list(plan.shares) == assign_greedily(batch, speeds)


@given(st.integers(1, 10**9), SPEEDS)
def test_shares_are_at_least_floor_of_quota(batch: int, speeds: list[float]) -> None:
    plan = plan_batch(BatchPolicy("hold", 10**9, global_batch=batch, allow_idle=True), len(speeds), speeds)
    whole = sum(map(Fraction, speeds))
    assert plan.global_batch == batch
    assert all(share >= batch * Fraction(s) // whole for share, s in zip(plan.shares, speeds, strict=True))


def test_extreme_speed_ratios_are_handled() -> None:
    assert plan_batch(replace(HOLD, allow_idle=True), 3, [5e-324, 1e308, 1e308]).shares == (0, 128, 128)


# Partial updates: tails and the last update of the run


def test_truncated_plan_keeps_proportions() -> None:
    plan = plan_batch(HOLD, 3, [1, 1, 0.5])
    assert plan.truncated(10).shares == (4, 4, 2)
    assert plan.truncated(10).accumulation == 1


def test_truncated_plan_below_world_idles_last_ranks() -> None:
    assert plan_batch(HOLD, 5).truncated(3).shares == (1, 1, 1, 0, 0)
    assert plan_batch(SCALE, 3).truncated(1).shares == (1, 0, 0)


def test_truncated_plan_keeps_micro_batch_size() -> None:
    plan = plan_batch(replace(HOLD, global_batch=1000), 3).truncated(300)
    assert all_micro_batches(plan) == [(34, 33, 33), (34, 33, 33), (34, 33, 33)]
    assert plan_batch(BatchPolicy("scale", 4), 2).truncated(5).micro_batches(0) == (3,)


@given(plans(), st.data())
def test_truncated_shares_never_exceed_full_shares(plan: BatchPlan, data: st.DataObject) -> None:
    samples = data.draw(st.integers(1, plan.global_batch))
    truncated = plan.truncated(samples)
    assert (truncated.world, truncated.global_batch) == (plan.world, samples)
    assert all(less <= whole for less, whole in zip(truncated.shares, plan.shares, strict=True))
    assert truncated.per_device <= plan.per_device
    for rank, share in enumerate(truncated.shares):
        assert sum(truncated.micro_batches(rank)) == share
        if samples < plan.global_batch:
            assert len(truncated.micro_batches(rank)) == math.ceil(share / plan.per_device)


@given(plans())
def test_truncation_to_full_size_is_identity(plan: BatchPlan) -> None:
    assert plan.truncated(plan.global_batch) == plan


@pytest.mark.parametrize("samples", [-1, 0, 257])
def test_truncation_outside_range_is_refused(samples: int) -> None:
    with pytest.raises(ValueError, match=f"{samples} samples are not between 1 and the global batch of 256"):
        plan_batch(HOLD, 3).truncated(samples)


# Refused requests and their fixes


@pytest.mark.parametrize(
    ("policy", "world", "speeds", "message"),
    [
        (
            BatchPolicy("hold", 48, global_batch=9),
            16,
            None,
            "batch.global=9 is below 16 workers: type batch.global=16 or more, or elastic.allow_idle=true",
        ),
        (
            BatchPolicy("bounded", 48, max_global=9),
            16,
            None,
            "batch.max_global=9 is below 16 workers: type batch.max_global=16 or more, or elastic.allow_idle=true",
        ),
        (
            replace(HOLD, accumulation=2),
            1,
            None,
            "batch.accumulation=2 gives micro-batches of 128 at world size 1, above batch.per_device=48: "
            "type batch.accumulation=6 or more, or batch.accumulation=auto",
        ),
        (
            BatchPolicy("bounded", 8, min_global=64, max_global=32),
            1,
            None,
            "batch.min_global=64 is above batch.max_global=32: type batch.max_global=64 or more",
        ),
        (
            BatchPolicy("hold", 48),
            2,
            None,
            "batch.policy=hold needs a global batch: type batch.global=256 or another number",
        ),
        (
            replace(SCALE, global_batch=256),
            2,
            None,
            "batch.global=256 has no effect under batch.policy=scale: type batch.policy=hold, or batch.global=null",
        ),
        (
            replace(HOLD, max_global=512),
            2,
            None,
            "batch.max_global=512 has no effect under batch.policy=hold: "
            "type batch.policy=bounded, or batch.max_global=null",
        ),
        (
            BatchPolicy("swing", 8),  # type: ignore[arg-type]
            2,
            None,
            "batch.policy=swing is not a policy: type batch.policy=scale, hold or bounded",
        ),
        (SCALE, 0, None, "a world size of 0 is too small: start 1 worker or more"),
        (SCALE, 3, [1, 1], "2 speeds for 3 workers: give one speed per worker"),
        (
            replace(HOLD, global_batch=4),
            3,
            [1, 1, 0.1],
            "batch.global=4: rank 2 is too slow to get a sample: "
            "type batch.global=21 or more, or elastic.allow_idle=true",
        ),
        (
            BatchPolicy("scale", 2, accumulation=2),
            3,
            [1, 1, 0.1],
            "batch.per_device=2: rank 2 is too slow to get a sample: "
            "type batch.per_device=4 or more, or elastic.allow_idle=true",
        ),
    ],
)
def test_infeasible_plan_is_refused_with_fix(
    policy: BatchPolicy, world: int, speeds: Sequence[float] | None, message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        plan_batch(policy, world, speeds)
    assert str(caught.value) == message
    assert isinstance(caught.value, UsageError)


@pytest.mark.parametrize("name", ["per_device", "accumulation", "global_batch", "min_global", "max_global"])
@pytest.mark.parametrize("size", [0, -8, 2.5])
def test_sizes_must_be_positive_integers(name: str, size: float) -> None:
    key = f"batch.{name.removesuffix('_batch')}"
    with pytest.raises(PlanError, match=rf"^{key}={size} is not a whole number >= 1: type {key}=1 or more$"):
        plan_batch(replace(HOLD, **{name: size}), 2)


@pytest.mark.parametrize("speed", [0, -1.0, math.nan, math.inf])
def test_speeds_must_be_finite_and_positive(speed: float) -> None:
    with pytest.raises(PlanError, match=f"the speed {speed} of rank 1 is not a number above 0"):
        plan_batch(SCALE, 2, [1.0, speed])


@given(st.integers(1, 100), st.lists(st.integers(1, 64).map(lambda n: n / 16), min_size=1, max_size=8))
def test_suggested_fix_for_slow_rank_works(batch: int, speeds: list[float]) -> None:
    policy = BatchPolicy("hold", 10, global_batch=max(batch, len(speeds)))
    try:
        plan_batch(policy, len(speeds), speeds)
    except PlanError as refused:
        enough = int(str(refused).split("type batch.global=")[1].split()[0])
        assert 0 not in plan_batch(replace(policy, global_batch=enough), len(speeds), speeds).shares


@pytest.mark.parametrize("speeds", [None, [1 + rank % 7 / 3 for rank in range(10_000)]])
@pytest.mark.parametrize("policy", [SCALE, replace(HOLD, global_batch=1_000_003)])
def test_plan_supports_ten_thousand_workers(policy: BatchPolicy, speeds: list[float] | None) -> None:
    plan = plan_batch(policy, 10_000, speeds)
    assert plan.global_batch == (policy.global_batch or 10_000 * policy.per_device)
    assert min(plan.shares) >= 1


# The batch divisible by the most world sizes


def test_most_divisible_batch_matches_documentation() -> None:
    batch, worlds = most_divisible_batch([8, 12, 16, 17], 10_000, 32, 1500)
    assert (batch, len(worlds)) == (9792, 23)
    assert worlds[0] >= 32
    assert worlds == tuple(sorted(worlds))


def find_by_brute_force(micro_sizes: list[int], max_batch: int, low: int, high: int) -> tuple[int, tuple[int, ...]]:
    def worlds(batch: int) -> tuple[int, ...]:
        return tuple(w for w in range(low, high + 1) if any(batch % (w * micro) == 0 for micro in micro_sizes))

    return max(((batch, worlds(batch)) for batch in range(1, max_batch + 1)), key=lambda found: (len(found[1]), found))


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 200), st.integers(1, 10), st.integers(0, 20)
)
def test_most_divisible_batch_matches_brute_force(micro_sizes: list[int], max_batch: int, low: int, more: int) -> None:
    expected = find_by_brute_force(micro_sizes, max_batch, low, low + more)
    if expected[1]:
        assert most_divisible_batch(micro_sizes, max_batch, low, low + more) == expected
    else:
        with pytest.raises(PlanError):
            most_divisible_batch(micro_sizes, max_batch, low, low + more)


def test_most_divisible_batch_counts_only_the_given_world_sizes() -> None:
    assert most_divisible_batch([1], 100, 1, 9) == (72, (1, 2, 3, 4, 6, 8, 9))
    assert most_divisible_batch([1], 100, 1, 9, [5, 7, 2, 11]) == (70, (2, 5, 7))


def test_no_divisible_batch_names_the_minimum() -> None:
    with pytest.raises(PlanError, match=r"allow a batch of 256 or more$"):
        most_divisible_batch([8, 12], 255, 32, 64)
    assert most_divisible_batch([8, 12], 256, 32, 64) == (256, (32,))


@pytest.mark.parametrize(("micro_sizes", "low", "high"), [([], 1, 2), ([0], 1, 2), ([8], 0, 2), ([8], 3, 2)])
def test_most_divisible_batch_refuses_invalid_arguments(micro_sizes: list[int], low: int, high: int) -> None:
    with pytest.raises(PlanError, match="give micro-batches >= 1 and an ascending range"):
        most_divisible_batch(micro_sizes, 100, low, high)
