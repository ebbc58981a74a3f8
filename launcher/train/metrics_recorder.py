"""Build the rows of metrics.jsonl from the statistics gathered from all ranks; only rank 0 records."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.distributed.rank_stats import GatheredStats
from launcher.distributed.stragglers import StragglerDetector
from launcher.goodput.noise_scale import NoiseScale
from launcher.plan.batch import BatchPlan
from launcher.plan.lr_schedule import LrSchedule
from launcher.plan.timeline import Update
from launcher.plan.training_plan import TrainingPlan
from launcher.run_dir.restart_cost import RestartCost
from launcher.telemetry.metrics_logger import MetricsLogger
from launcher.telemetry.records import MetricsRow
from launcher.telemetry.stage_metrics import compute_stage_metrics, stack_times
from launcher.topology import Topology

__all__ = [
    "MetricsRecorder",
    "UpdateResult",
    "make_batch_metrics",
    "plan_to_dict",
]


@dataclass(frozen=True)
class UpdateResult:
    """Rank 0's own values at the end of an update.

    `wall_s` is the wall time since the previous update ended, `grad_norm` a scalar on the device.
    """

    update: Update
    lr: float
    lr_scale: float
    time: float
    wall_s: float
    grad_norm: Any
    noise: NoiseScale
    base_batch: float
    saved: bool = False
    resource_metrics: Mapping[str, float] = field(default_factory=dict)
    validation: Mapping[str, float] = field(default_factory=dict)


def make_batch_metrics(plan: BatchPlan) -> dict[str, float]:
    return {
        "batch/global": plan.global_batch,
        "batch/per_device": plan.per_device,
        "batch/accumulation": plan.accumulation,
        "batch/world": plan.world,
    }


def plan_to_dict(training_plan: TrainingPlan, schedule: LrSchedule, plan: BatchPlan) -> dict[str, Any]:
    """A plan as in events and plan.json; `lr` is the learning rate after warmup, before decay and ramps."""
    scale = schedule.target_scale(plan.global_batch)
    return {
        "policy": training_plan.policy,
        "world": plan.world,
        "global": plan.global_batch,
        "shares": list(plan.shares),
        "per_device": plan.per_device,
        "accumulation": plan.accumulation,
        "lr": schedule.base * scale,
        "lr_scale": scale,
        "lr_base": schedule.base,
        "lr_base_batch": schedule.base_batch,
        "lr_rule": training_plan.rule,
        "lr_noise": schedule.noise,
        "warmup_samples": training_plan.warmup,
        "updates_per_epoch": training_plan.sizes.train / plan.global_batch,
    }


BATCH_S = 0.25


class MetricsRecorder:
    """Holds an update until its statistics have been gathered from all ranks, then writes its row.

    Rows of short updates are written together, a few times per second: between the parts of an update the same code
    takes several times as long as in a loop of its own.

    With `every` above 1 a row covers a window of updates; an update with validation or a checkpoint always ends its
    window. `on_saved_row` is called once the row of an update with a checkpoint is written, `on_first_update` at the
    end of the first update; `restart` adds the cost of the restart to the first row.
    """

    def __init__(
        self,
        logger: MetricsLogger,
        topology: Topology,
        every: int,
        tokens_per_sample: int | None,
        on_saved_row: Callable[[], None] = lambda: None,
        restart: RestartCost = RestartCost(),  # noqa: B008 (frozen)
        on_first_update: Callable[[], None] | None = None,
    ) -> None:
        self._logger = logger
        self._on_saved_row = on_saved_row
        self._restart: RestartCost | None = restart
        self._on_first_update = on_first_update
        self._topology = topology
        self._every = every
        self._tokens = tokens_per_sample
        self._stragglers = StragglerDetector()
        self._pending: deque[UpdateResult] = deque()
        self._complete: list[tuple[UpdateResult, GatheredStats]] = []
        self._window: list[tuple[UpdateResult, GatheredStats]] = []

    def on_update_end(self, result: UpdateResult) -> None:
        self._pending.append(result)
        if self._on_first_update is not None:
            self._on_first_update()
            self._on_first_update = None

    def on_gathered(self, gathered: GatheredStats) -> None:
        """Take the losses and stage times of all ranks, which belong to the oldest pending update, if to any."""
        if gathered.previous_update is None:
            return
        result = self._pending.popleft()
        self._complete.append((result, gathered))
        waited_s = result.time - self._complete[0][0].time
        if result.saved or result.validation or not 0 <= waited_s < BATCH_S:
            self._process_complete()

    def _process_complete(self) -> None:
        """Write the rows of the updates that are complete, in which stragglers are looked for."""
        complete, self._complete = self._complete, []
        for result, gathered in complete:
            self._add_to_window(result, gathered)
            if result.saved:
                self._on_saved_row()
            if not result.update.is_partial:
                self._check_stragglers(gathered, result.update.plan.shares)

    def _add_to_window(self, result: UpdateResult, gathered: GatheredStats) -> None:
        self._window.append((result, gathered))
        if result.validation or result.saved or (result.update.index + 1) % self._every == 0:
            self._write_row()

    def _check_stragglers(self, gathered: GatheredStats, shares: Sequence[int]) -> None:
        self._stragglers, straggler = self._stragglers.with_update(gathered.stages_ms, shares)
        if straggler is not None:
            self._logger.log_event("alarm", kind="straggler", detail=straggler.detail, **vars(straggler))

    def flush_unfinished(self) -> None:
        """Training was interrupted: write the rows of pending updates with rank 0's values only."""
        self._process_complete()
        for result in self._pending:
            self._add_to_window(result, GatheredStats.from_ranks(()))
        self._pending.clear()
        self.flush()

    def flush(self) -> None:
        """Write all rows, also that of an unfinished window, at the end of training."""
        self._process_complete()
        if self._window:
            self._write_row()

    def _write_row(self) -> None:
        self._logger.log_metrics(self._make_row())
        self._window = []

    def _make_row(self) -> MetricsRow:
        last, last_gathered = self._window[-1]
        gathered_stats = [gathered for _, gathered in self._window if gathered.world]
        is_empty = bool(last_gathered.world) and not last_gathered.loss_count
        grad_norm = last_gathered.grad_norm if last_gathered.world else float(last.grad_norm)
        values: dict[str, Any] = {
            **(compute_mean_loss(gathered_stats) if gathered_stats else {}),
            **({} if is_empty else {"train/grad_norm": grad_norm}),
            "lr/value": last.lr,
            "lr/scale": last.lr_scale,
            **make_batch_metrics(last.update.full_plan),
            **self._compute_throughput(),
            **(compute_mean_stages(gathered_stats, self._window) if gathered_stats else {}),
            **last.resource_metrics,
            **last.noise.to_metrics(last.update.full_plan.global_batch, last.base_batch),
            **last.validation,
            **(self._restart.to_metrics(self._window[0][0].time) if self._restart else {}),
        }
        self._restart = None
        return MetricsRow(
            time=last.time,
            samples=last.update.end,
            update=last.update.index + 1,
            epoch=last.update.epoch,
            world=self._topology.world,
            generation=self._topology.generation,
            values=values,
        )

    def _compute_throughput(self) -> dict[str, float]:
        """Throughput over the total wall time of the window, without partial updates."""
        whole = [finished for finished, _ in self._window if not finished.update.is_partial]
        wall_s = sum(finished.wall_s for finished in whole)
        if wall_s <= 0:
            return {}
        speed = sum(finished.update.samples for finished in whole) / wall_s
        values = {"throughput/samples_per_s": speed, "throughput/device/samples_per_s": speed / self._topology.world}
        if self._tokens:
            values["throughput/tokens_per_s"] = speed * self._tokens
        return values


def compute_mean_loss(gathered_stats: Sequence[GatheredStats]) -> dict[str, float]:
    """Mean loss over all samples (or tokens) of all ranks; absent if there were none."""
    count = sum(gathered.loss_count for gathered in gathered_stats)
    total = sum(gathered.loss for gathered in gathered_stats if gathered.loss_count)
    return {"train/loss": total / count} if count else {}


def compute_mean_stages(
    gathered_stats: Sequence[GatheredStats], window: Sequence[tuple[UpdateResult, GatheredStats]]
) -> dict[str, float]:
    """Stage values from each rank's mean stage times over the window."""
    times = [gathered.stages_ms for gathered in gathered_stats]
    mean_ms = times[0] if len(times) == 1 else stack_times(times).mean(dim=0)
    return compute_stage_metrics(mean_ms, sum(finished.update.samples for finished, _ in window) // len(window))
