"""Measurements: intervals of throughput, and their JSON."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from launcher.tune.measurements import Measurement, Measurements, estimate_throughput
from tests.helpers.measured_sizes import make_measurements, measured_size


@given(st.lists(st.floats(1.0, 1e6), min_size=1, max_size=12))
def test_throughput_interval_contains_its_value(speeds: list[float]) -> None:
    value, low, high = estimate_throughput(tuple(speeds))
    assert 0 < low <= value * (1 + 1e-9)
    assert value <= high * (1 + 1e-9)


def test_measurements_round_trip() -> None:
    whole = make_measurements(measured_size(8, 10.0), Measurement(16, where="forward"), only=(8, 16), notes=("one",))
    assert Measurements.from_facts(whole.to_facts()) == whole
