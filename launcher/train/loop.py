"""The training loop: `train` runs the updates, the functions below are its steps."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from launcher.distributed.load_balancing import LoadBalancer, NullBalancer
from launcher.distributed.rank_stats import GatheredStats, RankStats, StatsAllGather
from launcher.distributed.stop_requests import GO_ON, StopRequests
from launcher.distributed.watchdog import NullWatchdog, Watchdog
from launcher.goodput.policy import GoodputPolicy, NullGoodputPolicy
from launcher.plan.lr_schedule import LrSchedule
from launcher.plan.timeline import Update
from launcher.plan.training_plan import TrainingPlan
from launcher.plan.virtual_shards import compute_tree_sum
from launcher.recipe import Loss
from launcher.strategies.interface import ReplicaProtocol
from launcher.strategies.precision import Precision
from launcher.system.fault_injection import FaultInjector
from launcher.telemetry.deferred_scalars import DeferredScalars
from launcher.telemetry.resource_meter import ResourceMeter
from launcher.telemetry.stage_clock import StageClock
from launcher.topology import Topology
from launcher.train.checkpoint_manager import CheckpointManager, checkpoint_name
from launcher.train.data import MicroBatchLoader, derive_seed, to_device
from launcher.train.metrics_recorder import MetricsRecorder, NullRecorder, UpdateResult, plan_to_dict
from launcher.train.profiler import profile_updates
from launcher.train.state import MetricTarget, TrainState
from launcher.train.validation import Validator

__all__ = [
    "REPLAN",
    "StepContext",
    "TrainContext",
    "TrainingFailed",
    "forward",
    "iter_micro_batches",
    "loss_normalizer",
    "train",
]

REPLAN = -1


class TrainingFailed(RuntimeError):
    """Training cannot continue, and a restart would fail again."""


class StepContext(Protocol):
    """What the forward and backward passes of one update need; shared by training and by `tune` probes."""

    @property
    def training_plan(self) -> TrainingPlan: ...
    @property
    def topology(self) -> Topology: ...
    @property
    def recipe(self) -> Any: ...
    @property
    def replica(self) -> ReplicaProtocol: ...
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
class TrainContext:
    """Everything the training loop uses; made by `launcher.train.session`."""

    training_plan: TrainingPlan
    topology: Topology
    recipe: Any
    replica: ReplicaProtocol
    precision: Precision
    loader: MicroBatchLoader
    validator: Validator | None
    stats_gather: StatsAllGather
    clock: StageClock
    recorder: MetricsRecorder | NullRecorder
    meter: ResourceMeter
    checkpoint_manager: CheckpointManager
    stop_requests: StopRequests
    balance: LoadBalancer | NullBalancer = field(default_factory=NullBalancer)
    goodput: GoodputPolicy | NullGoodputPolicy = field(default_factory=NullGoodputPolicy)
    faults: FaultInjector = field(default_factory=FaultInjector)
    watchdog: Watchdog | NullWatchdog = field(default_factory=NullWatchdog)

    def enter_phase(self, phase: str, update: Update) -> None:
        """Enter a phase: publish it to the watchdog, and inject a fault if one is configured."""
        self.watchdog.enter_phase(phase, update.index + 1)
        self.faults(phase, update.index + 1)


def train(context: TrainContext, state: TrainState) -> tuple[TrainState, int]:
    """Train to the end of the timeline, or until the ranks agree to stop.

    Returns the training state and the outcome: finished (`CONTINUE`), stop, restart, admit new nodes, or continue with
    other shares or another batch (`REPLAN`).

    Raises:
        TrainingFailed: three updates in a row were not finite.
    """
    clock, replica, deferred, gathered = context.clock, context.replica, DeferredScalars(), None
    clock.start()
    context.meter.start()
    updates = context.training_plan.timeline.iter_updates(state.position)
    for update in profile_updates(
        updates, context.training_plan.config.train.profile, context.checkpoint_manager.folder, context.topology.rank
    ):
        sums = LossSums()
        for micro in iter_micro_batches(context, update):
            with replica.micro_batch(last=micro.last, is_padding=micro.is_padding, shard=micro.shard):
                loss = forward(context, micro, update)
                sums = sums.with_micro_batch(loss, micro)
                if micro.last:
                    pending = context.stats_gather.all_gather_async(
                        make_rank_stats(context, sums, deferred), clock.times_ms()
                    )
                context.enter_phase("backward", update)
                replica.backward(loss.total, update.samples, noise_loss_count(context, loss, update))
                clock.lap_backward()
        context.enter_phase("sync", update)
        gathered = pending.wait()
        clock.lap("sync")
        context.recorder.on_gathered(gathered)
        context.balance.on_gathered(gathered.stages_ms, update)
        state = apply_batch_change(
            context, apply_gathered_stats(context, state, gathered, deferred.update), deferred.update, update
        )

        context.enter_phase("optimizer", update)
        rate = lr_at(state.schedule, update)
        step = replica.step(
            rate.lr, rate.momentum, loss_normalizer(update, gathered), context.training_plan.config.train.clip_norm
        )
        deferred = DeferredScalars(
            (sums.total, step.norm, step.group_grad_norm_sum, step.finite), sums.count, step.groups, update
        )
        clock.lap("optimizer")

        state, measured = validate_if_due(context, state.advance(update), update)
        stop = gathered.stop != GO_ON or state.should_stop_at_target(context.training_plan)
        saved = save_if_due(
            context,
            state,
            update,
            deferred,
            asked=gathered.save or (stop and update.end < context.training_plan.duration),
        )
        clock.end_update()
        spent = (time.time(), context.meter.measure_wall_s())
        known = (state.noise, state.schedule.base_batch)
        done = UpdateResult(
            update, rate.lr, rate.scale, *spent, deferred, *known, saved, context.meter.values(), measured
        )
        context.recorder.on_update_end(done)
        context.goodput.on_noise(state.noise)
        if stop or context.balance.new_speeds or context.goodput.has_change:
            break
    if gathered is None:
        return state, GO_ON
    context.watchdog.enter_wait()
    last = context.stats_gather.all_gather_async(
        make_rank_stats(context, LossSums(), deferred), clock.times_ms()
    ).wait()
    context.recorder.on_gathered(last)
    context.recorder.flush()
    ended = state.position.samples >= context.training_plan.duration or state.should_stop_at_target(
        context.training_plan
    )
    return apply_gathered_stats(context, state, last, deferred.update), GO_ON if ended else gathered.stop or REPLAN


@dataclass(frozen=True)
class DeviceMicroBatch:
    batch: Any
    last: bool
    is_padding: bool
    shard: int


def iter_micro_batches(context: StepContext, update: Update) -> Iterator[DeviceMicroBatch]:
    """Yield this rank's micro-batches on the device, seeding the generators for each from its position."""
    parts = update.micro_batches(context.topology.rank)
    for index, part in enumerate(parts):
        context.enter_phase("data", update)
        batch = context.loader.next_batch()
        context.clock.lap("data")
        batch = to_device(batch, context.precision.device, context.precision.dtype)
        seed_generators(
            derive_seed(context.training_plan.config.seed, update.index, part.shard, part.index),
            context.precision.device,
        )
        context.clock.lap("transfer")
        yield DeviceMicroBatch(batch, last=index == len(parts) - 1, is_padding=part.is_padding, shard=part.shard)


