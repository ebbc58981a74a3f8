"""The training loop: `train` runs the updates, the functions below are its steps."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from launcher.balance import Balancer, Level
from launcher.data import Feed, seed_from, transfer
from launcher.faults import Faults
from launcher.goodput import Fixed, Goodput
from launcher.heart import Heart, Still
from launcher.optim import Precision
from launcher.profile import profiled
from launcher.recipe import Loss
from launcher.record import Finished, Recorder, Silent, plan_facts
from launcher.saver import Saver, name_of
from launcher.schedule import LrSchedule
from launcher.shards import tree_sum
from launcher.signals import GO_ON, Wishes
from launcher.standing import Standing, Target
from launcher.strategies import Replica
from launcher.study import Study
from launcher.telemetry import Late, Meter, StageClock
from launcher.timeline import Update
from launcher.topology import Topology
from launcher.validate import Validation
from launcher.vote import Agreed, Ballot, Vote

__all__ = ["REPLAN", "Bench", "Job", "TrainingFailed", "forward", "micro_batches", "rescale", "train"]

REPLAN = -1


class TrainingFailed(RuntimeError):
    """Training cannot continue, and a restart would fail again."""


class Bench(Protocol):
    """What the forward and backward passes of one update need; shared by training and by `tune` probes."""

    @property
    def study(self) -> Study: ...
    @property
    def topology(self) -> Topology: ...
    @property
    def recipe(self) -> Any: ...
    @property
    def replica(self) -> Replica: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def feed(self) -> Feed: ...
    @property
    def clock(self) -> StageClock: ...
    @property
    def faults(self) -> Faults: ...

    def at(self, phase: str, update: Update) -> None: ...


@dataclass(frozen=True)
class Job:
    """Everything the training loop uses; made by `launcher.session`."""

    study: Study
    topology: Topology
    recipe: Any
    replica: Replica
    precision: Precision
    feed: Feed
    validation: Validation | None
    vote: Vote
    clock: StageClock
    recorder: Recorder | Silent
    meter: Meter
    saver: Saver
    wishes: Wishes
    balance: Balancer | Level = field(default_factory=Level)
    goodput: Goodput | Fixed = field(default_factory=Fixed)
    faults: Faults = field(default_factory=Faults)
    heart: Heart | Still = field(default_factory=Still)

    def at(self, phase: str, update: Update) -> None:
        """Enter a phase: publish it to the watchdog, and inject a fault if one is configured."""
        self.heart.phase(phase, update.index + 1)
        self.faults(phase, update.index + 1)


def train(job: Job, standing: Standing) -> tuple[Standing, int]:
    """Train to the end of the timeline, or until the ranks agree to stop.

    Returns the training state and the outcome: finished (`CONTINUE`), stop, restart, admit new nodes, or continue with
    other shares or another batch (`REPLAN`).

    Raises:
        TrainingFailed: three updates in a row were not finite.
    """
    clock, replica, late, agreed = job.clock, job.replica, Late(), None
    clock.start()
    job.meter.start()
    updates = job.study.timeline.updates(standing.position)
    for update in profiled(updates, job.study.run.train.profile, job.saver.folder, job.topology.rank):
        sums = Sums()
        for micro in micro_batches(job, update):
            with replica.micro(last=micro.last, pad=micro.pad, place=micro.place):
                loss = forward(job, micro, update)
                sums = sums.plus(loss, micro)
                if micro.last:
                    pending = job.vote.cast(ballot(job, sums, late), clock.times_ms())
                job.at("backward", update)
                replica.backward(loss.total, update.samples, measured_count(job, loss, update))
                clock.lap_backward()
        job.at("sync", update)
        agreed = pending.wait()
        clock.lap("sync")
        job.recorder.agreed(agreed)
        job.balance.agreed(agreed.stages_ms, update)
        standing = follow(job, heed(job, standing, agreed, late.update), late.update, update)

        job.at("optimizer", update)
        rate = rate_of(standing.schedule, update)
        step = replica.step(rate.lr, rate.momentum, rescale(update, agreed), job.study.run.train.clip_norm)
        late = Late((sums.total, step.norm, step.spread, step.finite), sums.count, step.groups, update)
        clock.lap("optimizer")

        standing, measured = validate(job, standing.after(update), update)
        stop = agreed.stop != GO_ON or standing.target_ends(job.study)
        saved = save(job, standing, update, late, asked=agreed.save or (stop and update.end < job.study.duration))
        clock.end_update()
        spent = (time.time(), job.meter.wall_s())
        known = (standing.noise, standing.schedule.base_batch)
        done = Finished(update, rate.lr, rate.scale, *spent, late, *known, saved, job.meter.values(), measured)
        job.recorder.finished(done)
        job.goodput.heard(standing.noise)
        if stop or job.balance.wants or job.goodput.wants:
            break
    if agreed is None:
        return standing, GO_ON
    job.heart.waits()
    last = job.vote.cast(ballot(job, Sums(), late), clock.times_ms()).wait()
    job.recorder.agreed(last)
    job.recorder.flush()
    ended = standing.position.samples >= job.study.duration or standing.target_ends(job.study)
    return heed(job, standing, last, late.update), GO_ON if ended else agreed.stop or REPLAN


@dataclass(frozen=True)
class Micro:
    batch: Any
    last: bool
    pad: bool
    place: int


def micro_batches(job: Bench, update: Update) -> Iterator[Micro]:
    """Yield this rank's micro-batches on the device, seeding the generators for each from its position."""
    parts = update.micro_batches(job.topology.rank)
    for index, part in enumerate(parts):
        job.at("data", update)
        batch = job.feed.next_batch()
        job.clock.lap("data")
        batch = transfer(batch, job.precision.device, job.precision.dtype)
        seed_generators(seed_from(job.study.run.seed, update.index, part.place, part.index), job.precision.device)
        job.clock.lap("transfer")
        yield Micro(batch, last=index == len(parts) - 1, pad=part.pad, place=part.place)


