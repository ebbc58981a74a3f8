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

from launcher import strategies
from launcher.assembly import OpenData, Parts, assemble
from launcher.batch import BatchPolicy, plan_batch
from launcher.data import Feed
from launcher.faults import Faults
from launcher.loop import forward, micro_batches, rescale
from launcher.optim import Precision
from launcher.strategies import Replica
from launcher.study import Study
from launcher.telemetry import STAGES, StageClock, critical_rank
from launcher.throughput import MEMORY_SHARE
from launcher.timeline import Position, Timeline, Update
from launcher.topology import Topology
from launcher.tune.council import Council
from launcher.tune.ledger import Visit
from launcher.tune.memory import HostPeak, out_of_memory
from launcher.vote import Ballot, Vote

__all__ = ["Exhausted", "Lost", "Pace", "Stand", "Trial", "rehearse", "run_through", "survived", "visit"]

ENDLESS = 1 << 60
WARM_UP = 2
MOST_WARM_UP = 40
FOR_MEMORY = 4  # five updates with the dry run: every buffer has been allocated by then
SLOWLY = 1e-3  # of the configured learning rate: the step costs the same, and training does not diverge to NaN

Done = TypeVar("Done")


class Exhausted(Exception):
    """Memory ran out on at least one rank, and all ranks know."""

    def __init__(self, where: str) -> None:
        super().__init__(f"out of memory in {where}")
        self.where = where


class Lost(RuntimeError):
    """Memory ran out on this rank while the others already wait for it in a collective."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__(
            f"rank {rank} ran out of memory at per_device={size} while other ranks waited for it in a collective: "
            f"type tune.max={size - 1} or less"
        )


@dataclass(frozen=True)
class Pace:
    """How long to time a size: the number of blocks and the seconds per block."""

    blocks: int = 4
    block_s: float = 0.15


@dataclass(frozen=True)
class Stand:
    """One rank's replica and everything a measurement needs around it, for any size."""

    study: Study
    topology: Topology
    parts: Parts
    council: Council
    vote: Vote
    faults: Faults

    @classmethod
    def of(
        cls, study: Study, topology: Topology, recipe: Any, device: torch.device, data: OpenData, council: Council
    ) -> Stand:
        parts = assemble(recipe, study.run, topology, device, data)
        vote = Vote(topology.world, study.run.launch.timeout_s)
        return cls(study, topology, parts, council, vote, Faults.of(topology.rank, topology.generation))

    def trial(self, size: int, items: Any, accumulation: int | None = None) -> Trial:
        """Set up the measurement of one size. `accumulation`: micro-batches per update, if not as configured."""
        run = self.study.run
        steps = accumulation or (None if run.batch.accumulation == "auto" else run.batch.accumulation)
        plan = plan_batch(BatchPolicy("scale", per_device=size, accumulation=steps), self.topology.world)
        stages = ((0, plan),)
        timeline = Timeline(self.study.sizes.train, ENDLESS, stages, "carry", strategies.even(run))
        studied = replace(self.study, plan=plan, stages=stages, timeline=timeline)
        pin = self.parts.device.type == "cuda"
        feed = Feed.of(
            items,
            self.parts.recipe,
            timeline,
            Position(),
            seed=run.seed,
            rank=self.topology.rank,
            data=run.data,
            pin=pin,
        )
        return Trial(studied, self.topology, self.parts, feed, self.faults)


