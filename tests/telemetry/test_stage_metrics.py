"""Metrics from the stage times of all ranks: those of a loop over the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.telemetry.stage_metrics import compute_stage_metrics, median_of_rows
from launcher.telemetry.stages import STAGES

MILLISECONDS = st.sampled_from([0.0, 0.1, 0.7, 1.3, 2.0, 40.0, 1 / 3])
ROWS = st.lists(st.tuples(*[MILLISECONDS] * len(STAGES)), min_size=1, max_size=6)


def make_metrics_by_loop(stages_ms: Sequence[Sequence[float]], samples: int) -> dict[str, float]:
    """The definition, rank by rank."""
    rank = min(range(len(stages_ms)), key=lambda index: stages_ms[index][STAGES.index("sync")])
    wall_ms = sum(stages_ms[rank]) or math.nan
    values: dict[str, float] = {"stage/rank": rank}
    for index, stage in enumerate(STAGES):
        own_ms = stages_ms[rank][index]
        values |= {f"stage/{stage}/ms": own_ms, f"stage/{stage}/share": own_ms / wall_ms}
        if own_ms > 0:
            values[f"stage/{stage}/samples_per_s"] = samples / own_ms * 1e3
        if len(stages_ms) > 1:
            values[f"stage/{stage}/ms_min"] = min(row[index] for row in stages_ms)
            values[f"stage/{stage}/ms_max"] = max(row[index] for row in stages_ms)
    return values


@given(ROWS, st.integers(1, 100))
def test_metrics_are_those_of_a_loop_over_the_ranks(rows: list[tuple[float, ...]], samples: int) -> None:
    expected = make_metrics_by_loop(rows, samples)
    for times in (rows, torch.tensor(rows, dtype=torch.float64)):
        found = compute_stage_metrics(times, samples)
        assert list(found) == list(expected)
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=0, abs=0, nan_ok=True)


def test_median_of_an_even_number_of_rows_is_the_mean_of_the_middle_two() -> None:
    assert median_of_rows(torch.tensor([[1.0, 5.0], [3.0, 1.0]], dtype=torch.float64)).tolist() == [2.0, 3.0]
