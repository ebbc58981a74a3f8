"""The code of the three ranks in test_state_transfer.py.

`python transfer_cases.py FOLDER RANK` runs all cases; the outcomes are in FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launcher.config.schema import RunConfig
from launcher.recipe import Loss
from launcher.strategies.interface import Replica, ReplicaArgs
from launcher.strategies.precision import Precision
from launcher.strategies.registry import build_replica
from launcher.telemetry.stage_clock import HostTimer, StageClock
from launcher.telemetry.stats_fields import NUM_STATS
from launcher.train import state_transfer

WORLD, SOURCE, BEHIND, LEVEL = 3, 1, 0, 2
TRAINING = {"position": {"samples": 12, "update": 3}, "seconds": 0.1 + 0.2, "metrics": {"loss": None}, "skips": 0}


class ManyKinds(nn.Module):
    """Tied and frozen parameters, one that gets a gradient late, another memory layout, and buffers of all kinds."""

    flags: torch.Tensor
    count: torch.Tensor
    short: torch.Tensor
    grown: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm, self.first, self.tied = nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.late, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.calls = 0
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("short", torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("unset", None)
        self.register_buffer("grown", torch.zeros(1))

    def forward(self, x: torch.Tensor, update: int) -> torch.Tensor:
        hidden = torch.tanh(self.norm(self.conv(x))).mean(dim=(2, 3))
        hidden = self.frozen(torch.tanh(self.tied(torch.tanh(self.first(hidden)))))
        with torch.no_grad():
            self.calls += 1
            self.count += 1
            self.flags.logical_not_()
            self.short += hidden.mean().bfloat16() / 3
            self.grown = torch.arange(update + 1.0)
        return self.late(hidden) if update >= 2 else hidden

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls, "recent": [torch.full((2,), float(self.calls))]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]
        assert state["recent"][0].tolist() == [self.calls, self.calls]


class Remembers(torch.optim.SGD):
    """An optimizer with state in lists and in its group, tensors in half precision, and one in another layout."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for parameter in (p for p in group["params"] if p.grad is not None):
                slots = self.state[parameter]
                slots["recent"] = [*slots.get("recent", [])[-1:], parameter.grad.norm().bfloat16()]
                slots["mean"] = slots.get("mean", 0) + parameter.grad.double().t() / 3 if parameter.ndim == 2 else None
                slots["factor"] = 1 / (3 + group["steps"])
        return super().step(closure)


@dataclass(frozen=True)
class Case:
    """`damage` changes what this rank receives or holds, and returns how to undo that."""

    optimizer: dict[str, Any]
    precision: str = "fp32"
    behind_updates: int = 0  # of the rank that is behind; the others have 3
    own_buffers: bool = False  # the level rank has other buffers than the source
    damage: Callable[[Replica, int], Callable[[], None]] = lambda replica, rank: lambda: None


def flip_bit(replica: Replica, rank: int) -> Callable[[], None]:
    """The rank that is behind receives one wrong bit in the last tensors."""
    broadcast = dist.broadcast

    def receive(tensor: torch.Tensor, src: int) -> None:
        broadcast(tensor, src=src)
        if rank == BEHIND and tensor.dtype == torch.uint8 and tensor.numel() == 3 * 2:  # `short`
            tensor[3] ^= 1

    dist.broadcast = receive  # type: ignore[assignment]

    def undo() -> None:
        dist.broadcast = broadcast

    return undo


def change_parameter(replica: Any, rank: int) -> Callable[[], None]:
    """The level rank has one parameter that differs in its last bit."""
    if rank == LEVEL:
        weight = replica.module.first.weight.data.view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    return lambda: None


def change_moment(replica: Replica, rank: int) -> Callable[[], None]:
    """The level rank has other moments."""
    if rank == LEVEL:
        next(iter(replica.optimizer.state.values()))["exp_avg"].mul_(1.5)
    return lambda: None


