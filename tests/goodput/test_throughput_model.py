"""Measured sizes give labels, a knee, a linear fit, and a memory model."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.goodput.throughput_model import (
    LinearFit,
    MeasuredSize,
    ThroughputModel,
    fit,
    fit_line,
    fit_memory,
    knee,
    label,
    recommend_sizes,
)

TRACE = {10: 21.4, 14: 25.1, 20: 29.4, 28: 32.9, 40: 35.7, 57: 34.3, 80: 31.5}


def measured_sizes(trace: dict[int, float | None], within: float = 0.0) -> list[MeasuredSize]:
    return [
        MeasuredSize(size, speed, speed * (1 - within), speed * (1 + within)) if speed else MeasuredSize(size, None)
        for size, speed in trace.items()
    ]


# --- labels -------------------------------------------------------------------------------------------------------


def test_example_trace_is_labelled() -> None:
    advice = recommend_sizes(measured_sizes({**TRACE, 113: None}))
    assert (advice.knee, advice.fastest, advice.recommended, advice.memory_max) == (28, 40, 28, 80)
    assert advice.labels == {
        **dict.fromkeys((10, 14, 20), "rising"),
        28: "knee",
        40: "saturated",
        **dict.fromkeys((57, 80), "regressed"),
        113: "oom",
    }


def test_drop_within_noise_is_not_a_regression() -> None:
    assert label(measured_sizes(TRACE, within=0.03))[57] == "saturated"
    assert label(measured_sizes(TRACE, within=0.03))[80] == "regressed"


def test_batch_45_is_compared_with_20() -> None:
    """Is a batch of 45 slower than one of 20? If so, that is reported and 20 is recommended."""
    assert label(measured_sizes({20: 100.0, 45: 92.0}, within=0.01)) == {20: "knee", 45: "regressed"}
    assert label(measured_sizes({20: 100.0, 45: 104.0}, within=0.01)) == {20: "knee", 45: "saturated"}
    assert label(measured_sizes({20: 100.0, 45: 130.0}, within=0.01)) == {20: "rising", 45: "knee"}


def test_recommendation_respects_memory_max() -> None:
    assert recommend_sizes(measured_sizes(TRACE), memory_max=24).recommended == 24


@given(
    alpha=st.floats(1e-4, 1e-1),
    beta=st.floats(1e-5, 1e-2),
    seed=st.integers(0, 1000),
    fall=st.floats(0.0, 0.5),
)
def test_noisy_traces_get_labels_of_their_shape(alpha: float, beta: float, seed: int, fall: float) -> None:
    """Speeds along m / (alpha + beta m), with a drop at the end: within the noise, or clearly above it."""
    sizes = [round(8 * math.sqrt(2) ** step) for step in range(10)]
    clean: dict[int, float] = {size: size / (alpha + beta * size) for size in sizes}
    clean[512] = clean[sizes[-1]] * (1 - fall)
    draw = random.Random(seed)
    noisy = [
        MeasuredSize(size, x := speed * draw.uniform(0.99, 1.01), x * 0.98, x * 1.02) for size, speed in clean.items()
    ]
    labels = label(noisy)
    best = max(clean.values())
    turning = knee(noisy)
    assert clean[turning] >= 0.88 * best
    assert all(labels[size] == "rising" for size in labels if size < turning)
    assert all(labels[size] != "regressed" for size in sizes)
    if fall > 0.08 and turning < 512:
        assert labels[512] == "regressed"
    if fall < 0.01:
        assert labels[512] in ("saturated", "knee")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([MeasuredSize(8, None)], "no size works"),
        ([], "no size works"),
        ([MeasuredSize(8, 1.0, 1.0, 1.0)] * 2, "measured twice"),
        ([MeasuredSize(8, 2.0, 3.0, 4.0)], "not a valid measurement"),
        ([MeasuredSize(8, math.nan, 1.0, 2.0)], "not a valid measurement"),
    ],
)
def test_invalid_measurements_are_refused(wrong: list[MeasuredSize], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label(wrong)


# --- linear fits --------------------------------------------------------------------------------------------------


def test_fit_separates_overhead_from_work() -> None:
    model = fit(measured_sizes({size: size / (0.02 + 0.001 * size) for size in (8, 16, 32, 64)}))
    assert model.alpha_s.value == pytest.approx(0.02)
    assert model.beta_s.value == pytest.approx(0.001)
    assert model.compute_overhead(20) == pytest.approx(0.5)
    assert model.predict_samples_per_s(100).value == pytest.approx(100 / 0.12)
    assert model.find_knee() == pytest.approx(180)


def test_regressed_sizes_do_not_affect_fit() -> None:
    clean = {size: size / (0.02 + 0.001 * size) for size in (8, 16, 32, 64)}
    assert fit(measured_sizes({**clean, 128: 100.0})).beta_s.value == pytest.approx(0.001)


def test_fitted_constants_are_never_negative() -> None:
    assert fit_line([1, 2, 3], [1, 3, 5], [0, 0, 0]).intercept == 0
    assert fit_line([1, 2, 3], [5, 3, 1], [0, 0, 0]).slope == 0
    with pytest.raises(ValueError, match="needs two"):
        fit_line([2, 2], [1, 1], [0, 0])


def test_line_through_two_sizes_has_unbounded_error() -> None:
    line = fit_line([8, 16], [1.0, 1.5], [0, 0])
    assert line.predict(32).value == pytest.approx(2.5)
    assert line.predict(32).high == math.inf


def test_fit_intervals_cover_true_values() -> None:
    """The constants and the time at an unmeasured size are covered in at least 90 of 100 noisy measurements."""
    covered = {"alpha": 0, "beta": 0, "time": 0}
    for seed in range(100):
        draw = random.Random(seed)
        trace = {size: size / ((0.02 + 0.001 * size) * draw.gauss(1, 0.02)) for size in (8, 11, 16, 23, 32, 45)}
        model = fit(measured_sizes(trace, within=0.04 if seed % 2 else 0.0))
        covered["alpha"] += model.alpha_s.low <= 0.02 <= model.alpha_s.high
        covered["beta"] += model.beta_s.low <= 0.001 <= model.beta_s.high
        covered["time"] += model.predict_time_s(64).low <= 0.084 <= model.predict_time_s(64).high
    assert min(covered.values()) >= 90


def test_memory_is_predicted_from_three_sizes() -> None:
    model = fit_memory([(8, 3.0e9), (16, 4.0e9), (32, 6.0e9)])
    assert model.predict_bytes(64).value == pytest.approx(10.0e9)
    assert model.find_largest_size(16.0e9) == int((0.92 * 16e9 - 2e9) / 0.125e9)
    assert model.find_largest_size(1.0e9) == 0
    assert fit_memory([(8, 3.0e9), (16, 3.0e9), (32, 3.0e9)]).find_largest_size(16e9) is None
    with pytest.raises(ValueError, match="3 sizes or more"):
        fit_memory([(8, 3.0e9), (16, 4.0e9)])


def test_image_memory_grows_with_area() -> None:
    """Size is m x H x W: probes at 32 pixels predict 64 pixels."""
    model = fit_memory([(m * 32 * 32, 1e9 + 5e4 * m * 32 * 32) for m in (8, 16, 32)])
    assert model.predict_bytes(8 * 64 * 64).value == pytest.approx(1e9 + 5e4 * 8 * 64 * 64)


# --- the batch with the highest goodput ---------------------------------------------------------------------------


def test_zero_slope_has_no_knee() -> None:
    assert ThroughputModel(LinearFit(1.0, 0.0, (0, 0, 0), 2.0)).find_knee() == math.inf
