"""Which sizes tune tries."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from launcher.tune.size_search import (
    choose_initial_size,
    choose_next_size,
    choose_next_size_up,
    choose_sizes_around_knee,
    iter_intermediate_sizes,
)


def test_sizes_grow_by_root_two() -> None:
    sizes: list[int] = []
    size: int | None = choose_initial_size(100)
    while size is not None:
        sizes.append(size)
        size = choose_next_size_up(size, 100)
    assert sizes == [8, 11, 16, 23, 33, 47, 66, 93, 100]


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_largest_fitting_size_is_found_quickly(largest: int, end: int) -> None:
    works, fails, tries = 0, None, 0
    while (
        size := choose_next_size(works, fails, largest) if works or fails else choose_initial_size(largest)
    ) is not None:
        works, fails = (size, fails) if size <= end else (works, size)
        tries += 1
    assert works == min(largest, end)
    assert tries <= 30


@given(st.integers(1, 1000), st.integers(1, 100_000))
def test_intermediate_sizes_at_most_double(known: int, size: int) -> None:
    way = [known, *iter_intermediate_sizes(known, size), max(known, size)]
    assert all(a <= b <= 2 * a for a, b in pairwise(way))


def test_sizes_around_knee() -> None:
    assert choose_sizes_around_knee(45, [8, 32, 45, 64], [], 1000) == [38, 40, 48, 54]
    assert choose_sizes_around_knee(45, [8, 32, 40, 45, 48], [50], 1000) == [42, 46]
    assert choose_sizes_around_knee(8, [8, 11], [], 1000) == [4, 9]
    assert choose_sizes_around_knee(2, [2, 3], [], 2) == []
