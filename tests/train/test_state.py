"""The training state: Adam's second moment is rescaled with the learning rate when the batch changes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from launcher.config.schema import BatchConfig, LrConfig, RunConfig
from launcher.goodput.noise_scale import NoiseScale
from launcher.plan.batch import BatchPlan
from launcher.plan.timeline import Position, Update
from launcher.plan.training_plan import DatasetSizes, TrainingPlan, make_training_plan
from launcher.train.state import MetricTarget, TrainState, UpdateCounts

PHI = 100.0


def make_plan(world: int, optimizer: str = "AdamW", **keys: Any) -> TrainingPlan:
    config = replace(
        RunConfig(),
        optimizer={"_target_": f"torch.optim.{optimizer}"},
        batch=BatchConfig(policy="scale", per_device=8),
        lr=LrConfig(base=0.1, base_batch=8, **keys),
    )
    return make_training_plan(
        replace(config, train=replace(config.train, duration="1000000sp")), DatasetSizes(1000, 100), world
    )


def make_update(start: int, batch: int) -> Update:
    plan = BatchPlan(world=1, shares=(batch,), per_device=batch, accumulation=1)
    return Update(start // batch, start, plan, plan, size=1000)


def resume_with(world: int, noise: float | None, optimizer: str = "AdamW") -> TrainState:
    """The state after 8,000 samples at a batch of 8, on `world` workers."""
    before = replace(TrainState.initial(make_plan(1, optimizer)), noise=NoiseScale(applied=noise))
    facts = json.loads(json.dumps(before.state_dict()))
    return TrainState.from_state_dict(make_plan(world, optimizer), Position(8000, 1000), facts)


def test_immediate_resize_rescales_at_first_update() -> None:
    state = resume_with(2, PHI)
    assert state.second_moment_factor(16) == pytest.approx((1 + PHI / 16) / (1 + PHI / 8))
    after, factor = state.advance_second_moment(make_update(8000, 16))
    assert factor == state.second_moment_factor(16)
    assert after.advance_second_moment(make_update(8016, 16)) == (after, 1.0)


def test_ramped_resize_rescales_with_the_learning_rate() -> None:
    """Eight times the batch: the scale moves from 1 to sqrt(8) in 10,000 samples, 1 % of the run."""
    state, product, factors = resume_with(8, PHI), 1.0, []
    for start in range(8000, 19_000, 64):
        state, factor = state.advance_second_moment(make_update(start, 64))
        factors.append(factor)
        product *= factor
    assert product == pytest.approx((1 + PHI / 64) / (1 + PHI / 8))
    assert factors[0] == 1.0
    assert 0.5 < min(factors) < max(factors[1:100]) < 1.0
    assert factors[-1] == 1.0


@pytest.mark.parametrize(("noise", "optimizer", "batch"), [(None, "AdamW", 64), (PHI, "SGD", 64), (PHI, "AdamW", 8)])
def test_unscaled_moment_is_reported_as_kept(noise: float | None, optimizer: str, batch: int) -> None:
    """Unknown noise scale, no second moment, or the same batch."""
    state = resume_with(batch // 8, noise, optimizer)
    assert state.second_moment_factor(batch) == "kept"
    assert state.advance_second_moment(make_update(8000, batch))[1] == 1.0


# Metrics that are not numbers
def test_nan_is_never_the_best_checkpoint() -> None:
    """Compared with NaN, no later value would be better."""
    state = TrainState.initial(make_plan(1))
    found = []
    for number, value in enumerate([math.nan, 0.5, math.nan, 0.4, math.nan]):
        state = state.with_best_checkpoint({"val/loss": value}, "val/loss", "auto", f"update-{number}")
        found.append(state.best_checkpoint)
    assert found == [None, "update-1", "update-1", "update-3", "update-3"]


def test_state_with_nan_is_strict_json() -> None:
    before = replace(TrainState.initial(make_plan(1)), metrics={"val/loss": math.nan, "val/accuracy": 0.5})
    facts = json.loads(json.dumps(before.state_dict(), allow_nan=False))
    metrics = TrainState.from_state_dict(make_plan(1), Position(), facts).metrics
    assert math.isnan(metrics["val/loss"])
    assert metrics["val/accuracy"] == 0.5


def test_metric_that_a_validation_lacks_changes_nothing() -> None:
    plan = make_plan(1)
    plateau = replace(plan.config, schedule=replace(plan.config.schedule, decay="plateau", metric="val/accuracy"))
    state = TrainState.initial(make_training_plan(plateau, plan.sizes, 1))
    after = state.with_validation({"val/loss": 2.0}, 1000, "val/accuracy")
    assert after == replace(state, metrics={"val/loss": 2.0})
    assert after.with_best_checkpoint({"val/loss": 2.0}, "val/accuracy", "auto", "update-1") is after
    assert not MetricTarget("val/accuracy", at_least=0.1).is_met({"val/loss": 2.0})
    assert not MetricTarget("val/accuracy", at_most=0.1).is_met({"val/loss": 2.0})
    assert state.with_validation({"val/accuracy": 0.5}, 1000, "val/accuracy").schedule != state.schedule


def test_counts_of_updates_survive_a_restart() -> None:
    before = replace(TrainState.initial(make_plan(1)), counts=UpdateCounts(1, 2, 3, 4))
    facts = json.loads(json.dumps(before.state_dict()))
    assert TrainState.from_state_dict(make_plan(1), Position(), facts).counts == UpdateCounts(1, 2, 3, 4)
    del facts["counts"]  # a checkpoint of an earlier version
    assert TrainState.from_state_dict(make_plan(1), Position(), facts).counts == UpdateCounts()
