"""What a rank tells all others of its updates: sent with the gradients, and read once the host need not wait."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from launcher.distributed.rank_stats import GatheredStats, PendingStats, RankStats
from launcher.plan.timeline import Update
from launcher.telemetry.update_scalars import UpdateScalars
from launcher.train.context import TrainContext
from launcher.train.micro_batches import LossSums

__all__ = ["UpdateResults", "exchange_results", "read_stats", "receive_stats", "send_stats"]


@dataclass(frozen=True)
class UpdateResults:
    """What this rank has computed in an update; None before the first one."""

    update: Update | None = None
    scalars: UpdateScalars = UpdateScalars()


def send_stats(context: TrainContext, losses: LossSums, previous: UpdateResults) -> None:
    """Send this rank's loss count and requests, and its results of the previous update, to all ranks."""
    stats = RankStats(
        count=losses.count,
        stop=context.stop_requests.poll(context.stop_source),
        save=float(context.checkpoint_manager.is_due()),
        call_order=context.replica.pop_call_order(),
        previous=previous.scalars,
        stages_ms=context.clock.times_ms(),
    )
    context.replica.send_stats(stats.to_row(context.precision.device))


def receive_stats(context: TrainContext, update: Update) -> torch.Tensor:
    """The statistics of all ranks, on the device."""
    context.enter_phase("sync", update)
    table = context.replica.receive_stats()
    context.clock.lap("sync")
    return table


def read_stats(context: TrainContext, pending: PendingStats | None) -> GatheredStats:
    """Read the newest statistics that the host need not wait for; pass them to the recorder and the load balancer.

    Raises:
        TrainingFailed: the ranks called the parts of a sharded model in different orders.
    """
    if pending is None:  # read late, in the first update or after a save
        return GatheredStats.from_ranks([RankStats()])
    gathered = pending.read()
    gathered.check_call_order()
    if context.recorder is not None:
        context.recorder.on_gathered(gathered)
    if context.load_balancer is not None and gathered.update is not None:
        context.load_balancer.on_gathered(gathered.stages_ms, gathered.update)
    return gathered


def exchange_results(context: TrainContext, results: UpdateResults) -> GatheredStats:
    """Exchange the results of the latest update with all ranks at once, instead of with the next update."""
    stats = RankStats(stop=context.stop_requests.level, previous=results.scalars, stages_ms=context.clock.times_ms())
    table = context.replica.exchange_stats(stats.to_row(context.precision.device))
    return PendingStats(table, None, results.update).read()
