"""Rescaling Adam's second moment in the optimizer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from launcher.config.schema import RunConfig
from launcher.recipe import Loss
from launcher.strategies.ddp import DdpReplica
from launcher.strategies.interface import ReplicaArgs
from launcher.strategies.precision import Precision
from launcher.telemetry.stage_clock import HostTimer, StageClock


def test_only_second_moments_are_rescaled_in_optimizer() -> None:
    torch.manual_seed(0)
    config = replace(RunConfig(), optimizer={"_target_": "torch.optim.AdamW", "amsgrad": True})
    replica = DdpReplica(
        ReplicaArgs(
            nn.Linear(4, 3), config, 1, Precision.from_name("fp32", torch.device("cpu")), StageClock(HostTimer())
        )
    )
    with replica.micro_batch(last=True, is_padding=False, shard=0):
        loss = replica.compute_loss(lambda net, x: Loss(net(x).square().sum(), 5), torch.randn(5, 4))
        replica.backward(loss.total, 5)
    replica.step(0.01, None, 1.0, None)
    before = {name: tensor.clone() for name, tensor in replica.full_state().optimizer.items()}
    replica.rescale_moments(0.25)
    for name, tensor in replica.full_state().optimizer.items():
        share = 0.25 if name.endswith("exp_avg_sq") else 1.0
        assert torch.equal(tensor, before[name] * share), name
    assert {name.rpartition("/")[2] for name in before} == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
