"""Each module keeps the mode that its owner gave it: at the start, through validation, and in padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from launcher.config.schema import BatchConfig, DataConfig, LrConfig, RunConfig
from launcher.plan.training_plan import DatasetSizes, make_training_plan
from launcher.recipe import Loss
from launcher.topology import Topology
from launcher.train.build import Datasets, TrainComponents, build_components
from launcher.train.modes import describe_untrained_modes, enter_training_mode, find_modules_in_eval

CONFIG = RunConfig(
    optimizer={"_target_": "torch.optim.SGD"},
    lr=LrConfig(base=0.1, base_batch=4),
    batch=BatchConfig(per_device=4),
    data=DataConfig(num_workers=0),
)


class Body(nn.Sequential):
    """Layers whose mode matters, in two levels."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)))


def freeze_all() -> nn.Module:
    model = nn.Sequential(Body(), nn.Linear(3, 1))
    model[0].eval()
    return model


def freeze_inner_norm() -> nn.Module:
    model = nn.Sequential(Body(), nn.Linear(3, 1))
    model[0][2][1].eval()
    return model


def thaw_within_frozen() -> nn.Module:
    model = freeze_all()
    model[0][2].train()
    return model


def evaluate_all_but_head() -> nn.Module:
    model = nn.Sequential(Body(), nn.Linear(3, 1)).eval()
    model[1].train()
    return model


class KeepsNormsInEval(nn.Sequential):
    """A frozen BatchNorm as many write it; it counts how often its mode was set."""

    def __init__(self) -> None:
        super().__init__(Body(), nn.Linear(3, 1))
        self.times = 0

    def train(self, mode: bool = True) -> KeepsNormsInEval:
        super().train(mode)
        self.times += 1
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


