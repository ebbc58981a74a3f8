"""A model of memory over images of several sizes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.tune.report.image_memory import ImageMemoryModel, PeakMemory
from tests.helpers.measured_sizes import FIXED_BYTES, PIXEL_BYTES


def make_peaks(*sizes: tuple[int, int], off: Callable[[], float] = lambda: 0.0) -> list[PeakMemory]:
    """Memory of 310 MB + 1.9 kB x per_device x pixels, each with a relative error."""
    return [
        PeakMemory(h, w, m, round((FIXED_BYTES + PIXEL_BYTES * m * h * w) * (1 + off())))
        for h, w in sizes
        for m in (8, 16, 32)
    ]


def test_two_image_sizes_separate_fixed_memory() -> None:
    found = ImageMemoryModel.from_peaks(make_peaks((32, 32), (64, 48)))
    assert found is not None
    assert found.fixed_bytes.value == pytest.approx(FIXED_BYTES)
    assert found.pixel_bytes.value == pytest.approx(PIXEL_BYTES)
    assert found.within < 1e-6
    assert found.sizes == ((32, 32), (64, 48))
    assert found.describe() == (
        "A worker's memory is about 310 MB + 1.9 kB x per_device x height x width, within 1 % of what was measured at "
        "recipe.image_size=32,[64,48]."
    )


@given(fixed=st.floats(1e6, 1e10), each=st.floats(100, 1e5), large=st.integers(33, 512))
def test_exact_memory_values_are_recovered(fixed: float, each: float, large: int) -> None:
    found = ImageMemoryModel.from_peaks(
        [PeakMemory(s, s, m, round(fixed + each * m * s * s)) for s in (32, large) for m in (2, 64)]
    )
    assert found is not None
    assert found.fixed_bytes.value == pytest.approx(fixed, rel=1e-3)
    assert found.pixel_bytes.value == pytest.approx(each, rel=1e-3)


def test_noisy_memory_values_are_estimated() -> None:
    noise = random.Random(0)
    found = ImageMemoryModel.from_peaks(
        make_peaks((32, 32), (64, 64), (96, 96), off=lambda: noise.uniform(-0.03, 0.03))
    )
    assert found is not None
    assert found.fixed_bytes.low < FIXED_BYTES < found.fixed_bytes.high
    assert found.pixel_bytes.low < PIXEL_BYTES < found.pixel_bytes.high
    assert found.pixel_bytes.value == pytest.approx(PIXEL_BYTES, rel=0.05)
    assert 0.01 < found.within < 0.05
    assert f"within {int(100 * found.within) + 1} % of" in found.describe()


def test_constant_memory_is_described() -> None:
    found = ImageMemoryModel.from_peaks([PeakMemory(s, s, m, 300_000_000) for s in (8, 16) for m in (4, 8)])
    assert found is not None
    assert found.describe().startswith("A worker's memory is about 300 MB regardless of per_device and image size")
    assert found.to_facts()["pixel_bytes"]["value"] == 0.0


@pytest.mark.parametrize(
    "measured",
    [
        [],
        make_peaks((32, 32)),
        make_peaks((32, 64), (64, 32)),  # as many pixels: c height width stays one unknown
        [PeakMemory(8, 8, 4, 10**8), PeakMemory(16, 16, 4, 2 * 10**8)],  # any two lie on a line
        [PeakMemory(8, 8, 4, 10**8), PeakMemory(8, 8, 8, 10**8), PeakMemory(16, 16, 1, 2 * 10**8)],  # 4 x 64 = 1 x 256
    ],
)
def test_too_few_peaks_give_no_model(measured: list[PeakMemory]) -> None:
    assert ImageMemoryModel.from_peaks(measured) is None
