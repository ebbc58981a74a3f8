"""Time limits and node ranges of Slurm."""

from __future__ import annotations

import pytest

from launcher.config.slurm_syntax import format_time_limit, parse_node_range


@pytest.mark.parametrize(
    ("typed", "minutes"),
    [("4h", "240"), ("30min", "30"), ("90s", "2"), ("1.5h", "90"), ("2d", "2880"), ("45", "45"), ("1-12:00:00",) * 2],
)
def test_time_limits_are_converted_to_minutes(typed: str, minutes: str) -> None:
    assert format_time_limit(typed) == minutes


def test_node_ranges_are_parsed() -> None:
    assert (parse_node_range("3"), parse_node_range("2-4")) == ((3, 3), (2, 4))
