"""Rows of metrics.jsonl from the statistics of all ranks."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from launcher.distributed.rank_stats import GatheredStats, RankStats
from launcher.goodput.noise_scale import NoiseScale
from launcher.plan.batch import BatchPlan
from launcher.plan.timeline import Update
from launcher.telemetry.records import MetricsRow
from launcher.telemetry.stages import STAGES
from launcher.telemetry.update_scalars import UpdateScalars
from launcher.topology import Topology
from launcher.train.metrics_recorder import MetricsRecorder, UpdateResult


class RowCollector:
    def __init__(self) -> None:
        self.rows: list[MetricsRow] = []

    def log_metrics(self, row: MetricsRow) -> None:
        self.rows.append(row)


PLAN = BatchPlan(world=2, shares=(6, 4), per_device=6, accumulation=1)


def record_rows(updates: list[dict[str, Any]], every: int = 1) -> list[MetricsRow]:
    """`updates`: losses and counts of both ranks, the seconds taken, and optionally a tail or a validation."""
    rows: Any = RowCollector()
    recorder = MetricsRecorder(rows, Topology(rank=0, world=2, generation=3), every, tokens_per_sample=None)
    start = count(0, PLAN.global_batch)
    for index, facts in enumerate(updates):
        plan = PLAN.truncated(facts["tail"]) if "tail" in facts else PLAN
        update = Update(index=index, start=next(start), plan=plan, full_plan=PLAN, size=1000)
        validation = facts.get("validation", {})
        recorder.on_update_end(
            UpdateResult(update, 0.1, 1.0, 50.0, facts.get("wall_s", 1.0), 1.5, NoiseScale(), 1, validation=validation)
        )
        rank_stats = tuple(
            RankStats(
                previous=UpdateScalars(loss=loss, loss_count=number, grad_norm=1.5), stages_ms=(1.0,) * len(STAGES)
            )
            for loss, number in facts["losses"]
        )
        recorder.on_gathered(GatheredStats.from_ranks(rank_stats, None, update))
    recorder.flush()
    return rows.rows


def test_logged_loss_is_mean_over_all_samples() -> None:
    """Rank 0 summed 12 over 6 samples and rank 1 had 2 over 4: the mean is 1.4, not the mean of 2 and 0.5."""
    (row,) = record_rows([{"losses": [(12.0, 6), (2.0, 4)], "wall_s": 0.5}])
    assert row.values["train/loss"] == pytest.approx(1.4)
    assert row.values["throughput/samples_per_s"] == pytest.approx(20)
    assert row.values["throughput/device/samples_per_s"] == pytest.approx(10)
    assert (row.update, row.samples, row.world, row.generation) == (1, 10, 2, 3)
    assert (row.values["batch/global"], row.values["batch/per_device"], row.values["batch/world"]) == (10, 6, 2)


def test_log_every_averages_a_window() -> None:
    first, second, rest = record_rows([{"losses": [(6.0, 6), (4.0 * n, 4)]} for n in range(1, 6)], every=2)
    assert [row.update for row in (first, second, rest)] == [2, 4, 5]
    assert first.values["train/loss"] == pytest.approx((6 + 4 + 6 + 8) / 20)


def test_validated_update_gets_its_own_row() -> None:
    rows = record_rows(
        [{"losses": [(1.0, 6), (1.0, 4)], "validation": {"val/loss": 0.25}}] + 2 * [{"losses": [(1.0, 6), (1.0, 4)]}],
        every=100,
    )
    assert [row.update for row in rows] == [1, 3]
    assert rows[0].values["val/loss"] == 0.25


def test_partial_update_has_no_throughput() -> None:
    rows = record_rows([{"losses": [(1.0, 6), (1.0, 4)]}, {"losses": [(1.0, 2), (1.0, 1)], "tail": 3, "wall_s": 0.9}])
    assert "throughput/samples_per_s" in rows[0].values
    assert "throughput/samples_per_s" not in rows[1].values


def test_updates_whose_statistics_are_read_late_keep_rows_of_their_own() -> None:
    """Two updates are pending when training is interrupted; each gets its row, with this rank's values only."""
    rows: Any = RowCollector()
    recorder = MetricsRecorder(rows, Topology(rank=0, world=2, generation=3), 1, tokens_per_sample=None)
    updates = [Update(index, index * 10, PLAN, PLAN, size=1000) for index in range(3)]
    for update in updates:
        recorder.on_update_end(UpdateResult(update, 0.1, 1.0, 50.0, 1.0, 1.5, NoiseScale(), 1))
    stats = [RankStats(previous=UpdateScalars(loss=3.0, loss_count=2.0, grad_norm=0.5))] * 2
    recorder.on_gathered(GatheredStats.from_ranks(stats, updates[0], None))
    assert not rows.rows, "the first statistics belong to no update"
    recorder.on_gathered(GatheredStats.from_ranks(stats, updates[1], updates[0]))
    recorder.flush_unfinished()
    assert [row.update for row in rows.rows] == [1, 2, 3]
    assert [row.values.get("train/loss") for row in rows.rows] == [1.5, None, None]
    assert [row.values["train/grad_norm"] for row in rows.rows] == [0.5, 1.5, 1.5]
