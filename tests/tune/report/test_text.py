"""Messages about splits of a batch and slow operators, in text and page."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.tune.measurements import Measurement, Measurements
from launcher.tune.operators import OperatorGrowth
from launcher.tune.report.document import make_tune_document
from launcher.tune.report.html import render_tune_page
from launcher.tune.report.text import describe_slow_operators, describe_splits, format_tune_text
from tests.helpers.measured_sizes import FACTS, measured_size_with_sync


def split_result(
    size: int, accumulation: int, samples_per_s: float, megabytes: int, spread: float = 0.002
) -> Measurement:
    return measured_size_with_sync(
        size, samples_per_s, spread, accumulation=accumulation, memory_bytes=megabytes * 10**6
    )


def make_document(*splits: Measurement, **more: Any) -> dict[str, Any]:
    return make_tune_document(Measurements((measured_size_with_sync(64, 100.0),), splits=splits, **more), FACTS)


def test_split_rows_have_interval_memory_and_sync() -> None:
    rows = make_document(
        split_result(16, 4, 80.0, 75), split_result(64, 1, 100.0, 100), split_result(64, 1, 100.0, 120)
    )["splits"]
    assert [(row["per_device"], row["accumulation"]) for row in rows] == [(64, 1), (16, 4)]
    whole = rows[0]
    assert whole["samples_per_s"] == pytest.approx(100, rel=0.01)
    assert whole["low"] < whole["samples_per_s"] < whole["high"]
    assert whole["sync_ms"] == pytest.approx(1.0)
    assert whole["memory_bytes"] == 100 * 10**6  # left over from an earlier measurement


def test_split_summary_compares_with_fastest() -> None:
    splits = (split_result(64, 1, 100.0, 100), split_result(32, 2, 94.3, 82), split_result(16, 4, 40.0, 100))
    assert describe_splits(make_document(*splits)) == (
        "one batch of 2 x 64 split as 64 x 1, 32 x 2, 16 x 4: 64 x 1 is the fastest, "
        "32 x 2 takes 18 % less memory and 6 % more time, 16 x 4 takes the same memory and 2.5 times the time"
    )


def test_difference_within_error_is_not_called_slower() -> None:
    text = describe_splits(make_document(split_result(64, 1, 100.0, 100, 0.05), split_result(32, 2, 99.0, 80, 0.05)))
    assert text.endswith("32 x 2 takes 20 % less memory and the same time within measurement error")


def test_split_out_of_memory_is_reported() -> None:
    lost = Measurement(64, where="forward", accumulation=1)
    document = make_document(lost, split_result(32, 2, 90.0, 80))
    assert (
        document["splits"][0] | {"samples_per_s": None, "memory_bytes": None, "sync_ms": None} == document["splits"][0]
    )
    assert describe_splits(document).endswith("32 x 2 is the fastest, 64 x 1 runs out of memory")
    assert "64 x 1  out of memory (in forward)" in format_tune_text(document)
    assert "out of memory (forward)" in render_tune_page(document)


def test_single_split_is_not_compared() -> None:
    document = make_document(split_result(16, 4, 80.0, 75))
    assert document["splits"] == []
    assert describe_splits(document) == ""
    assert "one batch as" not in format_tune_text(document)


def test_text_and_page_show_splits() -> None:
    document = make_document(
        split_result(64, 1, 100.0, 100), split_result(32, 2, 94.3, 82), split_result(16, 4, 40.0, 100)
    )
    text = format_tune_text(document)
    assert max(map(len, text.splitlines())) <= 80
    assert [line.split()[:4] for line in text.splitlines() if " x " in line and line.startswith("  ")] == [
        ["64", "x", "1", "100"], ["32", "x", "2", "94.3"], ["16", "x", "4", "40"],
    ]  # fmt: skip
    assert "<td>32 x 2</td>" in render_tune_page(document)


def test_slow_operators_are_described() -> None:
    operators = (
        OperatorGrowth("aten::convolution_backward", "backward", 20, 45, 0.5, 0.8),
        OperatorGrowth("aten::copy_", "backward", 20, 45, 0.0, 0.012),
    )
    document = make_document(operators=operators)
    assert describe_slow_operators(document["operators"]) == (
        "in the backward pass at 45 compared with 20, aten::convolution_backward takes 1.6 times as long per sample, "
        "aten::copy_ is new at 12 us per sample"
    )
    assert "In the backward pass at 45 compared with 20" in format_tune_text(document)
    assert "aten::convolution_backward takes 1.6 times" in render_tune_page(document)
    assert describe_slow_operators(make_document()["operators"]) == ""