def seed_generators(number: int, device: torch.device) -> None:
    """Seed the generators a forward pass uses; torch.manual_seed is slower, as it seeds every kind of device."""
    random.seed(number)
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def forward(job: Bench, micro: Micro, update: Update) -> Loss:
    job.at("forward", update)
    with job.precision.autocast():
        loss = job.recipe.loss(job.replica.model, micro.batch)
    if job.faults.poisons("forward", update.index + 1):
        loss = replace(loss, total=loss.total * math.nan)
    job.clock.lap("forward")
    return loss


def measured_count(job: Job, loss: Loss, update: Update) -> float:
    """The loss count if the gradient noise of this update is measured, else 0."""
    return float(loss.count) if job.replica.measures(update.index) else 0.0


@dataclass(frozen=True)
class Sums:
    """Loss sums of this rank's micro-batches without padding: first per shard, then as a tree sum over shards."""

    places: Mapping[int, tuple[Any, float]] = field(default_factory=dict)

    def plus(self, loss: Loss, micro: Micro) -> Sums:
        if micro.pad:
            return self
        total, count = self.places.get(micro.place, (0.0, 0.0))
        both = (total + loss.total.detach().double(), count + float(loss.count))
        return Sums({**self.places, micro.place: both})

    @property
    def total(self) -> Any:
        return tree_sum(total for total, _ in self.places.values())

    @property
    def count(self) -> float:
        return float(tree_sum(count for _, count in self.places.values()))


def ballot(job: Job, sums: Sums, late: Late) -> Ballot:
    return replace(told(late), count=sums.count, stop=job.wishes.read(job.saver.asks), save=float(job.saver.wants()))


def told(late: Late) -> Ballot:
    """This rank's statistics of the previous update, to be gathered."""
    loss, norm, spread, finite = late.read()
    return Ballot(loss=loss, loss_count=late.count, finite=finite, norm=norm, spread=spread, groups=late.groups)


def rescale(update: Update, agreed: Agreed) -> float:
    """Factor from a mean over samples to a mean over the loss count; NaN, and so a skipped update, for a count of 0."""
    if agreed.count == update.samples:
        return 1.0
    return update.samples / agreed.count if agreed.count else math.nan


@dataclass(frozen=True)
class Rate:
    lr: float
    scale: float
    momentum: float | None


def rate_of(schedule: LrSchedule, update: Update) -> Rate:
    """Learning rate and momentum at `update`; a partial update keeps the learning rate of the full plan."""
    batch = update.nominal.global_batch
    lr = schedule.lr(update.start, batch)
    return Rate(lr, lr / schedule.base, schedule.momentum(update.start))


