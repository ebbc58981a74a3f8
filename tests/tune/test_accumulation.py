"""Splits of one batch into micro-batches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from launcher.tune.followup import accumulation_splits


def test_batch_splits_into_halves_and_quarters() -> None:
    assert accumulation_splits(64) == ((64, 1), (32, 2), (16, 4))
    assert accumulation_splits(64, accumulation=3) == ((64, 3), (32, 6), (16, 12))


def test_odd_size_splits_at_nearby_size() -> None:
    assert accumulation_splits(45) == ((44, 1), (22, 2), (11, 4))
    assert accumulation_splits(23) == ((22, 1), (11, 2))
    assert accumulation_splits(6) == ((6, 1), (3, 2))
    assert accumulation_splits(7) == ()


def test_splits_have_at_least_two_samples() -> None:
    assert accumulation_splits(4) == ((4, 1), (2, 2))
    assert [accumulation_splits(size) for size in (1, 2, 3)] == [(), (), ()]


@given(st.integers(1, 10_000), st.integers(1, 8))
def test_all_splits_have_the_same_batch(size: int, accumulation: int) -> None:
    batches = {micro * steps for micro, steps in accumulation_splits(size, accumulation)}
    assert len(batches) <= 1
    assert all(7 / 8 * size * accumulation <= batch <= size * accumulation for batch in batches)
