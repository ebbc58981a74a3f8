"""Which pairs count, the interval of a median, and the tables."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence

import pytest
from paired_runs import (
    Interval,
    MachineBusyError,
    Measurement,
    Pair,
    Pairs,
    collect_pairs,
    compute_interval,
    compute_ratios,
    make_table,
    rotate,
)
from quiet_machine import Calibration, CpuUse, Limits

STEADY = Calibration(0.1, 0.1)
QUIET, BUSY = CpuUse(10.0, 2, 16.0, 0.0, 16.0), CpuUse(10.0, 2, 18.0, 0.0, 16.0)


def make_pair(case: str = "a", use: CpuUse = QUIET, ratio: float = 1.1, calibration: Calibration = STEADY) -> Pair:
    runs = {
        "launcher": Measurement(0.010 * ratio, 0.020 * ratio, 3.0 * ratio, 300e3 * ratio, 290e3, 1000),
        "plain": Measurement(0.010, 0.020, 3.0, 300e3, 290e3, 1000),
    }
    return Pair(case, runs, [calibration] * 3, [QUIET, use])


@pytest.mark.parametrize(("count", "low", "high"), [(6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (20, 6, 15)])
def test_interval_has_the_ranks_of_the_sign_test(count: int, low: int, high: int) -> None:
    """The ranks of tables of the distribution-free 95 % interval of a median, such as Conover's A3."""
    assert compute_interval([*range(count, 0, -1)]) == Interval((count + 1) / 2, low, high)


def test_five_values_have_no_interval() -> None:
    assert compute_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == Interval(3.0, None, None)
    assert "too few pairs" in compute_interval([1.0]).format()


def test_interval_holds_the_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(4000):
        found = compute_interval([draw.expovariate(1.0) for _ in range(10)])
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.6931 <= found.high
    assert 0.97 < held / 4000 < 0.99  # 0.979, the first probability above 0.95 that ten values allow


def test_every_program_has_every_place() -> None:
    orders = [rotate(["plain", "launcher", "accelerate"], number) for number in range(3)]
    assert all(len(set(place)) == 3 for place in zip(*orders, strict=True))


def collect(found: Sequence[Pair], attempts: int = 6, wanted: int = 2) -> tuple[Pairs, list[int]]:
    coming: Iterator[Pair] = iter(found)
    numbers: list[int] = []

    def run_pair(case: str, number: int) -> Pair:
        numbers.append(number)
        return next(coming)

    pairs = Pairs(Limits())
    collect_pairs(["a"], wanted, attempts, run_pair, pairs)
    return pairs, numbers


def test_pair_on_a_busy_machine_is_thrown_away_and_repeated() -> None:
    pairs, numbers = collect([make_pair(), make_pair(use=BUSY, ratio=0.5), make_pair()])
    assert numbers == [0, 1, 2]
    assert compute_ratios(pairs.select_quiet("a"), "launcher", "plain", "wall_s") == pytest.approx([1.1, 1.1])


def test_pairs_before_a_better_calibration_are_repeated() -> None:
    slow = make_pair(calibration=Calibration(0.15, 0.15))
    pairs, numbers = collect([slow, make_pair(), make_pair()])
    assert len(numbers) == 3
    assert slow not in pairs.select_quiet()


def test_too_many_busy_pairs_are_refused() -> None:
    with pytest.raises(MachineBusyError, match=r"a: only 1 of 6 pairs .* 2 are needed; the last one: other processes"):
        collect([make_pair(), *[make_pair(use=BUSY)] * 9])


def test_cases_take_turns() -> None:
    order: list[str] = []

    def run_pair(case: str, number: int) -> Pair:
        order.append(case)
        return make_pair(case, use=BUSY if len(order) == 1 else QUIET)

    collect_pairs(["a", "b"], 2, 4, run_pair, Pairs(Limits()))
    assert order == ["a", "b", "a", "b", "a"]


def test_table_shows_medians_of_ratios_without_busy_pairs() -> None:
    pairs = Pairs(Limits())
    ratios = [1.01, 1.02, 1.03, 1.04, 1.05, 1.06]
    pairs.all = [*(make_pair(ratio=ratio) for ratio in ratios), make_pair(use=BUSY, ratio=9.0)]
    lines = make_table(pairs, {"a": "small"}, ["plain", "launcher"])
    (wall,) = [line for line in lines if line.startswith("| small | 6 × 1000 | 10.00 ")]
    assert f"{statistics.median(ratios):.3f} (1.010 to 1.060)" in wall
    assert "9." not in "".join(lines)
    assert lines[0] == "| wall time per update | updates per run | plain, ms | launcher / plain |"
    assert sum("| launcher / plain |" in line for line in lines) == 5