class FrozenPart(nn.Module):
    """A part that stays in evaluation mode whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.train()

    def train(self, mode: bool = True) -> FrozenPart:
        return super().train(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


ALL = ("0", "0.0", "0.1", "0.2", "0.2.0", "0.2.1")
#: Models with the names of the modules that are in evaluation mode in training.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "nothing": (lambda: nn.Sequential(Body(), nn.Linear(3, 1)), ()),
    "frozen part": (freeze_all, ALL),
    "frozen layer": (freeze_inner_norm, ("0.2.1",)),
    "thawed within": (thaw_within_frozen, ("0", "0.0", "0.1")),
    "all but the head": (evaluate_all_but_head, ALL),
    "returned in eval": (lambda: nn.Sequential(Body(), nn.Linear(3, 1)).eval(), ()),
    "its own train method": (KeepsNormsInEval, ("0.1", "0.2.1")),
    "a part's own train method": (
        lambda: nn.Sequential(FrozenPart(), nn.Linear(3, 1)),
        ("0", "0.body", "0.body.0", "0.body.1", "0.body.2", "0.body.2.0", "0.body.2.1"),
    ),
}


def names_in_eval(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules() if not module.training)


@dataclass(frozen=True)
class Own:
    make_model: Callable[[], nn.Module]
    seen: list[bool]

    def model(self) -> nn.Module:
        return self.make_model()

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        self.seen.append(model.training)
        return Loss(model(batch[0]).square().sum(), len(batch[0]))


def build(name: str) -> TrainComponents:
    data = TensorDataset(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    recipe = Own(MODELS[name][0], [])
    return build_components(recipe, CONFIG, Topology(), torch.device("cpu"), Datasets(data, data))


def validate(components: TrainComponents) -> None:
    plan = make_training_plan(CONFIG, DatasetSizes(8, 8), 1)
    plan = replace(plan, config=replace(plan.config, data=CONFIG.data))
    validator = components.make_validator(plan, Topology())
    assert validator is not None
    validator.run(components.replica)


@pytest.mark.parametrize("name", MODELS)
def test_each_module_keeps_its_mode(name: str) -> None:
    components = build(name)
    model, expected = components.replica.module, MODELS[name][1]
    assert names_in_eval(model) == expected
    for _ in range(2):
        validate(components)
        assert components.recipe.seen[-1] is False, "model.training is False in validation"
        assert names_in_eval(model) == expected
    assert model.training


@pytest.mark.parametrize("name", MODELS)
def test_padding_keeps_modes_and_running_statistics(name: str) -> None:
    components = build(name)
    replica = components.replica
    before = {key: value.clone() for key, value in replica.module.state_dict().items()}
    with replica.micro_batch(last=True, is_padding=True, shard=0):
        loss = replica.compute_loss(components.recipe.loss, [torch.ones(1, 3)])
        replica.backward(loss.total, 1)
    assert names_in_eval(replica.module) == MODELS[name][1]
    assert all(torch.equal(value, before[key]) for key, value in replica.module.state_dict().items())


def test_modes_that_the_recipe_sets_in_training_outlive_validation() -> None:
    components = build("frozen part")
    model = components.replica.module
    model[0].train()
    validate(components)
    assert names_in_eval(model) == ()
    model[0][1].eval()
    validate(components)
    assert names_in_eval(model) == ("0.1",)


def test_a_train_method_of_its_own_is_called() -> None:
    components = build("its own train method")
    model = components.replica.module
    before = model.times
    validate(components)
    assert model.times == before + 2, "into evaluation mode and back"


def test_outermost_modules_in_eval_are_named() -> None:
    model = thaw_within_frozen()
    enter_training_mode(model)
    assert find_modules_in_eval(model) == ["0"]
    assert find_modules_in_eval(freeze_inner_norm()) == ["0.2.1"]
    assert find_modules_in_eval(nn.Linear(1, 1)) == []


def load_backbone(*, frozen: bool = False, layer: nn.Module | None = None) -> nn.Module:
    """A backbone as libraries return it, with a new head."""
    backbone = nn.Sequential(nn.Linear(3, 3), layer or nn.Dropout(0.1)).eval()
    return nn.Sequential(backbone.requires_grad_(not frozen), nn.Linear(3, 1))


def freeze_norms() -> nn.Module:
    return KeepsNormsInEval().train()


TRAINED_IN_EVAL: dict[str, Callable[[], nn.Module]] = {
    "dropout": load_backbone,
    "norm": lambda: load_backbone(layer=nn.BatchNorm1d(3)),
    "attention": lambda: load_backbone(layer=nn.MultiheadAttention(4, 1, dropout=0.1)),
    "recurrent": lambda: load_backbone(layer=nn.LSTM(3, 3, 2, dropout=0.1)),
}
IN_EVAL_ON_PURPOSE: dict[str, Callable[[], nn.Module]] = {
    "frozen": lambda: load_backbone(frozen=True),
    "nothing differs": lambda: load_backbone(layer=nn.LayerNorm(3)),
    "dropout of 0": lambda: load_backbone(layer=nn.Dropout(0.0)),
    "norms alone": freeze_norms,
    "all of the model": lambda: nn.Sequential(Body(), nn.Linear(3, 1)).eval(),
    "in training": lambda: nn.Sequential(Body(), nn.Linear(3, 1)),
}


@pytest.mark.parametrize("name", TRAINED_IN_EVAL)
def test_module_trained_in_eval_is_told_with_the_remedy(name: str) -> None:
    model = TRAINED_IN_EVAL[name]()
    enter_training_mode(model)
    said = describe_untrained_modes(model)
    assert said is not None
    assert said.startswith("0 is trained in eval mode, as model() returned it: without dropout")
    assert "Call model.train() in model()" in said
    assert find_modules_in_eval(model) == ["0"], "its mode stays"


@pytest.mark.parametrize("name", IN_EVAL_ON_PURPOSE)
def test_module_in_eval_on_purpose_is_not_told(name: str) -> None:
    model = IN_EVAL_ON_PURPOSE[name]()
    enter_training_mode(model)
    assert describe_untrained_modes(model) is None
