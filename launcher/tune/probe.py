"""Measure one size with the real training step, on a replica that is discarded afterwards.

The first update of a size is a dry run without collectives, and the ranks exchange their status after each phase: if
one runs out of memory, all know before any of them waits for it in a collective.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from launcher.config import strategy_checks
from launcher.distributed.rank_stats import PendingStats, RankStats
from launcher.distributed.store_gather import StoreGather
from launcher.plan.batch import BatchPolicy, plan_batch
from launcher.plan.timeline import Position, Timeline, Update
from launcher.plan.training_plan import TrainingPlan
from launcher.strategies.interface import Replica
from launcher.strategies.precision import Precision
from launcher.system.fault_injection import FaultInjector
from launcher.telemetry.stage_clock import STAGES, StageClock, find_critical_rank
from launcher.topology import Topology
from launcher.train.build import Datasets, TrainComponents, build_components
from launcher.train.data import MicroBatchLoader
from launcher.train.micro_batches import compute_loss_normalizer, forward, get_loss_count, iter_micro_batches
from launcher.tune.measurements import Measurement
from launcher.tune.memory_meter import make_memory_meter
from launcher.tune.oom import is_out_of_memory

__all__ = [
    "AgreedOom",
    "OomInCollective",
    "ProbeContext",
    "SizeTrial",
    "TimingSpec",
    "dry_run_update",
    "guard_oom",
    "measure_size",
    "run_updates",
]

UNLIMITED_SAMPLES = 1 << 60
MIN_WARMUP_UPDATES = 2
MAX_WARMUP_UPDATES = 40
MEMORY_PROBE_UPDATES = 4  # five updates with the dry run: every buffer has been allocated by then
PROBE_LR_SCALE = 1e-3  # of the configured learning rate: the step costs the same, and training does not diverge to NaN

Result = TypeVar("Result")


class AgreedOom(Exception):
    """Memory ran out on at least one rank, and all ranks know."""

    def __init__(self, where: str) -> None:
        super().__init__(f"out of memory in {where}")
        self.where = where


class OomInCollective(RuntimeError):
    """Memory ran out on this rank while the others already wait for it in a collective."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__(
            f"rank {rank} ran out of memory at per_device={size} while other ranks waited for it in a collective: "
            f"type tune.max={size - 1} or less"
        )


@dataclass(frozen=True)
class TimingSpec:
    """How long to time a size: the number of blocks and the seconds per block."""

    blocks: int = 4
    block_s: float = 0.15


@dataclass(frozen=True)
class ProbeContext:
    """One rank's replica and everything a measurement needs around it, for any size."""

    training_plan: TrainingPlan
    topology: Topology
    components: TrainComponents
    store_gather: StoreGather
    faults: FaultInjector

    @classmethod
    def from_plan(
        cls,
        training_plan: TrainingPlan,
        topology: Topology,
        recipe: Any,
        device: torch.device,
        data: Datasets,
        store_gather: StoreGather,
    ) -> ProbeContext:
        components = build_components(recipe, training_plan.config, topology, device, data)
        return cls(
            training_plan,
            topology,
            components,
            store_gather,
            FaultInjector.from_env(topology.rank, topology.generation),
        )

    def make_trial(self, size: int, items: Any, accumulation: int | None = None) -> SizeTrial:
        """Set up the measurement of one size. `accumulation`: micro-batches per update, if not as configured."""
        config = self.training_plan.config
        steps = accumulation or (None if config.batch.accumulation == "auto" else config.batch.accumulation)
        plan = plan_batch(BatchPolicy("scale", per_device=size, accumulation=steps), self.topology.world)
        stages = ((0, plan),)
        timeline = Timeline(
            self.training_plan.sizes.train,
            UNLIMITED_SAMPLES,
            stages,
            "carry",
            strategy_checks.needs_equal_micro_batches(config),
        )
        trial_plan = replace(self.training_plan, batch_plan=plan, stages=stages, timeline=timeline)
        pin = self.components.device.type == "cuda"
        loader = MicroBatchLoader.from_dataset(
            items,
            self.components.recipe,
            timeline,
            Position(),
            config,
            rank=self.topology.rank,
            pin=pin,
        )
        return SizeTrial(trial_plan, self.topology, self.components, loader, self.faults)


