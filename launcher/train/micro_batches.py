"""The forward and backward passes of one update: micro-batches, losses and their sums; shared with `launcher tune`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from launcher.distributed.rank_stats import sum_loss_counts
from launcher.plan.timeline import Update
from launcher.plan.training_plan import TrainingPlan
from launcher.plan.virtual_shards import compute_tree_sum
from launcher.recipe import Loss
from launcher.strategies.interface import Replica
from launcher.strategies.precision import Precision
from launcher.system.fault_injection import FaultInjector
from launcher.telemetry.stage_clock import StageClock
from launcher.topology import Topology
from launcher.train.batch_dtypes import explain_dtype_mismatch
from launcher.train.data import MicroBatchLoader, to_device
from launcher.train.seeding import derive_seed, seed_host_generators

__all__ = [
    "DeviceMicroBatch",
    "LossSums",
    "StepContext",
    "backward",
    "compute_loss_normalizer",
    "forward",
    "get_loss_count",
    "iter_micro_batches",
    "seed_generators",
]


class StepContext(Protocol):
    """What the forward and backward passes of one update need; shared by training and by `tune` probes."""

    @property
    def training_plan(self) -> TrainingPlan: ...
    @property
    def topology(self) -> Topology: ...
    @property
    def recipe(self) -> Any: ...
    @property
    def replica(self) -> Replica: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def loader(self) -> MicroBatchLoader: ...
    @property
    def clock(self) -> StageClock: ...
    @property
    def faults(self) -> FaultInjector: ...

    def enter_phase(self, phase: str, update: Update) -> None: ...


@dataclass(frozen=True)
class DeviceMicroBatch:
    """A micro-batch on the device. `last`: the last one of this rank in its update."""

    batch: Any
    last: bool
    is_padding: bool
    shard: int


def iter_micro_batches(context: StepContext, update: Update) -> Iterator[DeviceMicroBatch]:
    """Yield this rank's micro-batches on the device, seeding the generators for each from its position."""
    micro_batches = update.micro_batches(context.topology.rank)
    device, seed = context.precision.device, context.training_plan.config.seed
    for index, micro in enumerate(micro_batches):
        context.enter_phase("data", update)
        batch = context.loader.next_batch()
        context.clock.lap("data")
        batch = to_device(batch, device, context.precision.dtype)
        seed_generators(derive_seed(seed, update.index, micro.shard, micro.index), device)
        context.clock.lap("transfer")
        last = index == len(micro_batches) - 1
        yield DeviceMicroBatch(batch, last=last, is_padding=micro.is_padding, shard=micro.shard)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators a forward pass uses; torch.manual_seed is slower, as it seeds every kind of device."""
    seed_host_generators(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def forward(context: StepContext, micro: DeviceMicroBatch, update: Update) -> Loss:
    """Compute the loss of one micro-batch."""
    context.enter_phase("forward", update)
    try:
        with context.precision.autocast():
            loss = context.replica.compute_loss(context.recipe.loss, micro.batch)
    except (RuntimeError, ValueError) as error:
        explain_dtype_mismatch(error, context.replica.module, micro.batch)
        raise
    if context.faults.injects_nan("forward", update.index + 1):
        loss = replace(loss, total=loss.total * math.nan)
    context.clock.lap("forward")
    return loss


def backward(context: StepContext, loss: Loss, update: Update) -> None:
    """Run the backward pass of one micro-batch; its loss count is passed on if this update measures the noise scale."""
    context.enter_phase("backward", update)
    count = float(loss.count) if context.replica.measures_noise_at(update.index) else 0.0
    context.replica.backward(loss.total, update.samples, count)
    context.clock.lap_backward()


@dataclass(frozen=True)
class LossSums:
    """Loss sums of this rank's micro-batches without padding: first per shard, then as a tree sum over shards."""

    sums_by_shard: Mapping[int, tuple[Any, float]] = field(default_factory=dict)

    def with_micro_batch(self, loss: Loss, micro: DeviceMicroBatch) -> LossSums:
        """Add the loss of one micro-batch."""
        if micro.is_padding:
            return self
        own = (as_addend(loss.total), float(loss.count))
        earlier = self.sums_by_shard.get(micro.shard)
        sums = own if earlier is None else (earlier[0] + own[0], earlier[1] + own[1])
        return LossSums({**self.sums_by_shard, micro.shard: sums})

    @property
    def total(self) -> Any:
        return compute_tree_sum(total for total, _ in self.sums_by_shard.values())

    @property
    def count(self) -> float:
        return float(compute_tree_sum(count for _, count in self.sums_by_shard.values()))


def as_addend(total: torch.Tensor) -> Any:
    """A loss without its graph, in float64: as a number on a CPU, else a tensor, which the host need not wait for."""
    return total.item() if total.device.type == "cpu" else total.detach().double()


def get_loss_count(table: torch.Tensor, replica: Replica, *, late: bool) -> float | torch.Tensor:
    """The loss count of an update over all ranks: `late`, a scalar on the device unless the replica needs a number."""
    count = sum_loss_counts(table)
    return count if late and not replica.decides_on_host else float(count)


def compute_loss_normalizer(update: Update, count: float | torch.Tensor) -> float | torch.Tensor:
    """Factor from a mean over samples to a mean over the loss count; infinite for a count of 0, which has no mean.

    For a count on the device, the factor is a scalar on the device too.
    """
    if isinstance(count, torch.Tensor):
        return torch.full_like(count, update.samples) / count
    return update.samples / count if count else math.inf
