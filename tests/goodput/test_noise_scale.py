"""The gradient noise scale: unbiased for any grouping, valid intervals, unknown if it cannot be estimated."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.goodput.noise_scale import NoiseScale, changed_by_factor, compute_efficiency, estimate_variance_and_square
from launcher.plan.lr_schedule import noise_gain

DIMENSIONS = 20


def square_norms(gradients: Sequence[Sequence[float]], shares: Sequence[int]) -> tuple[list[float], float]:
    """Squared norms of the mean gradients of the groups and of the update."""
    batch = sum(shares)
    mean = [sum(b * g for b, g in zip(shares, column, strict=True)) / batch for column in zip(*gradients, strict=True)]
    return [sum(x * x for x in gradient) for gradient in gradients], sum(x * x for x in mean)


def simulate_updates(
    seed: int, noise: float, shares: Sequence[int], updates: int, norm: float = 1.0
) -> Iterator[tuple[list[float], float]]:
    """A quadratic with a true gradient of this norm and sample gradients that vary to give this noise scale."""
    draw = random.Random(seed)
    true = norm / math.sqrt(DIMENSIONS)
    spread = norm * math.sqrt(noise / DIMENSIONS)
    for _ in range(updates):
        gradients = [[draw.gauss(true, spread / math.sqrt(b)) for _ in range(DIMENSIONS)] for b in shares]
        yield square_norms(gradients, shares)


def train_scale(seed: int, noise: float, shares: Sequence[int], updates: int) -> NoiseScale:
    scale = NoiseScale()
    for norms, mean in simulate_updates(seed, noise, shares, updates):
        scale = scale.update(shares, norms, mean)
    return scale


# --- one update ---------------------------------------------------------------------------------------------------


def test_estimate_of_two_groups_by_hand() -> None:
    variance, square = estimate_variance_and_square([4, 4], [3.0, 1.0], 1.5)
    assert variance == 4 * 3.0 + 4 * 1.0 - 8 * 1.5
    assert square == 1.5 - 4.0 / 8


@given(
    st.lists(st.integers(-9, 9), min_size=5, max_size=5),
    st.sampled_from([(1, 1), (1, 2), (2, 2), (3, 1), (1, 1, 1), (2, 1, 1), (1, 1, 1, 1)]),
)
def test_estimate_is_unbiased_for_any_grouping(samples: list[int], shares: tuple[int, ...]) -> None:
    """Over all orders of a data set the mean of S is its variance, and that of |G|^2 its squared mean minus S / N."""
    mean = sum(samples) / 5
    variance = sum((x - mean) ** 2 for x in samples) / 4
    found = []
    for order in permutations(samples):
        rest = iter(order)
        groups = [[sum(next(rest) for _ in range(share)) / share] for share in shares]
        found.append(estimate_variance_and_square(shares, *square_norms(groups, shares)))
    assert math.isclose(sum(s for s, _ in found) / len(found), variance, rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(sum(g for _, g in found) / len(found), mean**2 - variance / 5, rel_tol=1e-9, abs_tol=1e-9)


GROUPS = st.lists(st.tuples(st.integers(1, 64), st.floats(-10, 10)), min_size=2, max_size=6)


@given(GROUPS, st.randoms(use_true_random=False))
def test_estimate_ignores_group_order_and_empty_groups(groups: list[tuple[int, float]], shuffle: random.Random) -> None:
    shares, values = zip(*groups, strict=True)
    norms, mean = square_norms([[value] for value in values], shares)
    mixed = [*zip(shares, norms, strict=True), (0, 1e9)]
    shuffle.shuffle(mixed)
    again = estimate_variance_and_square([share for share, _ in mixed], [norm for _, norm in mixed], mean)
    assert again == pytest.approx(estimate_variance_and_square(shares, norms, mean), rel=1e-9, abs=1e-9)


@given(st.floats(1e-6, 1e6), st.integers(1, 50))
def test_scale_is_in_samples_for_any_unit(unit: float, times: int) -> None:
    plain, scaled, larger = NoiseScale(), NoiseScale(), NoiseScale()
    for norms, mean in simulate_updates(3, 5.0, (8, 8), 30):
        plain = plain.update((8, 8), norms, mean)
        scaled = scaled.update((8, 8), [unit * norm for norm in norms], unit * mean)
        larger = larger.update((8 * times, 8 * times), norms, mean)
    assert plain.scale is not None
    assert scaled.scale == pytest.approx(plain.scale, rel=1e-6)
    assert larger.scale == pytest.approx(plain.scale * times, rel=1e-6)


# --- many updates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(16, 16), (10, 7, 3), (1, 31), (8, 8, 8, 8), (0, 16, 16)])
def test_known_scale_is_estimated_within_20_percent(shares: tuple[int, ...]) -> None:
    found = [train_scale(seed, 30.0, [b for b in shares if b], 150).scale for seed in range(9)]
    known = sorted(scale for scale in found if scale is not None)
    assert len(known) >= 8
    assert known[len(known) // 2] == pytest.approx(30.0, rel=0.2)


@pytest.mark.parametrize(
    ("noise", "shares", "updates"),
    [(30.0, (16, 16), 120), (30.0, (10, 7, 3), 120), (5.0, (16, 16, 16), 40), (300.0, (8, 8), 120)],
)
def test_interval_covers_true_scale(noise: float, shares: tuple[int, ...], updates: int) -> None:
    """Includes infinity: where noise hides the gradient, the interval is a lower bound (`at least`)."""
    trials = 60
    intervals = [train_scale(seed, noise, shares, updates).interval for seed in range(trials)]
    covered = sum(interval is None or interval[0] <= noise <= interval[1] for interval in intervals)
    assert covered >= 0.9 * trials
    assert sum(interval is None for interval in intervals) <= 0.1 * trials


def test_vanishing_gradient_gives_only_a_lower_bound() -> None:
    noisy = train_scale(1, 1e6, (8, 8), 150)
    assert noisy.scale is None
    assert noisy.interval is not None
    assert noisy.interval[0] > 16
    assert noisy.interval[1] == math.inf
    assert noisy.to_metrics(16, 16) == {"noise/scale_low": noisy.interval[0]}


def test_too_few_updates_give_no_scale() -> None:
    few = train_scale(0, 5.0, (16, 16), 15)
    assert (few.scale, few.interval, few.to_metrics(32, 32)) == (None, None, {})


def test_scale_follows_fading_gradient() -> None:
    """Five half-lives after the gradient has halved, the scale has quadrupled."""
    shares = (16, 16, 16, 16)
    scale = train_scale(0, 10.0, shares, 125)
    before = scale.scale
    for norms, mean in simulate_updates(1, 40.0, shares, 125, norm=0.5):
        scale = scale.update(shares, norms, mean)
    assert before == pytest.approx(10.0, rel=0.2)
    assert scale.scale == pytest.approx(40.0, rel=0.3)


def test_window_is_bounded() -> None:
    """After eight half-lives, in blocks of five updates."""
    assert len(train_scale(0, 5.0, (4, 4), 303).window) == 40
    assert len(train_scale(0, 5.0, (4, 4), 303).block) == 3


def test_skipped_updates_and_single_groups_are_ignored() -> None:
    scale = train_scale(0, 5.0, (4, 4), 20)
    assert scale.update((4, 4), [math.nan, 1.0], 1.0) is scale
    assert scale.update((4, 4), [math.inf, 1.0], math.inf) is scale
    assert scale.update((8,), [1.0], 1.0) is scale
    assert scale.update((8, 0), [1.0, 0.0], 1.0) is scale


def test_token_counts_convert_to_samples() -> None:
    """The same gradients over 100 tokens per sample: 32 samples are 3200 tokens, the scale stays in samples."""
    samples, tokens = NoiseScale(), NoiseScale()
    for norms, mean in simulate_updates(0, 20.0, (16, 16), 60):
        samples = samples.update((16, 16), norms, mean)
        tokens = tokens.update((1600, 1600), norms, mean, samples=32)
    assert tokens.scale == pytest.approx(samples.scale)


# --- small data sets ----------------------------------------------------------------------------------------------


def test_finite_population_correction_is_applied() -> None:
    """50 samples with a true noise scale of 3.69: 4.07 before the finite-population correction, 3.69 after it."""
    uncorrected, truth = estimate_on_small_dataset(NoiseScale()), 3.69
    corrected = estimate_on_small_dataset(NoiseScale(dataset_size=50))
    assert uncorrected == pytest.approx(truth * 50 / (49 - truth), rel=0.02)
    assert corrected == pytest.approx(truth, rel=0.02)
    assert abs(corrected - truth) < abs(uncorrected - truth) / 3


def estimate_on_small_dataset(scale: NoiseScale) -> float:
    """Mean over many windows of updates of two times 10 samples out of 50."""
    draw = random.Random(0)
    spread = [draw.gauss(0, 1) for _ in range(50)]
    middle = sum(spread) / 50
    deviation = math.sqrt(sum((x - middle) ** 2 for x in spread) / 50)
    data = [1 + (x - middle) / deviation * math.sqrt(3.69) for x in spread]
    variances, squares = 0.0, 0.0
    for _ in range(10_000):
        chosen = draw.sample(data, 20)
        halves = [[sum(chosen[:10]) / 10], [sum(chosen[10:]) / 10]]
        variance, square = estimate_variance_and_square((10, 10), *square_norms(halves, (10, 10)))
        variances, squares = variances + variance, squares + square
    variance, square = variances / 10_000, squares / 10_000
    for _ in range(200):
        scale = scale.update((10, 10), [variance / 20 + square + variance / 20] * 2, square + variance / 20)
    assert scale.scale is not None
    return scale.scale


def test_interval_is_capped_by_dataset_size() -> None:
    noisy = train_scale(1, 1e6, (8, 8), 150)
    small = NoiseScale(dataset_size=50, window=noisy.window)
    assert small.interval is not None
    assert small.interval[1] == 49


# --- logging and use of the scale ---------------------------------------------------------------------------------


def test_change_is_applied_at_factor_two() -> None:
    assert [changed_by_factor(None, None), changed_by_factor(8, None), changed_by_factor(None, 8)] == [
        False,
        False,
        True,
    ]
    assert [changed_by_factor(8, now) for now in (4, 4.1, 15.9, 16)] == [True, False, False, True]


def test_applied_scale_is_constant_between_changes() -> None:
    scale, acted = NoiseScale(), set()
    for norms, mean in simulate_updates(2, 20.0, (16, 16), 200):
        scale = scale.update((16, 16), norms, mean)
        acted.add(scale.applied)
    assert len(acted) <= 3
    assert scale.applied is not None
    assert scale.applied / 2 < (scale.scale or 0) < scale.applied * 2


def test_lower_bound_applies_until_scale_is_known() -> None:
    """Before both ends of the interval are known, the lower bound is logged in steps of two, until a scale applies."""
    scale, least = NoiseScale(), []
    for norms, mean in simulate_updates(2, 100.0, (16, 16), 400):
        scale = scale.update((16, 16), norms, mean)
        if scale.applied is None and scale.lower_bound not in (None, *least[-1:]):
            assert scale.interval is not None
            assert scale.lower_bound == scale.interval[0]
            least.append(scale.lower_bound)
    assert scale.applied is not None
    assert least
    assert least[0] < 100
    assert scale.lower_bound == least[-1]
    assert all(changed_by_factor(before, now) for before, now in pairwise(least))


def test_state_round_trips_through_json() -> None:
    scale = train_scale(5, 20.0, (16, 16), 60)
    again = NoiseScale.from_facts(json.loads(json.dumps(scale.to_facts())))
    assert again == scale
    assert (again.scale, again.interval, again.applied) == (scale.scale, scale.interval, scale.applied)
    assert again.update((16, 16), [1.0, 2.0], 1.0) == scale.update((16, 16), [1.0, 2.0], 1.0)


@given(st.floats(1, 1e4), st.floats(1, 1e4), st.floats(0, 1e6))
def test_efficiency_equals_gain_per_sample(batch: float, base: float, noise: float) -> None:
    """Gain per update over the relative size of the updates."""
    assert compute_efficiency(batch, base, noise) == pytest.approx(noise_gain(batch, base, noise) * base / batch)
    assert compute_efficiency(base, base, noise) == pytest.approx(1.0)


def test_metric_keys_of_noise() -> None:
    scale = train_scale(0, 20.0, (16, 16), 60)
    values = scale.to_metrics(32, 64)
    assert list(values) == ["noise/scale", "noise/efficiency", "noise/scale_low", "noise/scale_high"]
    assert values["noise/scale_low"] < values["noise/scale"] < values["noise/scale_high"]
    assert values["noise/efficiency"] > 1


@pytest.mark.parametrize("wrong", [{"half_life": 0}, {"half_life": math.nan}, {"dataset_size": 1}])
def test_invalid_arguments_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be (more than 0|at least 2)$"):
        NoiseScale(**wrong)  # type: ignore[arg-type]
