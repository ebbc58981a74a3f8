"""A loss that does not add up over the halves of a micro-batch gets an alarm that says how it scales."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from launcher.config.schema import BatchConfig, DataConfig, LaunchConfig, LrConfig, RunConfig
from launcher.distributed.store_gather import StoreGather
from launcher.plan.sample_order import SamplePermutation
from launcher.plan.timeline import Position
from launcher.plan.training_plan import DatasetSizes, make_training_plan
from launcher.recipe import Loss
from launcher.strategies.ddp import DdpReplica
from launcher.strategies.fsdp import FsdpReplica
from launcher.strategies.interface import ReplicaArgs
from launcher.strategies.precision import Precision
from launcher.telemetry.stage_clock import HostTimer, StageClock
from launcher.topology import Topology
from launcher.train.context import TrainContext
from launcher.train.loss_check import check_loss
from launcher.train.loss_scaling import LossSplit, describe_split, find_scaling_problem
from launcher.train.state import TrainState

CPU = torch.device("cpu")
SIZE, TOKENS, CLASSES = 40, 6, 5
IGNORED = -100
CONFIG = RunConfig(
    optimizer={"_target_": "torch.optim.SGD"},
    lr=LrConfig(base=0.1, base_batch=8),
    batch=BatchConfig(per_device=12),
    data=DataConfig(num_workers=0),
)


class Texts:
    """Sequences of different lengths, the rest ignored, and a number for each; item 3 has no target at all."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(TOKENS, 4, generator=generator)
        y = torch.randint(CLASSES, (TOKENS,), generator=generator)
        y[1 + index % TOKENS if index != 3 else 0 :] = IGNORED
        return x, y, x.sum()


def scores(model: nn.Module, x: Tensor, y: Tensor, reduction: str, **options: Any) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction=reduction, **options)


def valid(y: Tensor) -> Tensor:
    return (y != IGNORED).sum()


