"""Quantiles of the t distribution."""

from __future__ import annotations

import pytest

from launcher.system.statistics import student_t_quantile


@pytest.mark.parametrize(
    ("freedom", "reach"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)]
)
def test_student_t_quantile_matches_tables(freedom: float, reach: float) -> None:
    assert student_t_quantile(freedom) == pytest.approx(reach, rel=2e-3)
