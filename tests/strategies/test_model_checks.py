"""Models that cannot be trained as they are are refused with the module's name and what to use instead."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from launcher.config.schema import ElasticConfig, RunConfig, StrategyConfig
from launcher.errors import UsageError
from launcher.recipe import Loss
from launcher.strategies.fsdp_checks import check_parameter_shapes, check_uniform_dtypes
from launcher.strategies.interface import ReplicaArgs
from launcher.strategies.model_checks import check_is_built, check_model
from launcher.strategies.precision import Precision
from launcher.strategies.registry import build_replica
from launcher.telemetry.stage_clock import HostTimer, StageClock

CPU = torch.device("cpu")


class WithExtraState(nn.Linear):
    def __init__(self, extra: Any) -> None:
        super().__init__(2, 1)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class ComplexWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))


def make_frozen() -> nn.Module:
    return nn.Linear(2, 1).requires_grad_(False)


def make_hooked(*, accumulated: bool = False) -> nn.Module:
    model = nn.Linear(2, 1)
    if accumulated:
        model.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    else:
        model.weight.register_hook(lambda gradient: 2 * gradient)
    return model


SYNC = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
CHANNELS_LAST = nn.Sequential(nn.Conv2d(2, 3, 3)).to(memory_format=torch.channels_last)
FSDP = replace(RunConfig(), strategy=StrategyConfig(name="fsdp"))
ZERO = replace(RunConfig(), strategy=StrategyConfig(name="deepspeed"))


def test_hooks_of_parameters_are_kept_under_ddp() -> None:
    check_model(make_hooked(), RunConfig(), CPU)


@pytest.mark.parametrize(
    ("model", "config", "named"),
    [
        (make_hooked(accumulated=True), RunConfig(), "weight has a hook after its gradient is accumulated"),
        (make_hooked(), FSDP, "strategy=fsdp replaces weight, whose gradient hook would be lost"),
        (make_hooked(), ZERO, "strategy=deepspeed replaces weight, whose gradient hook would be lost"),
        (nn.Sequential(nn.Embedding(4, 2, sparse=True)), RunConfig(), "the model's 0 has sparse=True"),
        (nn.Sequential(nn.EmbeddingBag(4, 2, sparse=True)), RunConfig(), "the model's 0 has sparse=True"),
        (SYNC, RunConfig(), "the model's 1 is a SyncBatchNorm, which torch supports on GPUs only"),
        (nn.Sequential(WithExtraState({"seen": {1}})), RunConfig(), r"0\._extra_state\['seen'\] is a set"),
        (ComplexWeight(), RunConfig(), "the model's weight is complex64: complex parameters are not supported"),
        (make_frozen(), RunConfig(), "no trainable parameter"),
        (CHANNELS_LAST, ZERO, r"strategy=deepspeed: 0\.weight is not contiguous in memory, as with channels_last"),
        (nn.Linear(2, 1).bfloat16(), ZERO, "strategy=deepspeed trains float32 parameters and weight is bfloat16"),
    ],
)
def test_model_is_refused(model: nn.Module, config: RunConfig, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        check_model(model, config, CPU)


def test_sync_batchnorm_is_refused_in_exact_mode_on_gpus() -> None:
    config = replace(RunConfig(), elastic=ElasticConfig(exact=True))
    with pytest.raises(UsageError, match=r"elastic\.exact=true: the model's 1 is a SyncBatchNorm"):
        check_model(SYNC, config, torch.device("cuda"))
    check_model(SYNC, RunConfig(), torch.device("cuda"))


def test_other_models_pass() -> None:
    frozen = nn.Sequential(nn.Embedding(4, 2, sparse=True).requires_grad_(False), nn.Linear(2, 1))
    for model in (nn.Linear(2, 1).bfloat16(), WithExtraState({"scale": 1.0}), frozen):
        check_model(model, RunConfig(), CPU)


@pytest.mark.parametrize("model", [nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d()), nn.LazyConv2d(2, 3)])
def test_lazy_model_is_refused(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="has no shape before it sees data"):
        check_is_built(model)


def test_lazy_model_that_has_seen_data_passes() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d())
    model(torch.zeros(2, 3))
    check_is_built(model)
    with pytest.raises(UsageError, match="returns a function"):
        check_is_built(lambda: model)


def test_fsdp_refuses_parameters_that_are_not_contiguous() -> None:
    with pytest.raises(UsageError, match=r"0\.weight is not contiguous in memory, as with channels_last"):
        check_parameter_shapes(CHANNELS_LAST)


def test_fsdp_refuses_types_that_differ_within_a_block() -> None:
    model = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2))
    check_uniform_dtypes(model, list(model))
    with pytest.raises(UsageError, match=r"0\.bias is bfloat16|0\.weight is bfloat16"):
        check_uniform_dtypes(model, [])


class FrozenBase(nn.Module):
    """A frozen base in bfloat16 with a trained correction in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.correction = nn.Linear(3, 3).bfloat16().requires_grad_(False), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x.bfloat16()).float() + self.correction(x)


