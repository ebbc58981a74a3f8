"""Updates needed to reach a target, fitted over batch sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.sweep.critical_batch import CriticalBatchFit, describe_fit, fit_critical_batch

sizes = st.lists(st.integers(1, 4096), min_size=4, max_size=9, unique=True)
known = st.builds(CriticalBatchFit, st.floats(1, 1e5), st.floats(1, 1e4))


@given(known, sizes)
def test_fit_recovers_exact_law(law: CriticalBatchFit, batches: list[int]) -> None:
    found = fit_critical_batch([(batch, law.predict_updates(batch)) for batch in batches])
    assert found is not None
    for batch in batches:
        assert found.predict_updates(batch) == pytest.approx(law.predict_updates(batch), rel=1e-6)


@given(sizes, st.data())
def test_fit_is_least_squares(batches: list[int], data: st.DataObject) -> None:
    """Least squares: moving either parameter never reduces the sum of squares."""
    points = [(batch, data.draw(st.floats(1, 1e4))) for batch in batches]
    found = fit_critical_batch(points)
    assert found is not None

    def sum_of_squares(least: float, slope: float) -> float:
        return sum((updates - least - slope / batch) ** 2 for batch, updates in points)

    slope = found.noise * found.min_updates
    least_squares = sum_of_squares(found.min_updates, slope)
    for by in (-1.0, 1.0):
        assert sum_of_squares(found.min_updates + by, slope) >= least_squares - 1e-6 * (1 + least_squares)
        assert sum_of_squares(found.min_updates, slope + by) >= least_squares - 1e-6 * (1 + least_squares)


@given(known)
def test_updates_and_samples_double_at_critical_batch(law: CriticalBatchFit) -> None:
    assert law.predict_updates(law.noise) == pytest.approx(2 * law.min_updates)
    assert law.predict_updates(law.noise) * law.noise == pytest.approx(2 * (law.min_updates * law.noise))


def test_three_sizes_give_no_fit() -> None:
    assert fit_critical_batch([(8, 90.0), (16, 50.0), (32, 30.0), (32, 31.0)]) is None
    assert list(describe_fit([(8, 90.0), (16, 50.0), (32, 30.0)])) == []


def law(least: float, noise: float) -> list[tuple[int, float]]:
    return [(batch, least * (1 + noise / batch)) for batch in (16, 32, 64, 128)]


@pytest.mark.parametrize(
    ("points", "messages"),
    [
        (law(100, 50), ["updates to the target: 100 * (1 + 50 / batch), over 4 batches:", "critical batch size ~50:"]),
        (law(100, 500), ["updates to the target: 100 * (1 + 500 / batch)", "none of these batches wastes samples:"]),
        ([(b, 1000 / b - 1) for b in (16, 32, 64, 128)], ["fall as fast as the batch grows from 16 to 128", "none of"]),
        ([(b, 100.0 + b) for b in (16, 32, 64, 128)], ["do not fall from a batch of 16 to 128", "above 16 waste"]),
    ],
)
def test_critical_batch_is_described(points: list[tuple[int, float]], messages: list[str]) -> None:
    lines = list(describe_fit(points))
    assert all(words in line for words, line in zip(messages, lines, strict=True))
    assert max(map(len, lines)) <= 80
