"""The training loop: `train` runs the updates, the functions below are its steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from launcher.distributed.rank_stats import GatheredStats, PendingStats
from launcher.distributed.stop_requests import StopLevel
from launcher.plan.batch import BatchPlan
from launcher.plan.lr_schedule import LrSchedule
from launcher.plan.timeline import Update
from launcher.telemetry.update_scalars import UpdateScalars
from launcher.train.checkpoint_manager import format_checkpoint_name
from launcher.train.context import TrainContext
from launcher.train.metrics_recorder import UpdateResult, plan_to_dict
from launcher.train.micro_batches import (
    LossSums,
    backward,
    compute_loss_normalizer,
    forward,
    get_loss_count,
    iter_micro_batches,
)
from launcher.train.outcome import TrainOutcome
from launcher.train.profiler import profile_updates
from launcher.train.state import MetricTarget, TrainState
from launcher.train.update_reports import report_empty_validation, report_later_parameters, report_update
from launcher.train.update_stats import UpdateResults, exchange_results, read_stats, receive_stats, send_stats
from launcher.train.watched_metrics import report_missing_metrics

__all__ = ["train"]

FIRST_UPDATES = 5  # in which an earlier update's overflow may be due to a loss that counts more than samples


def train(context: TrainContext, state: TrainState) -> tuple[TrainState, TrainOutcome]:
    """Train to the end of the timeline, or until the ranks agree to stop.

    Returns the training state and how training ended:
    - `COMPLETE`: the end or the target is reached;
    - `STOP`: a stop was requested;
    - `RESTART`: the workers should exit and be started again;
    - `ADMIT_NODES`: nodes wait to join;
    - `REPLAN`: other shares are faster, or another batch has a higher goodput.

    Raises:
        TrainingFailed: three updates in a row were not finite, except under fp16.
    """
    previous = UpdateResults()
    pending: PendingStats | None = None
    gathered: GatheredStats | None = None
    context.clock.start()
    context.meter.start()
    for update in iter_updates(context, state):
        losses = LossSums()
        for micro in iter_micro_batches(context, update):
            with context.replica.micro_batch(last=micro.last, is_padding=micro.is_padding, shard=micro.shard):
                loss = forward(context, micro, update)
                losses = losses.with_micro_batch(loss, micro)
                if micro.last:
                    send_stats(context, losses, previous)
                backward(context, loss, update)
        table, unread = receive_stats(context, update), pending
        pending = PendingStats(table, update, previous.update)
        gathered = read_stats(context, unread if context.reads_late else pending)
        state = apply_gathered_stats(context, state, gathered, update)
        state = apply_batch_change(context, state, previous.update, update)

        lr = compute_lr(state.schedule, update)
        previous = step_optimizer(context, update, lr, losses, table, gathered)
        state, metrics = validate_if_due(context, state.advance(update), update)
        should_leave_loop = gathered.stop != StopLevel.CONTINUE or state.should_stop_at_target(context.training_plan)
        # the last save of the run is always due; a stop before it asks for one
        save_requested = gathered.save or (should_leave_loop and update.end < context.training_plan.duration)
        saved = save_if_due(context, state, previous, pending, requested=save_requested)
        if saved is not None:
            state, gathered, pending = saved.state, saved.gathered or gathered, None
            should_leave_loop |= gathered.stop != StopLevel.CONTINUE
        context.clock.end_update()
        record_update(context, state, lr, previous, metrics, saved=saved is not None)
        if needs_replan(context, state) or should_leave_loop:
            break
    if gathered is None:
        return state, TrainOutcome.COMPLETE
    return gather_last_update(context, state, previous, pending, gathered.stop)


def iter_updates(context: TrainContext, state: TrainState) -> Iterator[Update]:
    """Yield the updates from the current position to the end of the timeline, profiled if train.profile is set."""
    updates = context.training_plan.timeline.iter_updates(state.position)
    return profile_updates(updates, context.config.train.profile, context.run_dir.path, context.topology.rank)


def apply_gathered_stats(
    context: TrainContext, state: TrainState, gathered: GatheredStats, update: Update
) -> TrainState:
    """Count the updates that took no step; at `update`, apply what earlier ones observed of the gradient's noise.

    Raises:
        TrainingFailed: three updates in a row were not finite, except under fp16.
    """
    counted = count_update(context, state, gathered)
    updated = counted.apply_observations(update, context.training_plan)
    log_lr_change_from_noise(context, counted, updated)
    return updated


def count_update(context: TrainContext, state: TrainState, gathered: GatheredStats) -> TrainState:
    """Take the gathered statistics of an update, and report it unless all is well.

    Raises:
        TrainingFailed: three updates in a row were not finite, except under fp16.
    """
    if gathered.stop != StopLevel.CONTINUE:
        context.stop_requests.acknowledge()
    counted = state.with_gathered_stats(gathered)
    report_update(context, state, counted, gathered)
    return counted


def log_lr_change_from_noise(context: TrainContext, before: TrainState, after: TrainState) -> None:
    """Log a plan event if the learning rate follows a noise scale that is newly known or has changed."""
    noise, previous_noise = after.schedule.noise, before.schedule.noise
    if noise == previous_noise or noise is None:
        return
    plan = context.training_plan.batch_plan_at(after.position.samples)
    old, new = (plan_to_dict(context.training_plan, state.schedule, plan) for state in (before, after))
    earlier = "unknown" if previous_noise is None else f"{previous_noise:.3g}"
    why = f"the gradient's noise scale is {noise:.3g} samples, {earlier} before"
    context.log_event("plan", why=why, **new, **{"from": old})


def apply_batch_change(
    context: TrainContext, state: TrainState, previous_update: Update | None, update: Update
) -> TrainState:
    """Log the start of a batch.ramp stage, and rescale Adam's second moment after any change of batch."""
    if previous_update is not None and previous_update.full_plan != update.full_plan:
        log_ramp_stage(context, state, previous_update.full_plan, update)
    state, factor = state.advance_second_moment(update)
    if factor != 1.0:
        context.replica.rescale_moments(factor)
    return state


