"""Updates needed to reach a target, fitted over batch sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.sweep.critical_batch import CriticalBatchFit, describe_fit, fit_critical_batch

sizes = st.lists(st.integers(1, 4096), min_size=4, max_size=9, unique=True)
known = st.builds(CriticalBatchFit, st.floats(1, 1e5), st.floats(1, 1e4))


@given(known, sizes)
def test_exact_updates_give_their_own_law_back(law: CriticalBatchFit, batches: list[int]) -> None:
    found = fit_critical_batch([(batch, law.predict_updates(batch)) for batch in batches])
    assert found is not None
    for batch in batches:
        assert found.predict_updates(batch) == pytest.approx(law.predict_updates(batch), rel=1e-6)


@given(sizes, st.data())
def test_no_other_line_is_nearer(batches: list[int], data: st.DataObject) -> None:
    """Least squares: moving either parameter never reduces the sum of squares."""
    points = [(batch, data.draw(st.floats(1, 1e4))) for batch in batches]
    found = fit_critical_batch(points)
    assert found is not None

    def off(least: float, slope: float) -> float:
        return sum((updates - least - slope / batch) ** 2 for batch, updates in points)

    slope = found.noise * found.min_updates
    here = off(found.min_updates, slope)
    for by in (-1.0, 1.0):
        assert off(found.min_updates + by, slope) >= here - 1e-6 * (1 + here)
        assert off(found.min_updates, slope + by) >= here - 1e-6 * (1 + here)


@given(known)
def test_at_the_noise_both_updates_and_samples_are_twice_the_least(law: CriticalBatchFit) -> None:
    assert law.predict_updates(law.noise) == pytest.approx(2 * law.min_updates)
    assert law.predict_updates(law.noise) * law.noise == pytest.approx(2 * (law.min_updates * law.noise))


def test_three_sizes_are_too_few_however_often_measured() -> None:
    assert fit_critical_batch([(8, 90.0), (16, 50.0), (32, 30.0), (32, 31.0)]) is None
    assert list(describe_fit([(8, 90.0), (16, 50.0), (32, 30.0)])) == []


def law(least: float, noise: float) -> list[tuple[int, float]]:
    return [(batch, least * (1 + noise / batch)) for batch in (16, 32, 64, 128)]


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (law(100, 50), ["updates to the target: 100 * (1 + 50 / batch), over 4 batches:", "critical batch size ~50:"]),
        (law(100, 500), ["updates to the target: 100 * (1 + 500 / batch)", "none of these batches wastes samples:"]),
        ([(b, 1000 / b - 1) for b in (16, 32, 64, 128)], ["fall as fast as the batch grows from 16 to 128", "none of"]),
        ([(b, 100.0 + b) for b in (16, 32, 64, 128)], ["do not fall from a batch of 16 to 128", "above 16 waste"]),
    ],
)
def test_the_batch_past_which_samples_are_wasted_is_named(points: list[tuple[int, float]], said: list[str]) -> None:
    lines = list(describe_fit(points))
    assert all(words in line for words, line in zip(said, lines, strict=True))
    assert max(map(len, lines)) <= 80
