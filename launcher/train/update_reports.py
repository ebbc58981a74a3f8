"""Tells of updates that took no step, or whose loss is not a number: now and then, not once per update."""

from __future__ import annotations

import math

from launcher.distributed.rank_stats import GatheredStats
from launcher.errors import TrainingFailed
from launcher.strategies.missing_gradients import describe_parameters
from launcher.train.context import TrainContext
from launcher.train.state import TrainState

__all__ = ["count_unapplied_updates", "report_empty_validation", "report_later_parameters", "report_update"]

MAX_SKIPS = 3  # consecutive non-finite updates before training fails
FP16_SKIPS_BEFORE_ALARM = 20  # fp16 skips updates while its loss scale adapts


def report_update(context: TrainContext, before: TrainState, after: TrainState, gathered: GatheredStats) -> None:
    """Report the update whose statistics led from `before` to `after`, unless all is well.

    Raises:
        TrainingFailed: three updates in a row were not finite, except under fp16.
    """
    if gathered.previous_update is None:
        return
    number = gathered.previous_update.index + 1
    if after.counts.skipped > before.counts.skipped:
        report_skipped(context, after, number, gathered.not_finite)
    elif after.counts.empty > before.counts.empty:
        report_empty(context, after, number)
    elif after.counts.loss_not_finite > before.counts.loss_not_finite:
        report_loss_not_finite(context, after, number, gathered.not_finite)


def report_skipped(context: TrainContext, state: TrainState, number: int, not_finite: tuple[int, ...]) -> None:
    """Log an alarm that update `number` was skipped; `not_finite` are the ranks whose loss was not finite.

    Raises:
        TrainingFailed: three updates in a row were not finite, except under fp16.
    """
    is_fp16, count = context.precision.name == "fp16", state.counts.skipped
    if is_fp16 and state.skips != FP16_SKIPS_BEFORE_ALARM:  # `!=`: one alarm per series of skipped updates
        if is_power_of_two(count):
            detail = (
                f"update {number} was skipped: its gradient overflowed in fp16, and the loss scale is "
                f"{context.precision.scale():g} now; {count} skipped so far"
            )
            context.log_event("alarm", kind="fp16_overflow", detail=detail, skipped=count)
        return
    ranks = ", ".join(map(str, not_finite))
    source = f"the loss of rank {ranks}" if ranks else "the gradient, though every loss was finite"
    detail = f"update {number} was skipped: NaN or infinity in {source}"
    context.log_event("alarm", kind="not_finite", detail=detail, ranks=list(not_finite))
    if state.skips >= MAX_SKIPS and not is_fp16:
        raise TrainingFailed(f"{MAX_SKIPS} updates in a row were not finite; the last: {detail}")


def report_empty(context: TrainContext, state: TrainState, number: int) -> None:
    """Log that update `number` had no target; it took no step, and nothing failed."""
    count = state.counts.empty
    if is_power_of_two(count):
        detail = (
            f"update {number} took no step, since its loss counted 0 on all workers: its samples have "
            f"no target; {count} such so far"
        )
        context.log_event("alarm", kind="empty_update", detail=detail, empty=count)


def report_loss_not_finite(context: TrainContext, state: TrainState, number: int, not_finite: tuple[int, ...]) -> None:
    """Log that update `number` took its step on a finite gradient, though the loss was NaN or infinite."""
    count = state.counts.loss_not_finite
    if is_power_of_two(count):
        fp16 = "; in fp16 a sum above 65,504 is infinite: sum in fp32, e.g. of out.float()"
        detail = (
            f"the loss of update {number} is NaN or infinite on rank {', '.join(map(str, not_finite))}, "
            f"though its gradient is finite and the step was taken; {count} such so far"
            f"{fp16 if context.precision.name == 'fp16' else ''}"
        )
        context.log_event("alarm", kind="loss_not_finite", detail=detail, ranks=list(not_finite), updates=count)


def report_empty_validation(context: TrainContext, state: TrainState) -> None:
    """Warn, the first time, that a validation counted nothing."""
    if state.counts.empty_validations == 1:
        detail = "the loss counted 0 over the whole validation set: it has no target, and its metrics are NaN"
        context.log_event("alarm", kind="empty_validation", detail=detail)


def report_later_parameters(context: TrainContext) -> None:
    """Warn of parameters that need a gradient from now on but are not in the optimizer, nor summed over the ranks."""
    if names := context.replica.pop_later_parameters():
        detail = (
            f"{describe_parameters(names)} should be trained from now on, but was frozen or absent at the start: the "
            "optimizer does not have it, and it does not move. Leave it trainable in model(); to start it later, stop "
            "here and begin a run whose model() leaves it trainable with model.init=<this run>/model.safetensors"
        )
        context.log_event("alarm", kind="later_parameters", detail=detail, parameters=names)


def count_unapplied_updates(context: TrainContext, state: TrainState) -> dict[str, float]:
    """For the final event: the numbers of skipped and empty updates that are above 0, and fp16's loss scale."""
    counts = {"skipped_updates": state.counts.skipped, "empty_updates": state.counts.empty}
    facts: dict[str, float] = {name: count for name, count in counts.items() if count}
    if state.counts.skipped and context.precision.name == "fp16":
        facts["loss_scale"] = context.precision.scale()
    return facts


def is_power_of_two(count: int) -> bool:
    return count > 0 and math.log2(count).is_integer()
