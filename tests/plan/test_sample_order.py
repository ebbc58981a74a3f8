"""The order of samples: a true permutation, stable over time, and as random as a shuffle."""

from __future__ import annotations

import itertools
import math
import random
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np  # noqa: F401  so that its import is not part of what a test measures
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.plan.sample_order import SamplePermutation, permute_spans

HUGE = 10**12


# A permutation


@given(st.integers(1, 3000), st.integers(), st.integers(0, 10**6))
@example(1, 0, 0)
@example(2, 0, 0)
@example(3, 0, 0)
@example(1437, 0, 0)
def test_every_sample_has_exactly_one_position(size: int, seed: int, epoch: int) -> None:
    order = SamplePermutation(size, seed, epoch)
    assert sorted(order[:]) == list(range(size))
    assert len(order) == size


@pytest.mark.parametrize("size", [*range(1, 130), 1023, 1024, 1025])
def test_every_size_is_a_permutation(size: int) -> None:
    assert sorted(SamplePermutation(size, 5, 7)) == list(range(size))


@given(st.integers(1, 10**30), st.integers(), st.data())
def test_samples_are_in_range_and_distinct(size: int, seed: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size - 1))
    order = SamplePermutation(size, seed, 0)
    samples = order[start : min(size, start + 50)]
    assert all(0 <= sample < size for sample in samples)
    assert len(set(samples)) == len(samples)
    assert order[start] == samples[0]


@given(st.integers(1, 500), st.data())
def test_slice_equals_its_single_positions(size: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(0, size))
    order = SamplePermutation(size, 3, 1)
    assert order[start:stop] == [order[position] for position in range(start, stop)]
    assert order[start:] == order[start:size]
    assert order[:stop:1] == order[0:stop]


@given(st.integers(1, 2**48), st.integers(), st.integers(0, 200), st.lists(st.integers(0, 100), max_size=5), st.data())
@example(2**46 - 1, 0, 100, [], None)
@example(2**46, 0, 100, [], None)
@example(2**46 + 1, 0, 100, [], None)
def test_many_samples_together_are_those_of_single_positions(
    size: int, seed: int, length: int, steps: list[int], data: st.DataObject | None
) -> None:
    start = max(0, size - length) if data is None else data.draw(st.integers(0, size))
    order = SamplePermutation(size, seed, 3)
    stop = min(size, start + length)
    expected = [order[position] for position in range(start, stop)]
    assert order[start:stop] == expected
    assert permute_spans([order], [[(start, stop)]]) == [expected]
    cuts = [start, *itertools.accumulate(steps, lambda at, step: min(stop, at + step), initial=start), stop]
    assert list(itertools.chain(*(order[a:b] for a, b in itertools.pairwise(cuts)))) == expected
    spans = [*itertools.pairwise(cuts)][::-1]
    orders = [SamplePermutation(size, seed, epoch) for epoch in (7, 3, 8)]
    assert permute_spans(orders, [spans, [(start, stop)], [(start, start)]]) == [
        [orders[0][position] for a, b in spans for position in range(a, b)],
        expected,
        [],
    ]


