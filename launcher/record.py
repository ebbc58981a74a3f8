"""Build the rows of metrics.jsonl from the statistics gathered from all ranks; only rank 0 records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.batch import BatchPlan
from launcher.noise import NoiseScale
from launcher.reading import Reading
from launcher.recovery import Restart
from launcher.schedule import LrSchedule
from launcher.sinks.journal import Journal
from launcher.stages import STAGES
from launcher.stragglers import Stragglers
from launcher.study import Study
from launcher.telemetry import Late, critical_rank
from launcher.timeline import Update
from launcher.topology import Topology
from launcher.vote import Agreed

__all__ = ["Finished", "Recorder", "Silent", "batch_values", "plan_facts", "stage_values"]


@dataclass(frozen=True)
class Finished:
    """Rank 0's own values at the end of an update; `wall_s` is the wall time since the previous update ended."""

    update: Update
    lr: float
    lr_scale: float
    time: float
    wall_s: float
    late: Late
    noise: NoiseScale
    base_batch: float
    saved: bool = False
    beside: Mapping[str, float] = field(default_factory=dict)
    validation: Mapping[str, float] = field(default_factory=dict)


def batch_values(plan: BatchPlan) -> dict[str, float]:
    return {
        "batch/global": plan.global_batch,
        "batch/per_device": plan.per_device,
        "batch/accumulation": plan.accumulation,
        "batch/world": plan.world,
    }


def stage_values(stages_ms: tuple[tuple[float, ...], ...], samples: int) -> dict[str, float]:
    """Stage times of the critical rank, with the minimum and maximum over all ranks."""
    rank = critical_rank(stages_ms)
    wall_ms = sum(stages_ms[rank]) or math.nan
    values: dict[str, float] = {"stage/rank": rank}
    for index, stage in enumerate(STAGES):
        own_ms = stages_ms[rank][index]
        values[f"stage/{stage}/ms"] = own_ms
        values[f"stage/{stage}/share"] = own_ms / wall_ms
        if own_ms > 0:
            values[f"stage/{stage}/samples_per_s"] = samples / own_ms * 1e3
        if len(stages_ms) > 1:
            values[f"stage/{stage}/ms_min"] = min(row[index] for row in stages_ms)
            values[f"stage/{stage}/ms_max"] = max(row[index] for row in stages_ms)
    return values


def plan_facts(study: Study, schedule: LrSchedule, plan: BatchPlan) -> dict[str, Any]:
    """A plan as in events and plan.json; `lr` is the learning rate after warmup, before decay and ramps."""
    scale = schedule.target(plan.global_batch)
    return {
        "policy": study.policy,
        "world": plan.world,
        "global": plan.global_batch,
        "shares": list(plan.shares),
        "per_device": plan.per_device,
        "accumulation": plan.accumulation,
        "lr": schedule.base * scale,
        "lr_scale": scale,
        "lr_base": schedule.base,
        "lr_base_batch": schedule.base_batch,
        "lr_rule": study.rule,
        "lr_noise": schedule.noise,
        "warmup_samples": study.warmup,
        "updates_per_epoch": study.sizes.train / plan.global_batch,
    }