def per_sample(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none")
    return losses.sum(1) / (y != IGNORED).sum(1).clamp_min(1)


def squares(model: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    return (model(x).sum((1, 2)) - z).square()


def contrast(model: nn.Module, x: Tensor) -> Tensor:
    rows = F.normalize(model(x).flatten(1), dim=1)
    return F.cross_entropy(rows @ rows.T / 0.5, torch.arange(len(x)), reduction="sum")


def weights_of(model: nn.Module) -> Tensor:
    return torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum()


class_weights = torch.tensor([1.0, 2.0, 0.5, 0.1, 3.0])
LossFn = Callable[[nn.Module, Tensor, Tensor, Tensor], Loss]

#: Losses that do not add up, with what the alarm says of them.
PROBLEMS: dict[str, tuple[LossFn, str]] = {
    "mean": (lambda m, x, y, z: Loss(squares(m, x, z).mean(), len(x)), "like a mean"),
    "half mean": (lambda m, x, y, z: Loss(0.5 * squares(m, x, z).mean(), len(x)), "like a mean"),
    "mean and another": (
        lambda m, x, y, z: Loss(squares(m, x, z).mean() + 0.01 * m(x).abs().mean(), len(x)),
        "like a mean",
    ),
    "root of a mean": (lambda m, x, y, z: Loss(squares(m, x, z).mean().sqrt(), len(x)), "like a mean"),
    "root of a sum": (lambda m, x, y, z: Loss(squares(m, x, z).sum().sqrt(), len(x)), "the square root"),
    "mean of means over tokens": (lambda m, x, y, z: Loss(per_sample(m, x, y).mean(), len(x)), "like a mean"),
    "mean over tokens": (lambda m, x, y, z: Loss(scores(m, x, y, "mean"), valid(y)), "like a mean"),
    "mean over tokens times samples": (
        lambda m, x, y, z: Loss(scores(m, 9 * x, y, "mean") * len(x), len(x)),
        "times the sum of its two halves' totals",
    ),
    "mean times a fixed batch": (lambda m, x, y, z: Loss(scores(m, x, y, "mean") * 32, len(x)), "like a mean"),
    "fixed count": (lambda m, x, y, z: Loss(squares(m, x, z).sum(), 32), "counts 32 in 12 samples, but 32 and 32"),
    "count of a mean": (lambda m, x, y, z: Loss(squares(m, x, z).sum(), valid(y) / len(y)), "counts "),
    "penalty once a micro-batch": (
        lambda m, x, y, z: Loss(squares(m, x, z).sum() + 9 * weights_of(m), len(x)),
        "grows more slowly than",
    ),
    "largest": (lambda m, x, y, z: Loss(squares(m, x, z).amax(), len(x)), "times the sum of its two halves' totals"),
    "contrastive": (lambda m, x, y, z: Loss(contrast(m, x), len(x)), "grows faster than the number of samples, as wh"),
    "difference": (
        lambda m, x, y, z: Loss(squares(m, x - x.mean(0), z).sum(), len(x)),
        "times the sum of its two halves' totals",
    ),
    "mean in training only": (
        lambda m, x, y, z: Loss(squares(m, x, z).mean() if m.training else squares(m, x, z).sum(), len(x)),
        "like a mean",
    ),
    "mean of noise": (lambda m, x, y, z: Loss(squares(m, x + torch.rand(len(x), 1, 1), z).mean(), len(x)), "like a m"),
}


def average_unless_empty(m: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> Loss:
    return Loss(scores(m, x, y, "mean") * valid(y), valid(y))


def penalise_gradient(m: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> Loss:
    x = x.requires_grad_()
    out = m(x).sum((1, 2))
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return Loss((out - z).square().sum() + (gradient.flatten(1).norm(dim=1) - 1).square().sum(), len(x))


FIRST = Texts()[SamplePermutation(SIZE, 0, 0)[0]][2]

#: Losses that add up, or that only a random draw keeps from it.
SUMS: dict[str, LossFn] = {
    "sum": lambda m, x, y, z: Loss(squares(m, x, z).sum(), len(x)),
    "tokens": lambda m, x, y, z: Loss(scores(m, x, y, "sum"), valid(y)),
    "tokens, by their mean": average_unless_empty,
    "class weights": lambda m, x, y, z: Loss(
        scores(m, x, y, "sum", weight=class_weights), class_weights[y[y != IGNORED]].sum()
    ),
    "nothing valid": lambda m, x, y, z: Loss(0.0 * scores(m, x, y, "sum"), 0),
    "a half without targets": lambda m, x, y, z: Loss((squares(m, x, z) * (z == FIRST)).sum(), (z == FIRST).sum()),
    "means within samples": lambda m, x, y, z: Loss(per_sample(m, x, y).sum(), len(x)),
    "label smoothing": lambda m, x, y, z: Loss(scores(m, x, y, "sum", label_smoothing=0.1), valid(y)),
    "signed": lambda m, x, y, z: Loss((m(x).sum((1, 2)) * z.sign()).sum(), len(x)),
    "penalty for each sample": lambda m, x, y, z: Loss(squares(m, x, z).sum() + len(x) * weights_of(m), len(x)),
    "gradient penalty": penalise_gradient,
    "noise": lambda m, x, y, z: Loss(squares(m, x + 0.3 * torch.randn_like(x), z).sum(), len(x)),
    "noise of numpy": lambda m, x, y, z: Loss(squares(m, x + np.random.rand(), z).sum(), len(x)),
    "always zero": lambda m, x, y, z: Loss(0 * squares(m, x, z).sum(), len(x)),
    "not finite": lambda m, x, y, z: Loss(squares(m, x, z).mean() * math.nan, len(x)),
    "for one size only": lambda m, x, y, z: Loss(squares(m, x.view(12, TOKENS, 4), z).mean(), len(x)),
}


class Mixing(nn.Module):
    """Mixes samples and draws in training mode itself, not in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * x.detach().mean((0, 1))
        return self.layer(F.dropout(x - self.centre, 0.2, self.training))


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(TOKENS), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, CLASSES))
        self[2].eval()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


MODELS = {"linear": lambda: nn.Sequential(nn.Linear(4, CLASSES)), "normed": Normed, "mixing": Mixing}


@dataclass(frozen=True)
class Own:
    loss_fn: LossFn
    calls: list[int]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Loss:
        self.calls.append(len(batch[0]))
        return self.loss_fn(model, *batch)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_context(loss_fn: LossFn, model: nn.Module, kind: type = DdpReplica, **changes: Any) -> Any:
    config = replace(CONFIG, **{name: value for name, value in changes.items() if name != "topology"})
    precision = Precision.from_name(config.train.precision, CPU)
    plan = make_training_plan(config, DatasetSizes(SIZE, SIZE), 1)
    replica = kind(ReplicaArgs(model.train(), plan.config, dist.get_world_size(), precision, StageClock(HostTimer())))
    return SimpleNamespace(
        training_plan=plan, config=plan.config, recipe=Own(loss_fn, []), replica=replica, precision=precision,
        topology=changes.get("topology", Topology()),
    )  # fmt: skip


def find_alone(context: Any, items: Any = None) -> tuple[str | None, bool]:
    return find_scaling_problem(context, items or Texts(), StoreGather(dist.HashStore(), 0, 1))


def find_problem(loss_fn: LossFn, model: str = "linear", kind: type = DdpReplica, **changes: Any) -> str | None:
    torch.manual_seed(0)
    return find_alone(make_context(loss_fn, MODELS[model](), kind, **changes))[0]


@pytest.mark.parametrize("name", PROBLEMS)
def test_loss_that_does_not_add_up_is_described(name: str) -> None:
    loss_fn, words = PROBLEMS[name]
    problem = find_problem(loss_fn)
    assert problem is not None
    assert words in problem


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SUMS)
def test_loss_that_adds_up_gets_no_alarm(name: str, model: str) -> None:
    assert find_problem(SUMS[name], model) is None


def test_ranks_wait_for_one_that_does_not_read_its_data_as_long_as_the_configuration_says() -> None:
    context = make_context(SUMS["sum"], MODELS["linear"](), launch=LaunchConfig(timeout_s=0.1))
    store, begin_s = dist.HashStore(), time.monotonic()
    store.set_timeout(timedelta(seconds=30))
    with pytest.raises(RuntimeError, match="timeout"):
        find_scaling_problem(context, Texts(), StoreGather(store, 1, 2))
    assert time.monotonic() - begin_s < 15, "it has waited for the store's own timeout"


@pytest.mark.parametrize("model", ["normed", "mixing"])
@pytest.mark.parametrize("name", ["mean", "root of a mean", "mean in training only"])
def test_model_that_mixes_samples_in_training_hides_no_mean(name: str, model: str) -> None:
    assert find_problem(PROBLEMS[name][0], model) is not None


@pytest.mark.parametrize("kind", [DdpReplica, FsdpReplica])
def test_comparison_leaves_no_trace(kind: type) -> None:
    torch.manual_seed(0)
    context = make_context(SUMS["noise"], Normed(), kind)
    model = context.replica.module
    model.register_buffer("later", None)
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    drawn = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert find_alone(context) == (None, True)
    now = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(drawn[0], now[0])
    assert drawn[1:] == now[1:]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if kind is DdpReplica)
    assert torch.equal(model[1].running_mean, state["1.running_mean"])
    assert (model.calls == 0) is (kind is DdpReplica), "a copy is computed with where that is possible"


@pytest.mark.parametrize("kind", [DdpReplica, FsdpReplica])
@pytest.mark.parametrize("name", ["mean", "sum", "gradient penalty", "not finite"])
def test_every_rank_computes_alike(name: str, kind: type) -> None:
    """An error or a NaN ends the comparison at the same point everywhere, since each rank has the same samples."""
    loss_fn = PROBLEMS[name][0] if name in PROBLEMS else SUMS[name]
    calls = []
    for topology in (Topology(), Topology(rank=1, world=2)):
        context = make_context(loss_fn, nn.Linear(4, CLASSES), kind, topology=topology)
        find_alone(context)
        calls.append(context.recipe.calls)
    assert calls[0] == calls[1] != []


@pytest.mark.parametrize(("per_device", "samples"), [(1, 2), (3, 3), (40, 16)])
def test_few_samples_are_compared(per_device: int, samples: int) -> None:
    problem = find_problem(PROBLEMS["mean"][0], batch=BatchConfig(per_device=per_device))
    assert problem is not None
    assert f"its total of {samples} samples is" in problem


def test_single_sample_is_not_compared() -> None:
    context = make_context(PROBLEMS["mean"][0], nn.Linear(4, CLASSES))
    assert find_alone(context, [Texts()[0]]) == (None, False)


def test_loader_process_reads_the_samples() -> None:
    assert find_problem(PROBLEMS["mean"][0], data=DataConfig(num_workers=2)) is not None


def test_difference_within_the_draws_of_a_random_loss_is_no_problem() -> None:
    split = LossSplit(4, (10.0, 4.0), ((6.0, 2.0), (6.0, 2.0)), again=(9.0, 4.0))
    assert describe_split(split, 1e-3) is None
    assert describe_split(replace(split, again=split.whole), 1e-3) is not None
    assert describe_split(replace(split, halves=((10.0, 2.0), (10.0, 2.0))), 1e-3) is not None


# When
class Logger:
    def __init__(self) -> None:
        self.details: list[str] = []

    def log_event(self, name: str, *, kind: str, detail: str) -> None:
        assert (name, kind) == ("alarm", "loss")
        self.details.append(detail)


def raise_alarms(name: str, *, state: TrainState | None = None, generation: int = 1) -> list[str]:
    """The alarms of a run's first three losses."""
    context = make_context(PROBLEMS[name][0] if name in PROBLEMS else SUMS[name], nn.Linear(4, CLASSES))
    logger = Logger()
    fields = {field.name: None for field in dataclasses.fields(TrainContext)}
    known = {key: value for key, value in vars(context).items() if key in fields}
    full = TrainContext(**{**fields, **known, "logger": logger, "topology": Topology(generation=generation)})  # type: ignore[arg-type]
    checked = check_loss(full, state or TrainState.initial(context.training_plan), Texts(), dist.HashStore())
    batch = tuple(torch.stack(column) for column in zip(*(Texts()[index] for index in range(8)), strict=True))
    for _ in range(3):
        checked.recipe.loss(context.replica.module, batch)
    return logger.details


def test_one_alarm_is_raised_at_the_first_start_of_a_run() -> None:
    (detail,) = raise_alarms("root of a mean")
    assert detail.startswith("loss() of Own does not add up: its total of 12 samples is 0.5")
    (detail,) = raise_alarms("mean")
    assert detail.startswith("loss() of Own returns a mean (MeanBackward0) and counts 8: return sums")
    assert raise_alarms("sum") == []
    assert raise_alarms("mean", generation=2) == []
    state = TrainState.initial(make_context(SUMS["sum"], nn.Linear(4, CLASSES)).training_plan)
    assert raise_alarms("mean", state=replace(state, position=Position(12, 1))) == []
