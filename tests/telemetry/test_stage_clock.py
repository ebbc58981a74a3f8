"""Stage times of an update: they add up to the wall time, whatever happens in between."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.distributed.rank_stats import GatheredStats, RankStats
from launcher.goodput.noise_scale import NoiseScale
from launcher.plan.batch import BatchPlan
from launcher.plan.timeline import Update
from launcher.system.processes import read_cpu_seconds
from launcher.telemetry.deferred_scalars import DeferredScalars
from launcher.telemetry.records import MetricsRow
from launcher.telemetry.resource_meter import ResourceMeter, read_memory_metrics
from launcher.telemetry.stage_clock import HostTimer, StageClock, find_critical_rank
from launcher.telemetry.stages import STAGES
from launcher.topology import Topology
from launcher.train.data import LoaderCpuUsage
from launcher.train.metrics_recorder import MetricsRecorder, UpdateResult, make_stage_metrics


class Hands:
    """A clock that is advanced by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def lapped(clock: StageClock, hands: Hands, laps: list[tuple[str, float]]) -> dict[str, float]:
    for stage, seconds in laps:
        hands.now_s += seconds
        clock.lap(stage)
    clock.end_update()
    return dict(zip(STAGES, clock.times_ms(), strict=True))


@given(st.lists(st.tuples(st.sampled_from(STAGES), st.floats(0, 10)), max_size=30))
def test_the_stages_add_up_to_the_wall_time(laps: list[tuple[str, float]]) -> None:
    hands = Hands()
    times = lapped(StageClock(HostTimer(hands)), hands, laps)
    assert sum(times.values()) == pytest.approx(1e3 * sum(seconds for _, seconds in laps))


def test_what_comes_before_training_belongs_to_no_update() -> None:
    hands = Hands()
    clock = StageClock(HostTimer(hands))
    hands.now_s = 30.0
    clock.start()
    assert lapped(clock, hands, [("data", 0.1)])["data"] == pytest.approx(100)


def test_exposed_synchronisation_is_what_follows_the_last_bucket() -> None:
    """The communication hook of the last bucket marks the end of the backward computation."""
    hands = Hands()
    clock = StageClock(HostTimer(hands))
    hands.now_s = 0.2
    clock.mark()
    hands.now_s = 0.5
    clock.lap_backward()
    times = lapped(clock, hands, [])
    assert (times["backward"], times["sync"]) == (pytest.approx(200), pytest.approx(300))


def test_without_communication_all_of_it_is_backward() -> None:
    hands = Hands()
    clock = StageClock(HostTimer(hands))
    hands.now_s = 0.5
    clock.lap_backward()
    assert lapped(clock, hands, [])["backward"] == pytest.approx(500)


def test_the_critical_rank_is_the_one_that_waits_least() -> None:
    """Rank 1's data is slow: rank 0 sees this as waiting, and rank 1 is reported."""
    sync = STAGES.index("sync")
    waits = [0.0] * len(STAGES)
    waits[sync] = 80.0
    works = [0.0] * len(STAGES)
    works[0], works[sync] = 80.0, 1.0
    assert find_critical_rank((tuple(waits), tuple(works))) == 1
    values = make_stage_metrics((tuple(waits), tuple(works)), samples=81)
    assert (values["stage/rank"], values["stage/data/ms"], values["stage/sync/ms_max"]) == (1, 80.0, 80.0)
    assert values["stage/data/share"] == pytest.approx(80 / 81)
    assert values["stage/data/samples_per_s"] == pytest.approx(81 / 0.080)


def test_device_values_are_read_one_update_late() -> None:
    deferred = DeferredScalars(
        (torch.tensor(6.0), torch.tensor(2.5), torch.tensor(0.1), torch.tensor(1.0)), count=3, groups=2
    )
    assert (deferred.read(), deferred.count, deferred.groups) == ((6.0, 2.5, pytest.approx(0.1), 1.0), 3, 2)
    assert DeferredScalars().read() == (0.0, 0.0, 0.0, 1.0), "nothing before the first update, and that was applied"


def test_memory_is_what_the_process_holds_on_a_cpu() -> None:
    assert 10e6 < read_memory_metrics(torch.device("cpu"))["memory/peak_bytes"] < 1e12


def test_time_trained_includes_earlier_generations() -> None:
    hands = Hands()
    meter = ResourceMeter(torch.device("cpu"), threads=1, before_s=100.0, clock=hands)
    hands.now_s = 5.0
    assert meter.seconds() == 105.0
    assert (meter.measure_wall_s(), meter.measure_wall_s()) == (5.0, 0.0)