def heed(job: Job, standing: Standing, agreed: Agreed, before: Update | None) -> Standing:
    """Apply the gathered statistics of the previous update: count non-finite skips, update the noise scale."""
    if agreed.stop != GO_ON:
        job.wishes.heard()
    standing = learn(job, standing, standing.heard(agreed, before, job.study))
    patience = 20 if job.precision.name == "fp16" else 3
    standing = standing.skipped(0 if agreed.finite else standing.skips + 1)
    if standing.skips and (job.precision.name != "fp16" or standing.skips == patience):
        ranks = ", ".join(map(str, agreed.not_finite))
        where = f"the loss of rank {ranks}" if ranks else "the gradient, though every loss was finite"
        detail = f"update {standing.position.update} was skipped: NaN or infinity in {where}"
        job.saver.journal.event("alarm", kind="not_finite", detail=detail, ranks=list(agreed.not_finite))
        if standing.skips == patience and job.precision.name != "fp16":
            raise TrainingFailed(f"{patience} updates in a row were not finite; the last: {detail}")
    return standing


def learn(job: Job, before: Standing, after: Standing) -> Standing:
    """Log a plan event if the learning rate follows a noise scale that is newly known or has changed."""
    known, was = after.schedule.noise, before.schedule.noise
    if known != was and known is not None:
        plan = job.study.plan_at(after.position.samples)
        old, new = (plan_facts(job.study, one.schedule, plan) for one in (before, after))
        why = f"the gradient's noise scale is {known:.3g} samples, {'unknown' if was is None else f'{was:.3g}'} before"
        job.saver.journal.event("plan", why=why, **new, **{"from": old})
    return after


def follow(job: Job, standing: Standing, before: Update | None, update: Update) -> Standing:
    """Log the start of a batch.ramp stage, and rescale Adam's second moment after any change of batch."""
    plan = update.nominal
    if before is not None and before.nominal != plan:
        old, new = (plan_facts(job.study, standing.schedule, one) for one in (before.nominal, plan))
        moments = standing.moments_to(plan.global_batch)
        why = f"batch.ramp: new stage at sample {update.start}"
        job.saver.journal.event("plan", why=why, **new, **{"from": old}, moments=moments)
    standing, factor = standing.followed(update)
    if factor != 1.0:
        job.replica.rescale_moments(factor)
    return standing


def validate(job: Job, standing: Standing, update: Update) -> tuple[Standing, Mapping[str, float]]:
    """Validate if due, and pass the metrics to the schedule, the best checkpoint and the target."""
    if job.validation is None or not due(update, job.study.validate_every, job.study.duration):
        return standing, {}
    job.at("validate", update)
    measured = job.validation.measure(job.replica)
    standing = standing.validated(measured, update.end, job.study.run.schedule.metric)
    settings = job.study.run.checkpoint
    standing = standing.improved(measured, settings.best, settings.best_mode, name_of(standing))
    return reach(job, standing, measured), measured


def reach(job: Job, standing: Standing, measured: Mapping[str, float]) -> Standing:
    target = Target.of(job.study.run.train.target)
    if target is None or standing.reached is not None or not target.met(measured):
        return standing
    facts = {
        "metric": target.metric,
        "value": measured[target.metric],
        "samples": standing.position.samples,
        "update": standing.position.update,
        "seconds": job.meter.seconds(),
    }
    job.saver.journal.event("target", **facts)
    return replace(standing, reached=facts)


def save(job: Job, standing: Standing, update: Update, late: Late, *, asked: bool) -> bool:
    """Save a checkpoint if one is due or requested; return whether one was saved.

    The checkpoint's noise scale must include this update, whose gradient statistics are normally gathered with the next
    update and would be missing after a restart. They are therefore gathered an additional time for the checkpoint.
    """
    best = standing.best_checkpoint == name_of(standing)
    if not (asked or best or due(update, job.study.checkpoint_every, job.study.duration)):
        return False
    job.clock.lap("other")
    job.at("checkpoint", update)
    agreed = job.vote.cast(told(late), job.clock.times_ms()).wait()
    heard = replace(standing.heard(agreed, update, job.study), seconds=job.meter.seconds())
    job.saver.save(job.replica, job.study, heard, update.nominal)
    job.clock.lap("checkpoint")
    return True


def due(update: Update, every: int | None, duration: int) -> bool:
    """Return whether this update passes a multiple of `every` samples, or ends the run."""
    return update.end >= duration or (every is not None and update.start // every < update.end // every)
