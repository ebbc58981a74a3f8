"""Sums over the ranks in a fixed order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.plan.virtual_shards import compute_tree_sum
from launcher.telemetry.tensor_sums import sum_rows_as_tree

NUMBERS = st.floats(-1e6, 1e6) | st.sampled_from([1e-9, 0.1, 1e17, float("inf"), float("nan")])


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=40))
def test_sum_has_the_bits_of_the_sum_number_by_number(rows: list[tuple[float, float]]) -> None:
    found = sum_rows_as_tree(torch.tensor(rows, dtype=torch.float64)).tolist()
    expected = [float(compute_tree_sum(column)) for column in zip(*rows, strict=True)]
    assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_sum_of_no_rows_is_zero() -> None:
    assert sum_rows_as_tree(torch.zeros(0, 3)).tolist() == [0.0] * 3