@dataclass(frozen=True)
class Trial:
    """The context that the training loop's functions need, for one size."""

    study: Study
    topology: Topology
    parts: Parts
    feed: Feed
    faults: Faults

    @property
    def recipe(self) -> Any:
        return self.parts.recipe

    @property
    def replica(self) -> Replica:
        return self.parts.replica

    @property
    def precision(self) -> Precision:
        return self.parts.precision

    @property
    def clock(self) -> StageClock:
        return self.parts.clock

    @property
    def rate(self) -> float:
        return SLOWLY * float(self.study.run.lr.base or 1.0)

    def at(self, phase: str, update: Update) -> None:
        self.faults(phase, update.index + 1)

    def settle(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.parts.device.type == "cuda":
            torch.cuda.synchronize(self.parts.device)

    @property
    def warm_up(self) -> int:
        """Number of updates until caches are warm and the batches prefetched by loader processes are used up."""
        data = self.study.run.data
        ahead = math.ceil(data.workers * data.prefetch / max(1, self.study.plan.accumulation))
        return min(MOST_WARM_UP, WARM_UP + ahead)


def visit(
    stand: Stand,
    size: int,
    items: Any,
    pace: Pace | None,
    allowed_bytes: float | None,
    accumulation: int | None = None,
) -> Visit:
    """Measure one size: timed as `pace` says, or only its memory if `pace` is None. Every rank calls it.

    Raises:
        Lost: memory ran out on this rank while others wait for it.
    """
    gauge = gauge_of(stand.parts.device, allowed_bytes)
    gauge.clear()
    try:
        trial = survived(stand, size, partial(stand.trial, size, items, accumulation))
        speeds, stages_ms = survived(stand, size, partial(tried, trial, stand, pace))
    except Exhausted as error:
        return Visit(size, where=error.where, accumulation=accumulation)
    peaks = stand.council.gather(gauge.read())
    return Visit(
        size,
        speeds,
        stages_ms,
        memory_bytes=max(peak for peak, _, _ in peaks),
        retries=sum(retries for _, retries, _ in peaks),
        pressed=any(pressed for _, _, pressed in peaks),
        accumulation=accumulation,
    )


def survived(stand: Stand, size: int, act: Callable[[], Done]) -> Done:
    """Return the result of `act` if memory sufficed. No traceback keeps the allocated tensors alive.

    Raises:
        Exhausted: memory ran out, and all ranks know.
        Lost: memory ran out on this rank while others wait for it.
    """
    done: list[Done] = []
    try:
        done.append(act())
    except Exhausted:
        raise
    except Exception as error:
        if not out_of_memory(error):
            raise
        if stand.topology.world > 1:
            raise Lost(size, stand.topology.rank) from error
    if not done:
        raise Exhausted("a later update")
    return done[0]


def tried(trial: Trial, stand: Stand, pace: Pace | None) -> tuple[tuple[float, ...], dict[str, float] | None]:
    """Samples/s of each block and the mean stage times; empty and None if only memory is measured."""
    updates = trial.study.timeline.updates()
    rehearse(trial, next(updates), stand)
    if pace is None:
        run_through(trial, updates, stand.vote, FOR_MEMORY)
        return (), None
    return timed(trial, updates, stand, pace)


def rehearse(trial: Trial, update: Update, stand: Stand) -> None:
    """Dry-run the first update without gradient communication; after each phase all ranks check for OOM.

    Strategies that communicate in the forward pass run a normal update instead.

    Raises:
        Exhausted: on every rank, if any of them ran out of memory.
    """
    if strategies.even(trial.study.run):
        whole_update(trial, update, stand.vote)
        return
    micros = agreed(stand.council, "data", partial(micro_batches, trial, update))
    while (micro := agreed(stand.council, "data", partial(next, micros, None))) is not None:
        with trial.replica.micro(last=False, pad=micro.pad, place=micro.place):
            loss = agreed(stand.council, "forward", partial(forward, trial, micro, update))
            trial.clock.lap("forward")
            agreed(stand.council, "backward", partial(backward, trial, loss.total, update))
    clip = trial.study.run.train.clip_norm
    agreed(stand.council, "optimizer", lambda: trial.replica.step(trial.rate, None, 1.0, clip))
    trial.clock.end_update()


def backward(trial: Trial, total: torch.Tensor, update: Update) -> None:
    trial.at("backward", update)
    trial.replica.backward(total, update.samples)


def agreed(council: Council, where: str, act: Callable[[], Done]) -> Done:
    """Return the result of `act` if memory sufficed on every rank. No traceback keeps the allocated tensors alive.

    Raises:
        Exhausted: memory ran out on at least one rank.
    """
    done: list[Done] = []
    try:
        done.append(act())
    except Exception as error:
        if not out_of_memory(error):
            raise
    if not all(council.gather(bool(done))):
        raise Exhausted(where)
    return done[0]


def whole_update(trial: Trial, update: Update, vote: Vote) -> tuple[float, ...]:
    """Run one update as in training; return the critical rank's stage times of the previous update."""
    count = 0.0
    for micro in micro_batches(trial, update):
        with trial.replica.micro(last=micro.last, pad=micro.pad, place=micro.place):
            loss = forward(trial, micro, update)
            count += 0.0 if micro.pad else float(loss.count)
            if micro.last:
                pending = vote.cast(Ballot(count=count), trial.clock.times_ms())
            backward(trial, loss.total, update)
            trial.clock.lap_backward()
    trial.at("sync", update)
    ballots = pending.wait()
    trial.clock.lap("sync")
    trial.at("optimizer", update)
    trial.replica.step(trial.rate, None, rescale(update, ballots), trial.study.run.train.clip_norm)
    trial.clock.lap("optimizer")
    trial.clock.end_update()
    return ballots.stages_ms[critical_rank(ballots.stages_ms)]


def run_through(
    trial: Trial, updates: Iterator[Update], vote: Vote, many: int
) -> tuple[float, list[tuple[float, ...]]]:
    """Run `many` updates; return their seconds and the stage times gathered during them."""
    trial.settle()
    trial.clock.start()
    start = time.perf_counter()
    stages = [whole_update(trial, next(updates), vote) for _ in range(many)]
    trial.settle()
    return time.perf_counter() - start, stages


def timed(
    trial: Trial, updates: Iterator[Update], stand: Stand, pace: Pace
) -> tuple[tuple[float, ...], dict[str, float]]:
    """Warm up and time; return samples/s of each block, over all workers, and the mean stage times."""
    run_through(trial, updates, stand.vote, trial.warm_up - 1)
    spent_s, _ = run_through(trial, updates, stand.vote, 1)
    slowest_s = max(stand.council.gather(spent_s))
    many = max(1, math.ceil(pace.block_s / slowest_s))
    speeds, stages = [], []
    for _ in range(pace.blocks):
        spent_s, seen = run_through(trial, updates, stand.vote, many)
        slowest_s = max(stand.council.gather(spent_s))
        speeds.append(many * trial.study.plan.global_batch / slowest_s)
        stages += seen
    means = (sum(column) / len(stages) for column in zip(*stages, strict=True))
    return tuple(speeds), dict(zip(STAGES, means, strict=True))


class CudaGauge:
    """Memory that torch has reserved on the device, which other programs cannot use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def clear(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = self._retries()

    def read(self) -> tuple[int, int, bool]:
        """Peak in bytes, allocation retries, and whether the peak exceeds the allowed share of memory."""
        peak = torch.cuda.max_memory_reserved(self._device)
        whole = torch.cuda.get_device_properties(self._device).total_memory
        return peak, self._retries() - self._before, peak > MEMORY_SHARE * whole

    def _retries(self) -> int:
        return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))


class HostGauge:
    """Resident memory of this process."""

    def __init__(self, allowed_bytes: float | None) -> None:
        self._allowed = allowed_bytes
        self._peak = HostPeak()

    def clear(self) -> None:
        self._peak.clear()

    def read(self) -> tuple[int, int, bool]:
        peak = self._peak.bytes()
        return peak, 0, self._allowed is not None and peak > self._allowed


def gauge_of(device: torch.device, allowed_bytes: float | None) -> CudaGauge | HostGauge:
    return CudaGauge(device) if device.type == "cuda" else HostGauge(allowed_bytes)