ADAM = {"_target_": "torch.optim.Adam", "amsgrad": True}
SGD = {"_target_": "torch.optim.SGD", "momentum": 0.9}
CASES = {
    "adam": Case(ADAM),
    "adam, one update behind": Case(ADAM, behind_updates=2),
    "adam, ahead": Case(ADAM, behind_updates=4),
    "adam, own buffers": Case(ADAM, own_buffers=True),
    "adamw, fused": Case({"_target_": "torch.optim.AdamW", "fused": True}),
    "sgd with momentum": Case(SGD),
    "nadam": Case({"_target_": "torch.optim.NAdam"}),
    "fp64": Case(ADAM, precision="fp64"),
    "an optimizer of one's own": Case({"_target_": f"{__name__}.Remembers"}),
    "a wrong bit": Case(ADAM, damage=flip_bit),
    "another parameter": Case(ADAM, damage=change_parameter),
    "other moments": Case(ADAM, damage=change_moment),
}


def make_replica(case: Case) -> Replica:
    torch.manual_seed(0)
    config = replace(RunConfig(), optimizer=case.optimizer, recipe={"trust": [__name__]})
    precision = Precision.from_name(case.precision, torch.device("cpu"))
    model = ManyKinds().double() if case.precision == "fp64" else ManyKinds()
    return build_replica(ReplicaArgs(model, config, 1, precision, StageClock(HostTimer())))


def train(replica: Replica, updates: range, dtype: torch.dtype) -> None:
    """Every rank trains by itself, on the same data."""
    for update in updates:
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(update), dtype=dtype)
        with replica.micro_batch(last=True, is_padding=False, shard=0):
            loss = replica.compute_loss(lambda model, batch: Loss(model(batch, update).square().sum(), 4), x)  # noqa: B023
            replica.send_stats([0.0] * NUM_STATS)
            replica.backward(loss.total, 4)
        replica.receive_stats()
        replica.step(0.01, None, 1.0, None)


def describe(replica: Any) -> dict[str, Any]:
    """All of the state, to the last bit, apart from the buffers."""
    model, optimizer, facts = replica.full_state()
    groups = {"model": model, "optimizer": optimizer}
    tensors = {
        f"{group} {name}": f"{value.dtype} {list(value.shape)} {list(value.stride())} {value.double().tolist()}"
        for group, tensors in groups.items()
        for name, value in tensors.items()
    }
    return {
        "tensors": tensors,
        "facts": json.dumps(facts),
        "tied": replica.module.tied.weight is replica.module.first.weight,
    }


def run_case(case: Case, rank: int) -> dict[str, Any]:
    replica: Any = make_replica(case)
    dtype = Precision.from_name(case.precision, torch.device("cpu")).dtype
    train(replica, range(case.behind_updates if rank == BEHIND else 3), dtype)
    if case.own_buffers and rank == LEVEL:
        replica.module.norm.running_mean.add_(1.0)
        replica.module.calls += 5
    undo = case.damage(replica, rank)
    try:
        facts = state_transfer.transfer_state(
            replica, TRAINING if rank == SOURCE else {"position": rank}, source=SOURCE, is_behind=rank == BEHIND
        )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        undo()
    received = describe(replica)
    train(replica, range(3, 6), dtype)
    return {"facts": facts, "received": received, "continued": describe(replica)}


@contextmanager
def small_messages() -> Iterator[None]:
    """Buffers and messages of a few bytes, so that there are many."""
    sizes = state_transfer.BUFFER_BYTES, state_transfer.MESSAGE_BYTES
    state_transfer.BUFFER_BYTES, state_transfer.MESSAGE_BYTES = 64, 100
    try:
        yield
    finally:
        state_transfer.BUFFER_BYTES, state_transfer.MESSAGE_BYTES = sizes


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=300))
    outcomes = {name: run_case(case, rank) for name, case in CASES.items()}
    with small_messages():
        outcomes["adam in small messages"] = run_case(CASES["adam"], rank)
    (folder / f"{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
