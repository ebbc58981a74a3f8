"""Models that cannot be trained as they are are refused with the module's name and what to use instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from launcher.config.schema import ElasticConfig, RunConfig, StrategyConfig
from launcher.errors import UsageError
from launcher.strategies.fsdp import check_parameter_shapes
from launcher.strategies.model_checks import check_is_built, check_model

CPU = torch.device("cpu")


class WithExtraState(nn.Linear):
    def __init__(self, extra: Any) -> None:
        super().__init__(2, 1)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def make_frozen() -> nn.Module:
    return nn.Linear(2, 1).requires_grad_(False)


SYNC = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
CHANNELS_LAST = nn.Sequential(nn.Conv2d(2, 3, 3)).to(memory_format=torch.channels_last)
ZERO = replace(RunConfig(), strategy=StrategyConfig(name="deepspeed"))


@pytest.mark.parametrize(
    ("model", "config", "named"),
    [
        (nn.Sequential(nn.Embedding(4, 2, sparse=True)), RunConfig(), "the model's 0 has sparse=True"),
        (nn.Sequential(nn.EmbeddingBag(4, 2, sparse=True)), RunConfig(), "the model's 0 has sparse=True"),
        (SYNC, RunConfig(), "the model's 1 is a SyncBatchNorm, which torch supports on GPUs only"),
        (nn.Sequential(WithExtraState({"seen": {1}})), RunConfig(), r"0\._extra_state\['seen'\] is a set"),
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
