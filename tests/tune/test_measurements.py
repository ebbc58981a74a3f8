"""Measurements: intervals of throughput, and their JSON."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from launcher.tune.measurements import Measurement, Measurements, estimate_throughput
from tests.helpers.measured_sizes import make_measurements, measured_size, measured_size_with_sync


@given(st.lists(st.floats(1.0, 1e6), min_size=1, max_size=12))
def test_throughput_interval_contains_its_value(speeds: list[float]) -> None:
    value, low, high = estimate_throughput(tuple(speeds))
    assert 0 < low <= value * (1 + 1e-9)
    assert value <= high * (1 + 1e-9)


def test_measurements_round_trip() -> None:
    whole = make_measurements(measured_size(8, 10.0), Measurement(16, where="forward"), only=(8, 16), notes=("one",))
    assert Measurements.from_facts(whole.to_facts()) == whole


def test_regression_is_compared_with_fastest_size() -> None:
    trace = {10: 21.4, 14: 25.1, 20: 29.4, 28: 32.9, 40: 35.7, 57: 34.3, 80: 31.5}
    pair = Measurements(tuple(measured_size_with_sync(*point) for point in trace.items())).find_regression()
    assert pair is not None
    assert [one.size for one in pair] == [40, 57]
    assert (
        Measurements((measured_size_with_sync(10, 20.0), measured_size_with_sync(20, 40.0))).find_regression() is None
    )