def test_fsdp_trains_a_frozen_base_of_another_type() -> None:
    def compute(model: nn.Module, batch: torch.Tensor) -> Loss:
        return Loss(model(batch).square().sum(), len(batch))

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        config = replace(RunConfig(), optimizer={"_target_": "torch.optim.SGD"}, strategy=StrategyConfig(name="fsdp"))
        model, plain = (nn.Sequential(FrozenBase(), nn.Linear(3, 1)) for _ in range(2))
        plain.load_state_dict(model.state_dict())
        precision = Precision.from_name("fp32", CPU)
        replica = build_replica(
            ReplicaArgs(model, config, 1, precision, StageClock(HostTimer()), blocks=list(model)[:1])
        )
        with replica.micro_batch(last=True, is_padding=False, shard=0):
            replica.backward(replica.compute_loss(compute, torch.ones(2, 3)).total, 2)
        replica.step(0.1, None, 1.0, None)
        (compute(plain, torch.ones(2, 3)).total / 2).backward()
        torch.optim.SGD(plain.parameters(), lr=0.1).step()
        torch.testing.assert_close(dict(replica.full_state().model), plain.state_dict())
    finally:
        dist.destroy_process_group()


def test_sparse_gradient_of_a_function_is_refused_in_the_backward_pass() -> None:
    model = nn.Linear(3, 4)
    check_model(model, RunConfig(), CPU)
    rows = embedding(torch.tensor([0, 1]), model.weight, sparse=True)
    with pytest.raises(UsageError, match="the gradient of weight is sparse"):
        rows.sum().backward()
    model(torch.ones(2, 3)).sum().backward()
    assert not model.weight._backward_hooks, "later passes are not slowed down"


class Reentrant(nn.Module):
    def __init__(self, uses: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.last = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 1)
        self.uses = uses

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(self.uses):
            x = checkpoint(self.block, x, use_reentrant=True)
        return self.last(x)


def compute_loss(model: nn.Module, batch: torch.Tensor) -> Loss:
    return Loss(model(batch).square().sum(), len(batch))


@pytest.mark.parametrize("uses", [1, 2])
def test_fsdp_refuses_reentrant_checkpoints_that_it_would_train_wrongly(uses: int) -> None:
    """Where a block is used twice, its gradient stays on the worker, and a step would train without it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        config = replace(RunConfig(), optimizer={"_target_": "torch.optim.SGD"}, strategy=StrategyConfig(name="fsdp"))
        model, precision = Reentrant(uses), Precision.from_name("fp32", CPU)
        blocks = list(model.block)[:1]
        replica = build_replica(ReplicaArgs(model, config, 1, precision, StageClock(HostTimer()), blocks=blocks))
        with replica.micro_batch(last=True, is_padding=False, shard=0):
            replica.backward(replica.compute_loss(compute_loss, torch.ones(2, 3)).total, 2)
        refused = partial(pytest.raises, UsageError, match=r"gradient of block\.0\.weight was .*use_reentrant=False")
        if uses == 2:
            with refused():
                replica.step(0.1, None, 1.0, None)
            return
        replica.step(0.1, None, 1.0, None)
        plain = Reentrant(uses)
        (compute_loss(plain, torch.ones(2, 3)).total / 2).backward()
        torch.optim.SGD(plain.parameters(), lr=0.1).step()
        torch.testing.assert_close(dict(replica.full_state().model), plain.state_dict())
        model.uses = 2  # in a later update
        with replica.micro_batch(last=True, is_padding=False, shard=0):
            replica.backward(replica.compute_loss(compute_loss, torch.ones(2, 3)).total, 2)
        with refused():
            replica.step(0.1, None, 1.0, None)
    finally:
        dist.destroy_process_group()