@dataclass(frozen=True)
class SizeTrial:
    """The context that the training loop's functions need, for one size."""

    training_plan: TrainingPlan
    topology: Topology
    components: TrainComponents
    loader: MicroBatchLoader
    faults: FaultInjector

    @property
    def recipe(self) -> Any:
        return self.components.recipe

    @property
    def replica(self) -> Replica:
        return self.components.replica

    @property
    def precision(self) -> Precision:
        return self.components.precision

    @property
    def clock(self) -> StageClock:
        return self.components.clock

    @property
    def probe_lr(self) -> float:
        return PROBE_LR_SCALE * float(self.training_plan.config.lr.base or 1.0)

    def enter_phase(self, phase: str, update: Update) -> None:
        self.faults.inject_at(phase, update.index + 1)

    def synchronize_device(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.components.device.type == "cuda":
            torch.cuda.synchronize(self.components.device)

    @property
    def warmup_updates(self) -> int:
        """Number of updates until caches are warm and the batches prefetched by loader processes are used up."""
        data = self.training_plan.config.data
        ahead = math.ceil(data.num_workers * data.prefetch_factor / max(1, self.training_plan.batch_plan.accumulation))
        return min(MAX_WARMUP_UPDATES, MIN_WARMUP_UPDATES + ahead)


def measure_size(
    context: ProbeContext,
    size: int,
    items: Any,
    timing: TimingSpec | None,
    allowed_bytes: float | None,
    accumulation: int | None = None,
) -> Measurement:
    """Measure one size: timed as `timing` says, or only its memory if `timing` is None. Every rank calls it.

    Raises:
        OomInCollective: memory ran out on this rank while others wait for it.
    """
    memory_meter = make_memory_meter(context.components.device, allowed_bytes)
    memory_meter.clear()
    try:
        trial = guard_oom(context, size, partial(context.make_trial, size, items, accumulation))
        speeds, stages_ms = guard_oom(context, size, partial(dry_run_then_time, trial, context, timing))
    except AgreedOom as error:
        return Measurement(size, where=error.where, accumulation=accumulation)
    peaks = context.store_gather.gather(memory_meter.read())
    return Measurement(
        size,
        speeds,
        stages_ms,
        memory_bytes=max(peak for peak, _, _ in peaks),
        retries=sum(retries for _, retries, _ in peaks),
        over_limit=any(over_limit for _, _, over_limit in peaks),
        accumulation=accumulation,
    )


def guard_oom(context: ProbeContext, size: int, function: Callable[[], Result]) -> Result:
    """Return the result of `function` if memory sufficed. No traceback keeps the allocated tensors alive.

    Raises:
        AgreedOom: memory ran out, and all ranks know.
        OomInCollective: memory ran out on this rank while others wait for it.
    """
    results: list[Result] = []
    try:
        results.append(function())
    except AgreedOom:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if context.topology.world > 1:
            raise OomInCollective(size, context.topology.rank) from error
    if not results:
        raise AgreedOom("a later update")
    return results[0]


def dry_run_then_time(
    trial: SizeTrial, context: ProbeContext, timing: TimingSpec | None
) -> tuple[tuple[float, ...], dict[str, float] | None]:
    """Samples/s of each block and the mean stage times; empty and None if only memory is measured."""
    updates = trial.training_plan.timeline.iter_updates()
    dry_run_update(trial, next(updates), context)
    if timing is None:
        run_updates(trial, updates, MEMORY_PROBE_UPDATES)
        return (), None
    return time_updates(trial, updates, context, timing)


def dry_run_update(trial: SizeTrial, update: Update, context: ProbeContext) -> None:
    """Dry-run the first update without gradient communication; after each phase all ranks check for OOM.

    Strategies that communicate in the forward pass run a normal update instead.

    Raises:
        AgreedOom: on every rank, if any of them ran out of memory.
    """
    if strategy_checks.needs_equal_micro_batches(trial.training_plan.config):
        run_update(trial, update)
        return
    gather = context.store_gather
    micros = run_on_all_ranks(gather, "data", partial(iter_micro_batches, trial, update))
    while (micro := run_on_all_ranks(gather, "data", partial(next, micros, None))) is not None:
        with trial.replica.micro_batch(last=False, is_padding=micro.is_padding, shard=micro.shard):
            loss = run_on_all_ranks(gather, "forward", partial(forward, trial, micro, update))
            trial.clock.lap("forward")
            run_on_all_ranks(gather, "backward", partial(run_backward, trial, loss.total, update))
    clip = trial.training_plan.config.train.clip_norm
    run_on_all_ranks(gather, "optimizer", lambda: trial.replica.step(trial.probe_lr, None, 1.0, clip))
    trial.clock.end_update()


def run_backward(trial: SizeTrial, total: torch.Tensor, update: Update) -> None:
    trial.enter_phase("backward", update)
    trial.replica.backward(total, update.samples)


def run_on_all_ranks(store_gather: StoreGather, where: str, function: Callable[[], Result]) -> Result:
    """Return the result of `function` if memory sufficed on every rank. No traceback keeps the tensors alive.

    Raises:
        AgreedOom: memory ran out on at least one rank.
    """
    results: list[Result] = []
    try:
        results.append(function())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    if not all(store_gather.gather(bool(results))):
        raise AgreedOom(where)
    return results[0]


def run_update(trial: SizeTrial, update: Update) -> tuple[float, ...]:
    """Run one update as in training; return the critical rank's stage times of the previous update."""
    count = 0.0
    for micro in iter_micro_batches(trial, update):
        with trial.replica.micro_batch(last=micro.last, is_padding=micro.is_padding, shard=micro.shard):
            loss = forward(trial, micro, update)
            count += 0.0 if micro.is_padding else float(loss.count)
            if micro.last:
                stats = RankStats(count=count, stages_ms=trial.clock.times_ms())
                trial.replica.send_stats(stats.to_row(trial.precision.device))
            run_backward(trial, loss.total, update)
            trial.clock.lap_backward()
    trial.enter_phase("sync", update)
    table = trial.replica.receive_stats()
    pending, late = PendingStats(table), trial.precision.device.type != "cpu"
    trial.clock.lap("sync")
    trial.enter_phase("optimizer", update)
    normalizer = compute_loss_normalizer(update, get_loss_count(table, trial.replica, late=late))
    trial.replica.step(trial.probe_lr, None, normalizer, trial.training_plan.config.train.clip_norm)
    trial.clock.lap("optimizer")
    trial.clock.end_update()
    times = pending.read().stages_ms
    return tuple(map(float, times[find_critical_rank(times)]))


def run_updates(trial: SizeTrial, updates: Iterator[Update], count: int) -> tuple[float, list[tuple[float, ...]]]:
    """Run `count` updates; return their seconds and the stage times gathered during them."""
    trial.synchronize_device()
    trial.clock.start()
    start = time.perf_counter()
    stages = [run_update(trial, next(updates)) for _ in range(count)]
    trial.synchronize_device()
    return time.perf_counter() - start, stages


def time_updates(
    trial: SizeTrial, updates: Iterator[Update], context: ProbeContext, timing: TimingSpec
) -> tuple[tuple[float, ...], dict[str, float]]:
    """Warm up and time; return samples/s of each block, over all workers, and the mean stage times."""
    run_updates(trial, updates, trial.warmup_updates - 1)
    spent_s, _ = run_updates(trial, updates, 1)
    slowest_s = max(context.store_gather.gather(spent_s))
    updates_per_block = max(1, math.ceil(timing.block_s / slowest_s))
    speeds, stages = [], []
    for _ in range(timing.blocks):
        spent_s, block_stages = run_updates(trial, updates, updates_per_block)
        slowest_s = max(context.store_gather.gather(spent_s))
        speeds.append(updates_per_block * trial.training_plan.batch_plan.global_batch / slowest_s)
        stages += block_stages
    means = (sum(column) / len(stages) for column in zip(*stages, strict=True))
    return tuple(speeds), dict(zip(STAGES, means, strict=True))
