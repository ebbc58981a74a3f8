"""What is told of updates that took no step, or whose loss is not a number."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.distributed.rank_stats import GatheredStats, RankStats
from launcher.errors import TrainingFailed
from launcher.plan.batch import BatchPlan
from launcher.plan.timeline import Position, Update
from launcher.telemetry.update_scalars import UpdateScalars
from launcher.train.state import TrainState
from launcher.train.update_reports import count_unapplied_updates, report_update

APPLIED, EMPTY = (1.0, 5.0, True), (0.0, 0.0, True)
SKIPPED, LOSS_INFINITE = (1.0, 5.0, False), (math.inf, 5.0, True)


class Run:
    """Reports updates one after the other; each is the loss, count and finiteness of its only rank."""

    def __init__(self, precision: str = "fp32") -> None:
        self.alarms: list[tuple[str, str]] = []
        self.context: Any = SimpleNamespace(
            precision=SimpleNamespace(name=precision, scale=lambda: 256.0),
            log_event=lambda _, kind, detail, **__: self.alarms.append((kind, detail)),
        )
        self.state: Any = TrainState(Position(), None)  # type: ignore[arg-type]

    def report(self, *updates: tuple[float, float, bool]) -> list[str]:
        """Return the kinds of the new alarms."""
        earlier = len(self.alarms)
        plan = BatchPlan(1, (5,), 5, 1)
        for loss, count, finite in updates:
            update = Update(self.state.position.update, self.state.position.samples, plan, plan, size=10**6)
            self.state = self.state.advance(update)
            scalars = UpdateScalars(loss=loss, loss_count=count, finite=finite)
            gathered = GatheredStats.from_ranks([RankStats(previous=scalars)], None, update)
            after = self.state.with_gathered_stats(gathered)
            before, self.state = self.state, after
            report_update(self.context, before, after, gathered)
        return [kind for kind, _ in self.alarms[earlier:]]


def test_empty_updates_are_no_failure_and_told_now_and_then() -> None:
    run = Run()
    assert run.report(*[EMPTY] * 9) == ["empty_update"] * 4  # 1, 2, 4 and 8
    assert "8 such so far" in run.alarms[-1][1]
    assert not any("NaN" in detail for _, detail in run.alarms)
    assert (run.state.skips, count_unapplied_updates(run.context, run.state)) == (0, {"empty_updates": 9})


def test_empty_update_neither_counts_to_nor_ends_a_series_of_failures() -> None:
    run = Run()
    run.report(SKIPPED, SKIPPED, EMPTY, EMPTY)
    assert run.state.skips == 2
    with pytest.raises(TrainingFailed, match="3 updates in a row were not finite"):
        run.report(SKIPPED)
    assert Run().report(SKIPPED, SKIPPED, APPLIED, SKIPPED, SKIPPED) == ["not_finite"] * 4


def test_updates_skipped_under_fp16_are_told_with_the_loss_scale() -> None:
    run = Run("fp16")
    assert run.report(*[SKIPPED, APPLIED] * 5) == ["fp16_overflow"] * 3  # 1, 2 and 4
    assert "the loss scale is 256 now; 4 skipped so far" in run.alarms[-1][1]
    assert count_unapplied_updates(run.context, run.state) == {"skipped_updates": 5, "loss_scale": 256.0}
    assert Run("fp16").report(*[SKIPPED] * 20)[-1] == "not_finite"


def test_step_whose_loss_is_infinite_is_told() -> None:
    run = Run("fp16")
    assert run.report(LOSS_INFINITE, APPLIED) == ["loss_not_finite"]
    assert "the loss of update 1 is NaN or infinite on rank 0, though its gradient is finite" in run.alarms[0][1]
    assert "in fp16 a sum above 65,504 is infinite" in run.alarms[0][1]
    assert Run().report(LOSS_INFINITE) == ["loss_not_finite"]
