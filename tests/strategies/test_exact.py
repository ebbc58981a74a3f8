"""Exact mode without processes: the training plan in shards, and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from launcher.config.schema import BatchConfig, ElasticConfig, LaunchConfig, LrConfig, RunConfig, TrainConfig
from launcher.errors import UsageError
from launcher.plan.training_plan import DatasetSizes, TrainingPlan, make_training_plan
from launcher.run_dir.resume import decide_resume

EXACT = RunConfig(
    optimizer={"_target_": "torch.optim.SGD"},
    lr=LrConfig(base=0.1, base_batch=64),
    batch=BatchConfig(policy="hold", global_batch=60, per_device=5),
    elastic=ElasticConfig(exact=True),
)


def make_plan(config: RunConfig = EXACT, world: int = 1) -> TrainingPlan:
    return make_training_plan(config, DatasetSizes(1003, 100), world)


def test_every_plan_stage_uses_shards() -> None:
    ramped = replace(EXACT, batch=replace(EXACT.batch, ramp=(("0dur", 0.25), ("0.5dur", 1))))
    assert [plan.shares for _, plan in make_plan(ramped, 2).stages] == [(8, 7), (32, 28)]
    assert make_plan(world=1).batch_plan.per_device == make_plan(world=8).batch_plan.per_device == 4


def test_advice_states_cost_and_idle_ranks() -> None:
    costs, idle = make_plan(world=3).advice[:2]
    assert "elastic.exact=true is slower" in costs
    assert "trains on 2 of 3 workers" in idle
    assert not [line for line in make_plan(world=4).advice if "get no samples" in line]


# Refusals
def change_config(**parts: Mapping[str, Any]) -> RunConfig:
    return replace(EXACT, **{part: replace(getattr(EXACT, part), **keys) for part, keys in parts.items()})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (change_config(elastic={"shards": 6}), "elastic.shards=6 is not a power of two: type elastic.shards=4 or 8"),
        (change_config(elastic={"shards": 0}), "elastic.shards=0 is not a power of two: type elastic.shards=1 or 2"),
        (change_config(elastic={"shards": 64}), "elastic.shards=64 exceeds the 60 samples of a batch"),
        (change_config(elastic={"balance": True}), "elastic.balance=true does not work with elastic.exact=true"),
        (change_config(batch={"policy": "scale", "global_batch": None}), "batch.policy=scale with elastic.exact=true"),
        (change_config(batch={"accumulation": 4}), "batch.accumulation=4 does not work with elastic.exact=true"),
        (replace(EXACT, train=TrainConfig(precision="fp16")), "train.precision=fp16 does not work with"),
        (replace(EXACT, train=TrainConfig(compile=True)), "train.compile=true does not work with"),
        (replace(EXACT, launch=LaunchConfig(threads=4)), "launch.threads=4 does not work with"),
        (change_config(strategy={"name": "fsdp"}), "strategy.name=fsdp does not work with elastic.exact=true"),
    ],
)
def test_incompatible_options_are_refused(config: RunConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        make_plan(config)


def test_micro_batch_may_not_change_on_resume(tmp_path: Any) -> None:
    old = {"batch.policy": "hold", "batch.per_device": 5, "elastic.exact": False}
    new = {**old, "batch.per_device": 9}
    assert decide_resume("auto", tmp_path, old, new).changed
    with pytest.raises(UsageError, match=r"batch\.per_device \(5 before, 9 now\)"):
        decide_resume("auto", tmp_path, {**old, "elastic.exact": True}, {**new, "elastic.exact": True})