def seed_generators(number: int, device: torch.device) -> None:
    """Seed the generators a forward pass uses; torch.manual_seed is slower, as it seeds every kind of device."""
    random.seed(number)
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def forward(context: StepContext, micro: DeviceMicroBatch, update: Update) -> Loss:
    context.enter_phase("forward", update)
    with context.precision.autocast():
        loss = context.recipe.loss(context.replica.model, micro.batch)
    if context.faults.injects_nan("forward", update.index + 1):
        loss = replace(loss, total=loss.total * math.nan)
    context.clock.lap("forward")
    return loss


def noise_loss_count(context: TrainContext, loss: Loss, update: Update) -> float:
    """The loss count if the gradient noise of this update is measured, else 0."""
    return float(loss.count) if context.replica.measures_noise_at(update.index) else 0.0


@dataclass(frozen=True)
class LossSums:
    """Loss sums of this rank's micro-batches without padding: first per shard, then as a tree sum over shards."""

    sums_by_shard: Mapping[int, tuple[Any, float]] = field(default_factory=dict)

    def with_micro_batch(self, loss: Loss, micro: DeviceMicroBatch) -> LossSums:
        if micro.is_padding:
            return self
        total, count = self.sums_by_shard.get(micro.shard, (0.0, 0.0))
        both = (total + loss.total.detach().double(), count + float(loss.count))
        return LossSums({**self.sums_by_shard, micro.shard: both})

    @property
    def total(self) -> Any:
        return compute_tree_sum(total for total, _ in self.sums_by_shard.values())

    @property
    def count(self) -> float:
        return float(compute_tree_sum(count for _, count in self.sums_by_shard.values()))