class Recorder:
    """Holds an update until its statistics have been gathered from all ranks, then writes its row.

    With `every` above 1 a row covers a window of updates; an update with validation or a checkpoint always ends its
    window. `rows_written` is called once a finished update has been recorded; `restart` adds the cost of the restart to
    the first row.
    """

    def __init__(
        self,
        journal: Journal,
        topology: Topology,
        every: int,
        tokens_per_sample: int | None,
        told: Callable[[], None] = lambda: None,
        restart: Restart = Restart(),  # noqa: B008 (frozen)
    ) -> None:
        self._journal = journal
        self._told = told
        self._restart: Restart | None = restart
        self._topology = topology
        self._every = every
        self._tokens = tokens_per_sample
        self._stragglers = Stragglers()
        self._waiting: Finished | None = None
        self._window: list[tuple[Finished, Agreed]] = []

    def finished(self, update: Finished) -> None:
        self._waiting = update

    def agreed(self, agreed: Agreed) -> None:
        """Take the gathered losses and stage times of the pending update."""
        if self._waiting is None:
            return
        last, self._waiting = self._waiting, None
        self._window.append((last, agreed))
        if last.validation or last.saved or (last.update.index + 1) % self._every == 0:
            self._post()
        self._told()
        if not last.update.tail:
            self._watch(agreed, last.update.plan.shares)

    def _watch(self, agreed: Agreed, shares: Sequence[int]) -> None:
        self._stragglers, slow = self._stragglers.observed(agreed.stages_ms, shares)
        if slow is not None:
            self._journal.event("alarm", kind="straggler", detail=slow.detail, **vars(slow))

    def last_word(self) -> None:
        """Training was interrupted: write the pending row with rank 0's values only."""
        if self._waiting is not None:
            nobody = Agreed((), ())
            self._window.append((self._waiting, nobody))
            self._waiting = None
        self.flush()

    def flush(self) -> None:
        """Write the row of an unfinished window, at the end of training."""
        if self._window:
            self._post()

    def _post(self) -> None:
        self._journal.reading(self._row())
        self._window = []

    def _row(self) -> Reading:
        last = self._window[-1][0]
        voted = [agreed for _, agreed in self._window if agreed.ballots]
        values: dict[str, Any] = {
            **(mean_loss(voted) if voted else {}),
            "train/grad_norm": last.late.read()[1],
            "lr/value": last.lr,
            "lr/scale": last.lr_scale,
            **batch_values(last.update.nominal),
            **self._throughput(),
            **(mean_stages(voted, self._window) if voted else {}),
            **last.beside,
            **last.noise.values(last.update.nominal.global_batch, last.base_batch),
            **last.validation,
            **(self._restart.values(self._window[0][0].time) if self._restart else {}),
        }
        self._restart = None
        return Reading(
            time=last.time,
            samples=last.update.end,
            update=last.update.index + 1,
            epoch=last.update.epoch,
            world=self._topology.world,
            generation=self._topology.generation,
            values=values,
        )

    def _throughput(self) -> dict[str, float]:
        """Throughput over the total wall time of the window, without partial updates."""
        whole = [finished for finished, _ in self._window if not finished.update.tail]
        wall_s = sum(finished.wall_s for finished in whole)
        if wall_s <= 0:
            return {}
        speed = sum(finished.update.samples for finished in whole) / wall_s
        values = {"throughput/samples_per_s": speed, "throughput/device/samples_per_s": speed / self._topology.world}
        if self._tokens:
            values["throughput/tokens_per_s"] = speed * self._tokens
        return values


def mean_loss(voted: Sequence[Agreed]) -> dict[str, float]:
    """Mean loss over all samples (or tokens) of all ranks; NaN if there were none."""
    count = sum(agreed.loss_count for agreed in voted)
    return {"train/loss": sum(agreed.loss for agreed in voted) / count if count else math.nan}


def mean_stages(voted: Sequence[Agreed], window: Sequence[tuple[Finished, Agreed]]) -> dict[str, float]:
    """Stage values from each rank's mean stage times over the window."""
    mean_ms = tuple(
        tuple(sum(times) / len(voted) for times in zip(*rows, strict=True))
        for rows in zip(*(agreed.stages_ms for agreed in voted), strict=True)
    )
    return stage_values(mean_ms, sum(finished.update.samples for finished, _ in window) // len(window))


class Silent:
    """No-op metrics logger and recorder for all ranks except 0."""

    def finished(self, update: Finished) -> None: ...

    def agreed(self, agreed: Agreed) -> None: ...

    def flush(self) -> None: ...

    def last_word(self) -> None: ...

    def event(self, name: str, /, **facts: Any) -> None: ...

    def close(self) -> None: ...
