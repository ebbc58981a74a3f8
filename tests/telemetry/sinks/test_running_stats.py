"""Stage shares over the rows of a run."""

from __future__ import annotations

import pytest

from launcher.telemetry.records import MetricsRow
from launcher.telemetry.sinks.running_stats import RunningStats

STAGES_MS = {"data": 2.0, "forward": 10.0, "backward": 20.0, "sync": 6.0, "other": 2.0}


def make_row(update: int, **values: float) -> MetricsRow:
    stages = {f"stage/{stage}/ms": ms for stage, ms in STAGES_MS.items()}
    row = {"train/loss": 2.0 / update, "lr/value": 0.1, **stages, **values}
    return MetricsRow(1000 + update * 0.04, 64 * update, update, (64 * update) // 1437, 2, 1, row)


def test_stage_shares_exclude_warmup_updates() -> None:
    long, short = RunningStats(), RunningStats()
    for update in range(1, 21):
        warm_up = {"stage/forward/ms": 1000.0} if update <= 3 else {}
        long.add(make_row(update, **warm_up))
        if update <= 5:
            short.add(make_row(update, **warm_up))
    assert next(stage.ms for stage in long.compute_stage_shares() if stage.stage == "forward") == 10.0
    assert next(stage.ms for stage in short.compute_stage_shares() if stage.stage == "forward") == 604.0
    assert sum(stage.share for stage in long.compute_stage_shares()) == pytest.approx(1)
