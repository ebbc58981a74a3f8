"""From what the ranks told each other to the rows of metrics.jsonl. Only rank 0 has one."""

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
    """What rank 0 itself knows of an update when it ends. `wall_s` is everything since the last update's end."""

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
    """The critical rank's stages, and the spread over the ranks beside them."""
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
    """A plan as events and plan.json tell it; the rate is the one after warmup, before decay and ramps."""
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
    """Keeps an update until the next vote brings the other ranks' word on it, then writes its row.

    With `every` above 1 a row covers a window of updates; one that was validated or saved always has its row. `told`
    is called when the row of a finished update has been handed over; `restart` is what the first row has to tell.
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
        """The vote that carries the losses and stage times of the update that is waiting."""
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
        """Training broke off: the row of an update that nobody voted on any more has what this rank itself knows."""
        if self._waiting is not None:
            nobody = Agreed((), ())
            self._window.append((self._waiting, nobody))
            self._waiting = None
        self.flush()

    def flush(self) -> None:
        """The rest of a window, at the end of the run."""
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
        """Over the wall time of the window, everything included; partial windows (tails) stay out."""
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
    """Over all samples (or tokens) of all ranks; NaN where there were none."""
    count = sum(agreed.loss_count for agreed in voted)
    return {"train/loss": sum(agreed.loss for agreed in voted) / count if count else math.nan}


def mean_stages(voted: Sequence[Agreed], window: Sequence[tuple[Finished, Agreed]]) -> dict[str, float]:
    """Each rank's mean over the updates."""
    mean_ms = tuple(
        tuple(sum(times) / len(voted) for times in zip(*rows, strict=True))
        for rows in zip(*(agreed.stages_ms for agreed in voted), strict=True)
    )
    return stage_values(mean_ms, sum(finished.update.samples for finished, _ in window) // len(window))


class Silent:
    """The journal and the recorder of every rank but 0."""

    def finished(self, update: Finished) -> None: ...

    def agreed(self, agreed: Agreed) -> None: ...

    def flush(self) -> None: ...

    def last_word(self) -> None: ...

    def event(self, name: str, /, **facts: Any) -> None: ...

    def close(self) -> None: ...