# --- rows -----------------------------------------------------------------------------------------------------------


class Rows:
    def __init__(self) -> None:
        self.rows: list[MetricsRow] = []

    def log_metrics(self, row: MetricsRow) -> None:
        self.rows.append(row)


PLAN = BatchPlan(world=2, shares=(6, 4), per_device=6, accumulation=1)


def recorded(updates: list[dict[str, Any]], every: int = 1) -> list[MetricsRow]:
    """`updates`: losses and counts of both ranks, the seconds taken, and optionally a tail or a validation."""
    rows: Any = Rows()
    recorder = MetricsRecorder(rows, Topology(rank=0, world=2, generation=3), every, tokens_per_sample=None)
    start = count(0, PLAN.global_batch)
    for index, facts in enumerate(updates):
        plan = PLAN.truncated(facts["tail"]) if "tail" in facts else PLAN
        update = Update(index=index, start=next(start), plan=plan, full_plan=PLAN, size=1000)
        late: Any = SimpleNamespace(read=lambda: (0.0, 1.5, 1.0))
        validation = facts.get("validation", {})
        recorder.on_update_end(
            UpdateResult(update, 0.1, 1.0, 50.0, facts.get("wall_s", 1.0), late, NoiseScale(), 1, validation=validation)
        )
        ballots = tuple(RankStats(loss=loss, loss_count=number) for loss, number in facts["losses"])
        recorder.on_gathered(GatheredStats(ballots, ((1.0,) * len(STAGES),) * 2))
    recorder.flush()
    return rows.rows


def test_the_loss_is_the_mean_over_all_samples_of_all_ranks() -> None:
    """Rank 0 summed 12 over 6 samples and rank 1 had 2 over 4: the mean is 1.4, not the mean of 2 and 0.5."""
    (row,) = recorded([{"losses": [(12.0, 6), (2.0, 4)], "wall_s": 0.5}])
    assert row.values["train/loss"] == pytest.approx(1.4)
    assert row.values["throughput/samples_per_s"] == pytest.approx(20)
    assert row.values["throughput/device/samples_per_s"] == pytest.approx(10)
    assert (row.update, row.samples, row.world, row.generation) == (1, 10, 2, 3)
    assert (row.values["batch/global"], row.values["batch/per_device"], row.values["batch/world"]) == (10, 6, 2)


def test_log_every_makes_a_row_of_a_window() -> None:
    first, second, rest = recorded([{"losses": [(6.0, 6), (4.0 * n, 4)]} for n in range(1, 6)], every=2)
    assert [row.update for row in (first, second, rest)] == [2, 4, 5]
    assert first.values["train/loss"] == pytest.approx((6 + 4 + 6 + 8) / 20)


def test_a_validated_update_has_its_row() -> None:
    rows = recorded(
        [{"losses": [(1.0, 6), (1.0, 4)], "validation": {"val/loss": 0.25}}] + 2 * [{"losses": [(1.0, 6), (1.0, 4)]}],
        every=100,
    )
    assert [row.update for row in rows] == [1, 3]
    assert rows[0].values["val/loss"] == 0.25


def test_a_tail_stays_out_of_the_throughput() -> None:
    rows = recorded([{"losses": [(1.0, 6), (1.0, 4)]}, {"losses": [(1.0, 2), (1.0, 1)], "tail": 3, "wall_s": 0.9}])
    assert "throughput/samples_per_s" in rows[0].values
    assert "throughput/samples_per_s" not in rows[1].values


# --- data loading ---------------------------------------------------------------------------------------------------


def test_a_loader_that_computes_has_a_share_near_1_and_one_that_waits_near_0() -> None:
    loading = LoaderCpuUsage()
    assert loading.measure_share() is None, "nothing was loaded"
    with loading:
        end_s = time.thread_time() + 0.05
        while time.thread_time() < end_s:
            pass
    computed = loading.measure_share()
    with loading:
        threading.Event().wait(0.1)
    waited = loading.measure_share()
    assert computed is not None
    assert waited is not None
    assert waited < 0.3 < computed


def test_loader_processes_are_looked_at_from_outside_and_may_be_gone() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    loading = LoaderCpuUsage([busy.pid])
    while (read_cpu_seconds(busy.pid) or 0.0) < 0.2:
        os.sched_yield()
    share = loading.measure_share()
    busy.kill()
    busy.wait()
    assert share is not None
    assert share > 0.1
    assert loading.measure_share() is None
