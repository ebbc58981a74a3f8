"""An optimizer's state is restored exactly, wherever it is kept, or refused by name after the first step."""

from __future__ import annotations

import json
import random
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from launcher.checkpoint.manifest import open_checkpoint
from launcher.checkpoint.tensor_io import CheckpointState, SaveOptions, load_checkpoint, save_checkpoint
from launcher.config.schema import LrConfig, RunConfig, ScheduleConfig
from launcher.errors import UsageError
from launcher.recipe import Loss
from launcher.strategies.ddp import DdpReplica
from launcher.strategies.interface import Replica, ReplicaArgs
from launcher.strategies.optimizer_state import OptimizerState
from launcher.strategies.precision import Precision
from launcher.telemetry.stage_clock import HostTimer, StageClock


class Momentum(torch.optim.Optimizer):
    """A step whose size depends on everything that `keep` and `read_factor` of a subclass keep."""

    def __init__(self, params: Any, lr: float = 1e-3, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    def keep(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> float:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    factor = self.keep(group, parameter, self.state[parameter])
                    parameter.sub_(parameter.grad, alpha=group["lr"] * factor)


class InGroup(Momentum):
    """As schedule-free and Prodigy: counters, sums and tensors in the group."""

    def keep(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> float:
        group["k"] = group.get("k", 0) + 1
        group["weight_sum"] = group.get("weight_sum", 0.0) + 0.1 * group["k"]
        group["d"] = group.get("d", torch.tensor(1e-6)) + parameter.grad.abs().sum()
        group["beta"] *= 0.99
        return float(1 / group["weight_sum"] + group["d"] * group["beta"])


class Nested(Momentum):
    """As Shampoo and SOAP: lists of tensors of other shapes and layouts, and more."""

    def keep(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> float:
        if not state:
            state["precond"] = [torch.eye(size) for size in parameter.shape]
            state["cache"] = {"seen": (None, True), "recent": deque(maxlen=2), 3: {"counts": torch.zeros(2, dtype=int)}}
            state.update(count=torch.tensor(0), master=parameter.double(), mask=parameter > 0, empty=None, mode="first")
        for number, matrix in enumerate(state["precond"]):
            rows = parameter.grad.movedim(number, 0).reshape(len(matrix), -1)
            state["precond"][number] = torch.linalg.qr(matrix + rows @ rows.T)[0].T
        state["cache"]["recent"].append(float(parameter.grad.sum()))
        state["cache"][3]["counts"] += state["cache"]["seen"][1]
        state["master"] *= 1 + 1e-9
        state["count"] += 1
        assert state["mode"] in ("first", "later")
        state["mode"] = "later"
        layout = sum(float((matrix @ matrix.mT).sum()) for matrix in state["precond"])
        return layout + float(state["master"].sum()) + sum(state["cache"]["recent"]) + float(state["count"])


class OnItself(Momentum):
    """Attributes, a counter for all parameters in the state, and one tensor that all parameters share."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        self.k = 0
        self.history: list[float] = []
        self.shared = torch.zeros(())
        self.scale = 2.0

    def keep(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> float:
        self.k += 1
        self.history.append(float(parameter.sum()))
        self.state["calls"] = self.state.get("calls", 0) + 1
        state["shared"] = self.shared
        state["shared"] += 0.5
        return self.k * self.scale + sum(self.history) + self.state["calls"] + float(self.shared)


class WithEntries(Momentum):
    """As lookahead: `state_dict` has more than torch's entries."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        self.slow = {"n": 0, "mean": torch.zeros(2)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "slow": self.slow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.slow = state_dict["slow"]
        super().load_state_dict(state_dict)

    def keep(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> float:
        self.slow["n"] += 1
        self.slow["mean"] += self.slow["n"]
        return float(self.slow["mean"].sum())


class KeepsSet(Momentum):
    def keep(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> float:
        state["seen"] = {1}
        return 1.0


class KeepsFunction(Momentum):
    def keep(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> float:
        group["rule"] = lambda: 0
        return 1.0


class KeepsGenerator(Momentum):
    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        self.noise = torch.Generator()

    def keep(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> float:
        return float(torch.rand((), generator=self.noise))


class KeepsOptimizer(Momentum):
    """As SAM and Lookahead: a second optimizer with a state of its own."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        self.base = torch.optim.Adam(self.param_groups, lr=lr)

    def keep(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> float:
        self.base.step()
        return 0.0


class Tracker:
    def __init__(self) -> None:
        self.count = 0


class KeepsObject(Momentum):
    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        self.tracker = Tracker()

    def keep(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> float:
        self.tracker.count += 1
        return 1.0


class KeepsConstants(Momentum):
    """Values that never change, of kinds that a checkpoint cannot hold."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        self.table = np.linspace(0.0, 1.0, 5, dtype=np.float32)
        self.unused = [np.random.default_rng(0), torch.Generator(), random.Random(0), np.random.RandomState(0)]
        self.tracker = Tracker()
        self.tracker.window = torch.ones(3, dtype=torch.bfloat16)  # type: ignore[attr-defined]
        self.kind = np.dtype("float32")

    def keep(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> float:
        return float(self.table[3])


class ChangesArray(KeepsConstants):
    def keep(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> float:
        self.table[0] += 1
        return 1.0


class ChangesTensor(KeepsConstants):
    def keep(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> float:
        self.tracker.window[0] += 1  # type: ignore[attr-defined]
        return 1.0


class DrawsNumbers(KeepsConstants):
    def keep(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> float:
        return float(self.unused[0].normal())  # type: ignore[union-attr]


def make_config(name: str, **options: Any) -> RunConfig:
    target = name if "." in name else f"{__name__}.{name}"
    return RunConfig(
        recipe={"_target_": "launcher.recipes.mlp.Mlp", "trust": [__name__]},
        optimizer={"_target_": target, **options},
        lr=LrConfig(base=0.1, base_batch=8),
    )


def make_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))


def make_replica(config: RunConfig, model: nn.Module | None = None) -> DdpReplica:
    torch.manual_seed(0)
    precision, clock = Precision.from_name("fp32", torch.device("cpu")), StageClock(HostTimer())
    return DdpReplica(ReplicaArgs(model or make_model(), config, 1, precision, clock))


def compute_loss(model: nn.Module, samples: torch.Tensor) -> Loss:
    return Loss(model(samples).square().sum(), len(samples))


def train_update(replica: Replica, update: int, lr: float = 1e-3) -> None:
    samples = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(update))
    with replica.micro_batch(last=True, is_padding=False, shard=0):
        replica.backward(replica.compute_loss(compute_loss, samples).total, 4)
    replica.step(lr, None, 1.0, None)


def save_and_restore(replica: Replica, fresh: Replica, folder: Path) -> None:
    model, optimizer, facts = replica.full_state()
    state = CheckpointState(model, optimizer, {"samples": 1}, {}, 1, facts)
    checkpoint = open_checkpoint(save_checkpoint(folder, "one", state, SaveOptions(keep=1)).path)
    loaded = load_checkpoint(checkpoint)
    fresh.restore(loaded.model, loaded.optimizer, loaded.manifest.facts)


def assert_same_parameters(one: nn.Module, other: nn.Module) -> None:
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
        assert parameter.stride() == other.get_parameter(name).stride(), name


MOMENTUM = ("torch.optim.SGD", "torch.optim.RMSprop")
TORCH = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adafactor", "Rprop", "Adagrad", "ASGD", "Adadelta", "RMSprop"]


@pytest.mark.parametrize(
    "name", ["InGroup", "Nested", "OnItself", "WithEntries", *(f"torch.optim.{name}" for name in TORCH)]
)
def test_training_continues_bitwise(tmp_path: Path, name: str) -> None:
    config = make_config(name, **({"momentum": 0.9} if name in MOMENTUM else {}))
    replica, fresh = make_replica(config), make_replica(config)
    for update in range(3):
        train_update(replica, update)
    save_and_restore(replica, fresh, tmp_path)
    assert_same_parameters(replica.module, fresh.module)
    for update in range(3, 6):
        train_update(replica, update)
        train_update(fresh, update)
        assert_same_parameters(replica.module, fresh.module)
    assert json.dumps(replica.full_state().facts) == json.dumps(fresh.full_state().facts)


def test_values_of_the_state_keep_dtype_shape_and_kind(tmp_path: Path) -> None:
    replica, fresh = make_replica(make_config("Nested")), make_replica(make_config("Nested"))
    train_update(replica, 0)
    save_and_restore(replica, fresh, tmp_path)
    state = fresh.optimizer.state[fresh.module[0].weight]
    assert (state["count"].dtype, state["master"].dtype, state["mask"].dtype) == (
        torch.int64,
        torch.float64,
        torch.bool,
    )
    assert [tuple(matrix.shape) for matrix in state["precond"]] == [(3, 3), (2, 2), (3, 3), (3, 3)]
    assert (state["empty"], state["mode"]) == (None, "later")
    assert list(state["cache"]) == ["seen", "recent", 3]
    assert state["cache"]["recent"].maxlen == 2


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_state_is_restored_in_layout_of_parameter(tmp_path: Path, name: str, channels_last: bool) -> None:
    config = make_config(f"torch.optim.{name}", **({"momentum": 0.9} if name == "SGD" else {}))
    models = [make_model() for _ in range(2)]
    for model in models:
        if channels_last:
            model.to(memory_format=torch.channels_last)
        else:
            model[2].weight = nn.Parameter(model[2].weight.detach().t().contiguous().t())
    replica, fresh = (make_replica(config, model) for model in models)
    fresh.module.load_state_dict(replica.module.state_dict())
    for update in range(2):
        train_update(replica, update)
    save_and_restore(replica, fresh, tmp_path)
    for parameter, state in fresh.optimizer.state.items():
        moments = [value for value in state.values() if value.shape == parameter.shape and value.ndim]
        assert moments
        assert all(value.stride() == parameter.stride() for value in moments)
    for update in range(2, 4):
        train_update(replica, update)
        train_update(fresh, update)
        assert_same_parameters(replica.module, fresh.module)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("KeepsSet", r"0\.weight/seen is a set"),
        ("KeepsFunction", "group 0/rule is a function"),
        ("KeepsGenerator", r"self\.noise is a torch\._C\.Generator"),
        ("KeepsOptimizer", r"self\.base is a torch\.optim\.adam\.Adam"),
        ("KeepsObject", r"self\.tracker is a .*Tracker"),
        ("ChangesArray", r"self\.table is a numpy\.ndarray"),
        ("ChangesTensor", r"self\.tracker is a .*Tracker"),
        ("DrawsNumbers", r"self\.unused\[0\] is a numpy\..*Generator"),
    ],
)
def test_other_state_is_refused_after_first_update(name: str, named: str) -> None:
    replica = make_replica(make_config(name))
    with pytest.raises(UsageError, match=f"optimizer={name}: {named}, which a checkpoint cannot hold"):
        train_update(replica, 0)


def test_values_that_never_change_are_no_state() -> None:
    replica = make_replica(make_config("KeepsConstants"))
    for update in range(2):
        train_update(replica, update)
    assert "attributes" not in replica.full_state().facts["optimizer"]


@pytest.mark.parametrize("slot", ["step", "mu_product"])
@pytest.mark.parametrize("option", ["fused", "capturable"])
def test_step_count_goes_where_the_optimizer_of_now_needs_it(slot: str, option: str) -> None:
    """Not where that of the checkpoint had it, which another choice of kernels may have written."""
    model = nn.Linear(3, 1, device="meta")
    optimizer = torch.optim.NAdam([{"params": [model.weight]}, {"params": [model.bias]}])
    state, value, facts = (
        OptimizerState(optimizer, model),
        torch.zeros(()),
        {"on_cpu": [f"weight/{slot}", f"bias/{slot}"]},
    )
    assert state._choose_device(f"bias/{slot}", value, facts).type == "cpu"
    optimizer.param_groups[1][option] = True
    assert state._choose_device(f"bias/{slot}", value, facts).type == "meta"
    assert state._choose_device(f"weight/{slot}", value, facts).type == "cpu"
    assert state._choose_device("weight/step", value, {}).type == "cpu"
    assert state._choose_device("bias/master", value, {"on_cpu": ["bias/master"]}).type == "cpu"


def test_learning_rate_and_configured_options_are_not_state(tmp_path: Path) -> None:
    config = make_config("torch.optim.AdamW", weight_decay=0.1, betas=(0.9, 0.99))
    replica = make_replica(config)
    train_update(replica, 0)
    assert "entries" not in replica.full_state().facts["optimizer"]
    fresh = make_replica(replace(config, optimizer={**config.optimizer, "weight_decay": 0.2}))
    save_and_restore(replica, fresh, tmp_path)
    assert {group["weight_decay"] for group in fresh.optimizer.param_groups} == {0.2, 0.0}
    assert {group["lr"] for group in fresh.optimizer.param_groups} == {0.0}


def test_momentum_of_the_schedule_is_not_state() -> None:
    config = make_config("torch.optim.SGD", momentum=0.9)
    replica = make_replica(replace(config, schedule=ScheduleConfig(decay="onecycle", momentum=(0.85, 0.95))))
    with replica.micro_batch(last=True, is_padding=False, shard=0):
        replica.backward(replica.module(torch.randn(4, 2, 5, 5)).square().sum(), 4)
    replica.step(0.1, 0.87, 1.0, None)
    assert "entries" not in replica.full_state().facts["optimizer"]


def test_checkpoint_without_the_new_facts_loads(tmp_path: Path) -> None:
    """As written before groups and nested values were saved."""
    replica, fresh = (make_replica(make_config("torch.optim.AdamW")) for _ in range(2))
    train_update(replica, 0)
    facts = replica.full_state().facts
    assert set(facts["optimizer"]) == {"kind", "numbers", "groups"}, "the format of common optimizers is unchanged"
    save_and_restore(replica, fresh, tmp_path)
    train_update(replica, 1)
    train_update(fresh, 1)
    assert_same_parameters(replica.module, fresh.module)


def test_state_of_other_groups_is_refused(tmp_path: Path) -> None:
    replica = make_replica(make_config("InGroup"))
    train_update(replica, 0)
    other = make_replica(make_config("InGroup"), nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2)))
    other._optimizer_state._names_by_group = [["0.weight"]]
    with pytest.raises(UsageError, match="state of other parameter groups"):
        save_and_restore(replica, other, tmp_path)


def test_step_count_saved_once_for_a_group_is_one_for_each_parameter(tmp_path: Path) -> None:
    """As ZeRO keeps it, and as earlier versions saved it."""
    config = make_config("torch.optim.AdamW")
    replica, fresh = make_replica(config), make_replica(config)
    for update in range(3):
        train_update(replica, update)
    model, optimizer, facts = replica.full_state()
    step = torch.tensor(3.0)
    shared = {key: step if key.endswith("/step") else value for key, value in optimizer.items()}
    state = CheckpointState(model, shared, {"samples": 1}, {}, 1, facts)
    loaded = load_checkpoint(open_checkpoint(save_checkpoint(tmp_path, "one", state, SaveOptions(keep=1)).path))
    fresh.restore(loaded.model, loaded.optimizer, loaded.manifest.facts)
    for update in range(3, 6):
        train_update(replica, update)
        train_update(fresh, update)
    assert_same_parameters(replica.module, fresh.module)