@pytest.mark.parametrize("spans", [[(0, 11)], [(0, 5), (-1, 2)], [(11, 11)]])
def test_spans_out_of_range_are_refused(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(IndexError, match="are outside a permutation of 10 samples"):
        permute_spans([SamplePermutation(10, 0, 0)], [spans])


@pytest.mark.parametrize("length", [64, 4096])
def test_slices_are_faster_than_single_positions(length: int) -> None:
    """At 10^6 samples per second and more, a slice takes at most a third of the time of its positions."""

    def measure_s(read: Callable[[SamplePermutation], object]) -> float:
        begin = time.process_time()
        read(SamplePermutation(1_281_167, 0, 0))
        return time.process_time() - begin

    starts = range(0, 16_384, length)
    slices = min(measure_s(lambda order: [order[start : start + length] for start in starts]) for _ in range(3))
    singles = min(measure_s(lambda order: [order[position] for position in range(4096)]) for _ in range(3)) * 4
    assert slices < singles / 3


# Reproducible


@pytest.mark.parametrize(
    ("size", "seed", "epoch", "start", "golden"),
    [
        (1, 0, 0, 0, [0]),
        (2, 0, 0, 0, [1, 0]),
        (3, 0, 0, 0, [1, 2, 0]),
        (10, 0, 0, 0, [3, 1, 0, 8, 9, 2, 6, 7, 5, 4]),
        (1437, 0, 0, 0, [826, 162, 953, 1074, 1381, 272, 571, 421, 989, 38]),
        (1437, 0, 1, 0, [901, 1061, 228, 937, 733, 515, 201, 1195, 150, 1032]),
        (1437, -1, 0, 0, [999, 1016, 926, 266, 714, 894, 637, 633, 984, 255]),
        (
            1_281_167,
            42,
            89,
            1_281_157,
            [269457, 1043251, 975776, 424163, 598977, 1170974, 1058571, 1040458, 1142144, 1096773],
        ),
        (HUGE, 0, 0, HUGE - 6, [138156442831, 280119431554, 899668851054, 729667987120, 798525428158, 506717113421]),
        (
            10**24,
            2**70,
            10**9,
            10**23,
            [
                4455683920339160218021,
                496366126391097766844131,
                88640679471219623838245,
                125237553840311792966365,
                740661245907065618519811,
                757034541388405201393391,
                50460209220860543443140,
                517312929426000739305883,
                809294233277138607451184,
                987499821866842124496062,
            ],
        ),
    ],
)
def test_order_matches_golden_values(size: int, seed: int, epoch: int, start: int, golden: list[int]) -> None:
    assert SamplePermutation(size, seed, epoch)[start : min(size, start + 10)] == golden


def test_orders_differ_by_seed_epoch_and_size() -> None:
    firsts = {
        tuple(SamplePermutation(size, seed, epoch)[:20])
        for size, seed, epoch in itertools.product((1000, 1001), range(-3, 4), range(7))
    }
    assert len(firsts) == 2 * 7 * 7


def test_orders_with_equal_arguments_are_equal() -> None:
    assert SamplePermutation(10, 1, 2) == SamplePermutation(10, 1, 2) != SamplePermutation(10, 1, 3)


# Constant memory


def test_huge_order_uses_constant_memory() -> None:
    tracemalloc.start()
    order = SamplePermutation(HUGE, 0, 0)
    total = sum(order[position] for position in range(0, HUGE, HUGE // 100))
    chunk = order[HUGE // 2 : HUGE // 2 + 1000]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total > 0
    assert len(chunk) == 1000
    assert peak < 1_000_000


def test_iteration_over_huge_order_is_lazy() -> None:
    assert list(itertools.islice(SamplePermutation(HUGE, 0, 0), 3)) == SamplePermutation(HUGE, 0, 0)[:3]


# Edge cases


@pytest.mark.parametrize("position", [-1, 10, 10**9, sys.maxsize + 1])
def test_position_out_of_range_is_refused(position: int) -> None:
    with pytest.raises(IndexError, match=f"position {position} is outside a permutation of 10 samples"):
        SamplePermutation(10, 0, 0)[position]


@pytest.mark.parametrize("positions", [slice(-1, 5), slice(0, 11), slice(11, 11), slice(0, -1)])
def test_slice_out_of_range_is_refused(positions: slice) -> None:
    with pytest.raises(IndexError, match="are outside a permutation of 10 samples"):
        SamplePermutation(10, 0, 0)[positions]


@pytest.mark.parametrize("step", [2, -1, 0])
def test_slice_with_step_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="only slices of step 1 are supported"):
        SamplePermutation(10, 0, 0)[::step]


@pytest.mark.parametrize("size", [0, -1])
def test_empty_order_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="at least 1 is needed"):
        SamplePermutation(size, 0, 0)


# As random as random.shuffle: every statistic is within chance, and the shuffle has the same bound.
# The seeds are fixed, so the result is deterministic. Bounds are in standard deviations.

Orders = Callable[[int, int], Iterator[Sequence[int]]]
BOUND = 4.0


def permutation_orders(size: int, epochs: int) -> Iterator[Sequence[int]]:
    return (SamplePermutation(size, 1234, epoch)[:] for epoch in range(epochs))


def shuffle_orders(size: int, epochs: int) -> Iterator[Sequence[int]]:
    generator = random.Random(1234)
    return (generator.sample(range(size), size) for _ in range(epochs))


BOTH_ORDERS = pytest.mark.parametrize("orders", [permutation_orders, shuffle_orders])


def chi_square_excess(counts: Counter[int], cells: int) -> float:
    """Chi-square against a uniform distribution over cells, in standard deviations above its mean."""
    expected = counts.total() / cells
    square = sum((count - expected) ** 2 for count in counts.values()) / expected + (cells - len(counts)) * expected
    return (square - (cells - 1)) / math.sqrt(2 * (cells - 1))


@BOTH_ORDERS
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_permutations_of_tiny_sizes_are_equally_likely(orders: Orders, size: int) -> None:
    number = {permutation: index for index, permutation in enumerate(itertools.permutations(range(size)))}
    counts = Counter(number[tuple(order)] for order in orders(size, 3000))
    assert chi_square_excess(counts, len(number)) < BOUND


@BOTH_ORDERS
@pytest.mark.parametrize("lag", [1, 2, 38])
@pytest.mark.parametrize(("size", "epochs"), [(10, 2000), (64, 300), (1437, 20), (10_000, 4)])
def test_neighbouring_samples_are_uncorrelated(orders: Orders, size: int, epochs: int, lag: int) -> None:
    """The distance between the samples of two positions `lag` apart is any of 1 ... size - 1."""
    lag %= size
    counts = Counter((b - a) % size for order in orders(size, epochs) for a, b in zip(order, order[lag:], strict=False))
    assert counts[0] == 0
    assert chi_square_excess(counts, size - 1) < BOUND


@BOTH_ORDERS
@pytest.mark.parametrize(("size", "epochs"), [(10, 1000), (100, 200), (1437, 30), (10_000, 5)])
def test_displacement_matches_random_permutation(orders: Orders, size: int, epochs: int) -> None:
    """The mean of |position - sample| is (size² - 1) / 3 size; its variance over permutations is of order size."""
    means = [
        sum(abs(position - sample) for position, sample in enumerate(order)) / size for order in orders(size, epochs)
    ]
    expected = (size * size - 1) / (3 * size)
    deviation = math.sqrt((size + 1) * (2 * size * size + 7) / 45) / size  # of Spearman's footrule (Diaconis 1977)
    assert abs(sum(means) / epochs - expected) < BOUND * deviation / math.sqrt(epochs)


@BOTH_ORDERS
@pytest.mark.parametrize(("size", "epochs"), [(16, 2500), (1437, 30), (10_000, 5)])
def test_data_is_spread_evenly_over_the_epoch(orders: Orders, size: int, epochs: int) -> None:
    counts = Counter(
        position * 8 // size * 8 + sample * 8 // size
        for order in orders(size, epochs)
        for position, sample in enumerate(order)
    )
    expected = size * epochs / 64
    assert all(abs(counts[cell] - expected) < BOUND * math.sqrt(expected) for cell in range(64))


@BOTH_ORDERS
@pytest.mark.parametrize("sort", ["sorted", "striped"])
def test_class_counts_per_batch_are_hypergeometric(orders: Orders, sort: str) -> None:
    """Ten classes, data sorted or interleaved by class: batch counts vary as when drawn without replacement."""
    size, batch, epochs = 1430, 32, 30
    label = {"sorted": lambda sample: sample * 10 // size, "striped": lambda sample: sample % 10}[sort]
    batches = [order[at : at + batch] for order in orders(size, epochs) for at in range(0, size - batch + 1, batch)]
    squares = [(count - batch / 10) ** 2 for samples in batches for count in count_classes([label(s) for s in samples])]
    variance = batch * 0.1 * 0.9 * (size - batch) / (size - 1)  # hypergeometric
    spread = math.sqrt(2 / len(squares))
    assert abs(sum(squares) / len(squares) / variance - 1) < 1.5 * BOUND * spread


def count_classes(labels: Sequence[int]) -> list[int]:
    counts = Counter(labels)
    return [counts[label] for label in range(10)]


@pytest.mark.parametrize("size", [10, 1437])
def test_orders_of_epochs_are_independent(size: int) -> None:
    orders = list(permutation_orders(size, 60))
    counts = Counter(
        (b - a) % size for one, other in itertools.pairwise(orders) for a, b in zip(one, other, strict=True)
    )
    assert chi_square_excess(counts, size) < BOUND
