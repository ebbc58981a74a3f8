"""Numbers, durations and shares as people read them."""

from __future__ import annotations

from launcher.system.formatting import (
    format_clock,
    format_count,
    format_duration,
    format_number,
    format_shares,
    wrap_text,
)


def test_numbers_are_formatted() -> None:
    assert [format_number(value) for value in (0.0213456, 12.5, 1437.2, 1.2e-5, 0.1, float("nan"))] == [
        "0.0213", "12.5", "1,437", "1.2e-05", "0.1", "nan",
    ]  # fmt: skip
    assert [format_clock(seconds) for seconds in (9, 75, 3723, 90000)] == ["0:09", "1:15", "1:02:03", "1d 1:00:00"]
    assert [format_duration(seconds) for seconds in (0.5, 14.21, 75)] == ["0.5 s", "14.2 s", "1:15"]
    assert format_count(1437) == "1,437"
    assert [format_shares(parts) for parts in ([32, 32], [86, 85, 85], [1])] == ["32", "(86, 85x2)", "1"]
    assert format_shares([9, 8, 7, 6, 5, 4, 3]) == "(9, 8, 7, 6, 5, …)"
    assert wrap_text("a bb ccc", 4, 2) == ["a bb ccc"]