def log_ramp_stage(context: TrainContext, state: TrainState, previous_plan: BatchPlan, update: Update) -> None:
    """Log a plan event for a new stage of batch.ramp."""
    plan = update.full_plan
    old, new = (plan_to_dict(context.training_plan, state.schedule, batch) for batch in (previous_plan, plan))
    moments = state.second_moment_factor(plan.global_batch)
    why = f"batch.ramp: new stage at sample {update.start}"
    context.log_event("plan", why=why, **new, **{"from": old}, moments=moments)


@dataclass(frozen=True)
class LrAndMomentum:
    """The learning rate of an update, its `scale` relative to lr.base, and the momentum if the schedule sets it."""

    lr: float
    scale: float
    momentum: float | None


def compute_lr(schedule: LrSchedule, update: Update) -> LrAndMomentum:
    """Learning rate and momentum at `update`; a partial update keeps the learning rate of the full plan."""
    batch = update.full_plan.global_batch
    lr = schedule.lr(update.start, batch)
    return LrAndMomentum(lr, lr / schedule.base, schedule.momentum(update.start))


def step_optimizer(
    context: TrainContext,
    update: Update,
    lr: LrAndMomentum,
    losses: LossSums,
    table: torch.Tensor,
    gathered: GatheredStats,
) -> UpdateResults:
    """Take the optimizer step, if the loss counts anything on any rank."""
    context.enter_phase("optimizer", update)
    count = get_loss_count(table, context.replica, late=True) if context.reads_late else gathered.count
    if not isinstance(count, torch.Tensor) and count == 0:
        step = context.replica.discard_update()
    else:
        normalizer = compute_loss_normalizer(update, count)
        step = context.replica.step(lr.lr, lr.momentum, normalizer, context.config.train.clip_norm)
    lower_loss_scale(context, gathered)
    scalars = UpdateScalars(
        loss=losses.total,
        loss_count=losses.count,
        finite=step.finite,
        grad_norm=step.norm,
        group_sq_norm_sum=step.group_sq_norm_sum,
        groups=step.groups,
    )
    report_later_parameters(context)
    context.clock.lap("optimizer")
    return UpdateResults(update, scalars)


def lower_loss_scale(context: TrainContext, gathered: GatheredStats) -> None:
    """Lower fp16's loss scale if one of the first updates overflowed because the loss counts more than samples."""
    update = gathered.update
    if not gathered.finite and update is not None and update.index < FIRST_UPDATES:
        context.precision.lower_scale(gathered.count / update.samples)


def validate_if_due(context: TrainContext, state: TrainState, update: Update) -> tuple[TrainState, Mapping[str, float]]:
    """Validate if due, and pass the metrics to the schedule, the best checkpoint and the target."""
    plan = context.training_plan
    if context.validator is None or not is_interval_due(update, plan.validate_every, plan.duration):
        return state, {}
    context.enter_phase("validate", update)
    result = context.validator.run(context.replica)
    metrics = result.metrics
    if not result.count:
        state = state.with_empty_validation(metrics)
        report_empty_validation(context, state)
        return state, metrics
    report_missing_metrics(context, state, metrics)
    state = state.with_validation(metrics, update.end, context.config.schedule.metric)
    settings = context.config.checkpoint
    state = state.with_best_checkpoint(metrics, settings.best, settings.best_mode, format_checkpoint_name(state))
    return check_target(context, state, metrics), metrics


