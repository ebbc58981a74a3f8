"""Checks of the model against the plan, before training."""

from __future__ import annotations

import pytest
from torch import nn

from launcher.config.schema import BatchConfig, DataConfig, LrConfig, RunConfig, TrainConfig
from launcher.errors import UsageError
from launcher.plan.training_plan import DatasetSizes, TrainingPlan, make_training_plan
from launcher.train.build import check_sync_batchnorm_shares

SYNC = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def make_plan(samples: int, tail: str = "flush", world: int = 2) -> TrainingPlan:
    config = RunConfig(
        recipe={"_target_": "launcher.recipes.mlp.Mlp"},
        optimizer={"_target_": "torch.optim.SGD"},
        lr=LrConfig(base=0.1, base_batch=8),
        batch=BatchConfig(policy="hold", global_batch=8, per_device=2),
        data=DataConfig(tail=tail),  # type: ignore[arg-type]
        train=TrainConfig(duration="2ep", validate_every=None),
    )
    return make_training_plan(config, DatasetSizes(samples, 4), world)


def test_sync_batchnorm_needs_equal_numbers_of_micro_batches() -> None:
    for plan in (make_plan(64), make_plan(60, "carry"), make_plan(65, world=1), make_plan(67)):
        check_sync_batchnorm_shares(SYNC, plan)
    check_sync_batchnorm_shares(nn.BatchNorm1d(2), make_plan(65))
    with pytest.raises(UsageError, match=r"1 is a SyncBatchNorm, .* an update of 1 samples has 1 on one and 0 on ano"):
        check_sync_batchnorm_shares(SYNC, make_plan(65))
