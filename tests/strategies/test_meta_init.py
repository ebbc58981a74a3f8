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


def test_rank_0_builds_the_model_and_the_others_its_outline() -> None:
    assert build_on_meta_device(Recipe(tied), FSDP, 0) is None
    model = build_on_meta_device(Recipe(tied), FSDP, 1)
    assert model is not None
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_a_small_model_is_built_by_all_unless_asked_otherwise() -> None:
    assert build_on_meta_device(Recipe(tied), replace(FSDP, strategy=StrategyConfig(name="fsdp")), 1) is None
    assert (
        build_on_meta_device(Recipe(tied), replace(FSDP, strategy=StrategyConfig(name="fsdp", meta_init=False)), 1)
        is None
    )
    assert build_on_meta_device(Recipe(tied), replace(FSDP, strategy=StrategyConfig(meta_init=True)), 1) is None, (
        "of FSDP alone"
    )


def test_a_large_one_is_not_built_by_any_other() -> None:
    """5 GB of parameters that are never allocated here."""
    large = Recipe(lambda: nn.Linear(50_000, 25_000))
    assert build_on_meta_device(large, replace(FSDP, strategy=StrategyConfig(name="fsdp")), 1) is not None


def test_memory_is_made_for_each_part_and_tied_tensors_stay_tied() -> None:
    model = build_on_meta_device(Recipe(tied), FSDP, 1)
    assert isinstance(model, nn.Sequential)
    materialize(model[1])
    assert not model[1].weight.is_meta
    assert model[0].weight.is_meta, "it is not its turn"
    materialize(model)
    assert model[2].weight is model[0].weight
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()} == {
        name: (p.shape, p.dtype, p.requires_grad) for name, p in tied().named_parameters()
    }
    assert {name: b.dtype for name, b in model.named_buffers()} == {n: b.dtype for n, b in tied().named_buffers()}
    assert model[0].weight.decays is False, "what a recipe notes on a parameter stays on it"
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


class Attribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.tables = [torch.ones(3)]


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = float(self.layer.weight.norm())


@pytest.mark.parametrize(
    ("kind", "why"), [(Attribute, "tables is neither a parameter nor a buffer"), (Looks, "RuntimeError: ")]
)
def test_what_needs_its_numbers_is_built_by_all_or_refused_where_it_was_asked_for(
    kind: type[nn.Module], why: str
) -> None:
    assert build_on_meta_device(Recipe(kind), replace(FSDP, strategy=StrategyConfig(name="fsdp")), 1) is None
    with pytest.raises(UsageError, match=f"strategy.meta_init=true: .*{why}.*type strategy.meta_init=false"):
        build_on_meta_device(Recipe(kind), FSDP, 1)