def check_target(context: TrainContext, state: TrainState, metrics: Mapping[str, float]) -> TrainState:
    """Record in the state, and as an event, the first time that the target metric is reached."""
    target = MetricTarget.from_settings(context.config.train.target)
    if target is None or state.target_reached is not None or not target.is_met(metrics):
        return state
    facts = {
        "metric": target.metric,
        "value": metrics[target.metric],
        "samples": state.position.samples,
        "update": state.position.update,
        "seconds": context.meter.seconds(),
    }
    context.log_event("target", **facts)
    return replace(state, target_reached=facts)


@dataclass(frozen=True)
class Saved:
    """What a save leaves to the loop: its state, and the statistics that were read for the checkpoint, if any were."""

    state: TrainState
    gathered: GatheredStats | None


def save_if_due(
    context: TrainContext, state: TrainState, results: UpdateResults, pending: PendingStats, *, requested: bool
) -> Saved | None:
    """Save a checkpoint if one is due or requested. Statistics that are read late, and still pending, are read for it.

    The checkpoint must include the statistics of this update, which are normally exchanged with the next one and would
    be missing after a restart. They are therefore exchanged once more, for the checkpoint only: the loop's state gets
    them with the next update.
    """
    plan, update = context.training_plan, results.update
    is_best = state.best_checkpoint is not None and state.best_checkpoint == format_checkpoint_name(state)
    if update is None or not (requested or is_best or is_interval_due(update, plan.checkpoint_every, plan.duration)):
        return None
    context.clock.lap("other")
    context.enter_phase("checkpoint", update)
    gathered = None
    if context.reads_late:
        gathered = read_stats(context, pending)
        state = count_update(context, state, gathered)
    complete = state.with_gathered_stats(exchange_results(context, results))
    complete = replace(complete, seconds=context.meter.seconds())
    context.checkpoint_manager.save(context.replica, plan, complete, update.full_plan)
    context.clock.lap("checkpoint")
    return Saved(state, gathered)


def is_interval_due(update: Update, every: int | None, duration: int) -> bool:
    """Return whether this update passes a multiple of `every` samples, or ends the run."""
    return update.end >= duration or (every is not None and update.start // every < update.end // every)


def record_update(
    context: TrainContext,
    state: TrainState,
    lr: LrAndMomentum,
    results: UpdateResults,
    metrics: Mapping[str, float],
    *,
    saved: bool,
) -> None:
    """On rank 0, hand the update to the recorder, which writes its row once it has the statistics of all ranks."""
    if context.recorder is None or results.update is None:
        return
    result = UpdateResult(
        update=results.update,
        lr=lr.lr,
        lr_scale=lr.scale,
        time=time.time(),
        wall_s=context.meter.measure_wall_s(),
        grad_norm=results.scalars.grad_norm,
        noise=state.noise,
        base_batch=state.schedule.base_batch,
        saved=saved,
        resource_metrics=context.meter.values(),
        validation=metrics,
    )
    context.recorder.on_update_end(result)


def needs_replan(context: TrainContext, state: TrainState) -> bool:
    """Return whether other shares are now faster, or another batch has a higher goodput at the current noise scale.

    It is called after every update, since the goodput policy follows the noise scale.
    """
    if context.goodput is not None:
        context.goodput.on_noise(state.noise)
    shares_change = context.load_balancer is not None and context.load_balancer.new_speeds is not None
    return shares_change or (context.goodput is not None and context.goodput.has_change)


def gather_last_update(
    context: TrainContext, state: TrainState, results: UpdateResults, pending: PendingStats | None, stop: StopLevel
) -> tuple[TrainState, TrainOutcome]:
    """Exchange and record the results of the last update, which no later update does; return what `train` returns."""
    if context.watchdog is not None:
        context.watchdog.enter_wait()
    if context.reads_late and pending is not None:
        state = count_update(context, state, read_stats(context, pending))
    gathered = exchange_results(context, results)
    if context.recorder is not None:
        context.recorder.on_gathered(gathered)
        context.recorder.flush()
    plan = context.training_plan
    is_complete = state.position.samples >= plan.duration or state.should_stop_at_target(plan)
    outcome = TrainOutcome.COMPLETE if is_complete else TrainOutcome.from_stop_level(stop)
    return count_update(context, state, gathered), outcome
