"""Models on the meta device: which models are eligible, and that materialising gives the same model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from launcher.config.schema import RunConfig, StrategyConfig
from launcher.errors import UsageError
from launcher.strategies.meta_init import build_on_meta_device, materialize

FSDP = RunConfig(strategy=StrategyConfig(name="fsdp", meta_init=True))


class Recipe:
    def __init__(self, make: Any) -> None:
        self.model = make


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(10, 4), nn.BatchNorm1d(4), nn.Linear(4, 10, bias=False))
    model[2].weight = model[0].weight
    model[0].weight.decays = False
    model[1].bias.requires_grad_(False)
    return model


def test_other_ranks_build_on_meta_device() -> None:
    assert build_on_meta_device(Recipe(tied), FSDP, 0) is None
    model = build_on_meta_device(Recipe(tied), FSDP, 1)
    assert model is not None
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_small_model_is_built_on_every_rank() -> None:
    assert build_on_meta_device(Recipe(tied), replace(FSDP, strategy=StrategyConfig(name="fsdp")), 1) is None
    assert (
        build_on_meta_device(Recipe(tied), replace(FSDP, strategy=StrategyConfig(name="fsdp", meta_init=False)), 1)
        is None
    )
    assert build_on_meta_device(Recipe(tied), replace(FSDP, strategy=StrategyConfig(meta_init=True)), 1) is None, (
        "only FSDP builds on the meta device"
    )


def test_large_model_is_built_on_rank_0_only() -> None:
    """5 GB of parameters that are never allocated here."""
    large = Recipe(lambda: nn.Linear(50_000, 25_000))
    assert build_on_meta_device(large, replace(FSDP, strategy=StrategyConfig(name="fsdp")), 1) is not None


def test_materialize_preserves_tied_tensors() -> None:
    model = build_on_meta_device(Recipe(tied), FSDP, 1)
    assert isinstance(model, nn.Sequential)
    materialize(model[1])
    assert not model[1].weight.is_meta
    assert model[0].weight.is_meta, "only the given submodule is materialised"
    materialize(model)
    assert model[2].weight is model[0].weight
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()} == {
        name: (p.shape, p.dtype, p.requires_grad) for name, p in tied().named_parameters()
    }
    assert {name: b.dtype for name, b in model.named_buffers()} == {n: b.dtype for n, b in tied().named_buffers()}
    assert model[0].weight.decays is False, "attributes that a recipe sets on a parameter are kept"
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


class PlainAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.tables = [torch.ones(3)]


class ReadsWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = float(self.layer.weight.norm())


@pytest.mark.parametrize(
    ("kind", "why"), [(PlainAttribute, "tables is neither a parameter nor a buffer"), (ReadsWeights, "RuntimeError: ")]
)
def test_models_unfit_for_meta_device_are_refused(kind: type[nn.Module], why: str) -> None:
    assert build_on_meta_device(Recipe(kind), replace(FSDP, strategy=StrategyConfig(name="fsdp")), 1) is None
    with pytest.raises(UsageError, match=f"strategy.meta_init=true: .*{why}.*type strategy.meta_init=false"):
        build_on_meta_device(Recipe(kind), FSDP, 1)