def make_rank_stats(context: TrainContext, sums: LossSums, deferred: DeferredScalars) -> RankStats:
    return replace(
        stats_of_previous_update(deferred),
        count=sums.count,
        stop=context.stop_requests.poll(context.checkpoint_manager.stop_source),
        save=float(context.checkpoint_manager.is_due()),
    )


def stats_of_previous_update(deferred: DeferredScalars) -> RankStats:
    """This rank's statistics of the previous update, to be gathered."""
    loss, norm, spread, finite = deferred.read()
    return RankStats(
        loss=loss,
        loss_count=deferred.count,
        finite=finite,
        norm=norm,
        group_grad_norm_sum=spread,
        groups=deferred.groups,
    )


def loss_normalizer(update: Update, gathered: GatheredStats) -> float:
    """Factor from a mean over samples to a mean over the loss count; NaN, and so a skipped update, for a count of 0."""
    if gathered.count == update.samples:
        return 1.0
    return update.samples / gathered.count if gathered.count else math.nan


@dataclass(frozen=True)
class LrAndMomentum:
    lr: float
    scale: float
    momentum: float | None


def lr_at(schedule: LrSchedule, update: Update) -> LrAndMomentum:
    """Learning rate and momentum at `update`; a partial update keeps the learning rate of the full plan."""
    batch = update.full_plan.global_batch
    lr = schedule.lr(update.start, batch)
    return LrAndMomentum(lr, lr / schedule.base, schedule.momentum(update.start))


def apply_gathered_stats(
    context: TrainContext, state: TrainState, gathered: GatheredStats, before: Update | None
) -> TrainState:
    """Apply the gathered statistics of the previous update: count non-finite skips, update the noise scale."""
    if gathered.stop != GO_ON:
        context.stop_requests.acknowledge()
    state = log_lr_change_from_noise(context, state, state.with_gathered_stats(gathered, before, context.training_plan))
    patience = 20 if context.precision.name == "fp16" else 3
    state = state.with_skip_count(0 if gathered.finite else state.skips + 1)
    if state.skips and (context.precision.name != "fp16" or state.skips == patience):
        ranks = ", ".join(map(str, gathered.not_finite))
        where = f"the loss of rank {ranks}" if ranks else "the gradient, though every loss was finite"
        detail = f"update {state.position.update} was skipped: NaN or infinity in {where}"
        context.checkpoint_manager.journal.log_event(
            "alarm", kind="not_finite", detail=detail, ranks=list(gathered.not_finite)
        )
        if state.skips == patience and context.precision.name != "fp16":
            raise TrainingFailed(f"{patience} updates in a row were not finite; the last: {detail}")
    return state


def log_lr_change_from_noise(context: TrainContext, before: TrainState, after: TrainState) -> TrainState:
    """Log a plan event if the learning rate follows a noise scale that is newly known or has changed."""
    known, was = after.schedule.noise, before.schedule.noise
    if known != was and known is not None:
        plan = context.training_plan.plan_at(after.position.samples)
        old, new = (plan_to_dict(context.training_plan, one.schedule, plan) for one in (before, after))
        why = f"the gradient's noise scale is {known:.3g} samples, {'unknown' if was is None else f'{was:.3g}'} before"
        context.checkpoint_manager.journal.log_event("plan", why=why, **new, **{"from": old})
    return after


def apply_batch_change(context: TrainContext, state: TrainState, before: Update | None, update: Update) -> TrainState:
    """Log the start of a batch.ramp stage, and rescale Adam's second moment after any change of batch."""
    plan = update.full_plan
    if before is not None and before.full_plan != plan:
        old, new = (plan_to_dict(context.training_plan, state.schedule, one) for one in (before.full_plan, plan))
        moments = state.second_moment_factor(plan.global_batch)
        why = f"batch.ramp: new stage at sample {update.start}"
        context.checkpoint_manager.journal.log_event("plan", why=why, **new, **{"from": old}, moments=moments)
    state, factor = state.advance_second_moment(update)
    if factor != 1.0:
        context.replica.rescale_moments(factor)
    return state


def validate_if_due(context: TrainContext, state: TrainState, update: Update) -> tuple[TrainState, Mapping[str, float]]:
    """Validate if due, and pass the metrics to the schedule, the best checkpoint and the target."""
    if context.validator is None or not is_interval_due(
        update, context.training_plan.validate_every, context.training_plan.duration
    ):
        return state, {}
    context.enter_phase("validate", update)
    measured = context.validator.run(context.replica)
    state = state.with_validation(measured, update.end, context.training_plan.config.schedule.metric)
    settings = context.training_plan.config.checkpoint
    state = state.with_best_checkpoint(measured, settings.best, settings.best_mode, checkpoint_name(state))
    return check_target(context, state, measured), measured


def check_target(context: TrainContext, state: TrainState, measured: Mapping[str, float]) -> TrainState:
    target = MetricTarget.from_settings(context.training_plan.config.train.target)
    if target is None or state.target_reached is not None or not target.is_met(measured):
        return state
    facts = {
        "metric": target.metric,
        "value": measured[target.metric],
        "samples": state.position.samples,
        "update": state.position.update,
        "seconds": context.meter.seconds(),
    }
    context.checkpoint_manager.journal.log_event("target", **facts)
    return replace(state, target_reached=facts)


def save_if_due(
    context: TrainContext, state: TrainState, update: Update, deferred: DeferredScalars, *, asked: bool
) -> bool:
    """Save a checkpoint if one is due or requested; return whether one was saved.

    The checkpoint's noise scale must include this update, whose gradient statistics are normally gathered with the next
    update and would be missing after a restart. They are therefore gathered an additional time for the checkpoint.
    """
    best = state.best_checkpoint == checkpoint_name(state)
    if not (
        asked or best or is_interval_due(update, context.training_plan.checkpoint_every, context.training_plan.duration)
    ):
        return False
    context.clock.lap("other")
    context.enter_phase("checkpoint", update)
    gathered = context.stats_gather.all_gather_async(
        stats_of_previous_update(deferred), context.clock.times_ms()
    ).wait()
    heard = replace(state.with_gathered_stats(gathered, update, context.training_plan), seconds=context.meter.seconds())
    context.checkpoint_manager.save(context.replica, context.training_plan, heard, update.full_plan)
    context.clock.lap("checkpoint")
    return True


def is_interval_due(update: Update, every: int | None, duration: int) -> bool:
    """Return whether this update passes a multiple of `every` samples, or ends the run."""
    return update.end >= duration or (every is not None and update.start // every < update.end // every)
