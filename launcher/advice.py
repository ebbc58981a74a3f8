"""What to try, in words: every sentence stands on something that was measured in the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from launcher.sinks.text import count, figure, rate, took

if TYPE_CHECKING:
    from launcher.explain import Profile

__all__ = ["STAGE_WORDS", "advice"]

#: A stage with less of the wall time is not worth a word, unless it is the largest.
WORTH = 0.15
BUSY = 0.7
#: Shares of its time that loading computes: from here on decoding limits; down from here storage does.
COMPUTES, WAITS = 0.7, 0.4
#: Pages read from a disk per update: a machine with room reads none once it is warm.
THRASHES = 1.0
APART = 0.15

STAGE_WORDS = {
    "data": "waiting for data",
    "transfer": "moving batches to the device",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "sync": "waiting for other workers",
    "optimizer": "the optimizer's step",
    "checkpoint": "saving",
    "other": "everything else (validation, logging)",
}


def advice(run: Profile) -> Iterator[str]:
    """The largest stages first, then what was seen beside them."""
    told = set()
    for stage in sorted(run.stages, key=run.stages.__getitem__, reverse=True):
        about = _ABOUT[stage]
        if about not in told and (stage == run.bottleneck or run.share(stage) >= WORTH):
            told.add(about)
            yield from about(run)
    yield from _straggler(run)
    yield from _memory(run)
    yield from _noise(run)
    yield from _restarts(run)
    yield from _worlds(run)


def _without(run: Profile, stage: str) -> str:
    """What the run could reach without a stage."""
    return rate(run.samples_per_s * run.wall_ms / max(run.wall_ms - run.stages[stage], 1e-9))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _data(run: Profile) -> Iterator[str]:
    yield (
        f"{figure(run.stages['data'])} ms of every update pass waiting for data; without them it would be up to "
        f"{_without(run, 'data')} samples/s: {_loaders(run.loader_cpu)}, and see data.source=synthetic for what the "
        f"rest can do"
    )


def _loaders(busy: float | None) -> str:
    """What keeps the loaders: computing, or their storage."""
    if busy is None or WAITS < busy < COMPUTES:
        return "raise data.workers"
    if busy >= COMPUTES:
        return (
            f"loading computes for {_percent(busy)} of its time (decoding, augmenting), so raise data.workers, one per "
            f"free core, or prepare the data beforehand"
        )
    return (
        f"loading computes for {_percent(busy)} of its time and waits for its storage otherwise: a disk of the "
        f"machine's own or fewer and larger files help, and more data.workers that wait at the same time"
    )


def _transfer(run: Profile) -> Iterator[str]:
    yield (
        f"batches take {figure(run.stages['transfer'])} ms to reach the device: hand over smaller types (uint8 images, "
        f"scaled on the device), and load with data.workers=1 or more, which pins their memory"
    )


def _compute(run: Profile) -> Iterator[str]:
    part = run.share("forward") + run.share("backward")
    spent = f"forward and backward take {_percent(part)} of the time"
    if run.utilization is not None and run.utilization < BUSY * part:
        yield (
            f"{spent}, but the device is busy for {_percent(run.utilization)} of it all: overhead per micro-batch, or "
            f"other programs on the machine; larger micro-batches have less overhead (launcher tune measures how "
            f"much), train.compile=true too"
        )
        return
    limits = ": the computation is what limits" if run.bottleneck in ("forward", "backward") else ""
    yield (
        f"{spent}, {figure((run.stages['forward'] + run.stages['backward']) / run.samples * 1e3)} us a sample{limits}; "
        f"less of it: train.compile=true, on a GPU train.precision=bf16, or more workers"
    )


def _sync(run: Profile) -> Iterator[str]:
    yield (
        f"{figure(run.stages['sync'])} ms of every update are waiting for other workers that the backward pass does "
        f"not hide: batch.accumulation=2 halves how often it happens, at twice the batch"
    )


def _optimizer(run: Profile) -> Iterator[str]:
    yield (
        f"the optimizer's step takes {figure(run.stages['optimizer'])} ms whatever the batch of {count(run.batch)}: "
        f"more samples per update (batch.per_device, batch.accumulation) spread it thinner"
    )


def _checkpoint(run: Profile) -> Iterator[str]:
    yield f"saving takes {_percent(run.share('checkpoint'))} of the time: a longer checkpoint.every saves less often"


def _other(run: Profile) -> Iterator[str]:
    yield (
        f"{_percent(run.share('other'))} of the time is spent outside the stages, mostly validation: "
        f"a longer train.validate_every validates less often"
    )


_ABOUT: Mapping[str, Callable[[Profile], Iterator[str]]] = {
    "data": _data,
    "transfer": _transfer,
    "forward": _compute,
    "backward": _compute,
    "sync": _sync,
    "optimizer": _optimizer,
    "checkpoint": _checkpoint,
    "other": _other,
}


def _straggler(run: Profile) -> Iterator[str]:
    own = {stage: gap for stage, gap in run.gaps.items() if stage in ("data", "transfer", "forward", "backward")}
    if run.slow_rank is None or not own:
        return
    stage = max(own, key=lambda name: own[name][0] - own[name][1])
    slow, quick = own[stage]
    if slow - quick > APART * run.wall_ms:
        yield (
            f"the others wait for rank {run.slow_rank}: its {stage} takes {figure(slow)} ms, the quickest rank's "
            f"{figure(quick)} ms; look at that machine, or let elastic.balance=true give it fewer samples"
        )


def _memory(run: Profile) -> Iterator[str]:
    if run.alloc_retries > 0:
        yield (
            f"the device's allocator ran short {count(run.alloc_retries)} times and had to start over: memory is full; "
            f"lower batch.per_device, with batch.accumulation for the same batch"
        )
    if run.major_faults >= THRASHES:
        yield (
            f"every update reads {count(run.major_faults)} pages from a disk: the machine's memory is full, or data is "
            f"read through mmap; lower batch.per_device, or ask for more memory"
        )


def _noise(run: Profile) -> Iterator[str]:
    if run.noise is None:
        return
    swing = f"; its loss swings by {figure(run.loss[1])} round {figure(run.loss[0])}" if run.loss else ""
    if run.noise > 1:
        yield (
            f"the gradient's noise scale is at least {run.noise:.3g} times the batch of {count(run.batch)}{swing}: an "
            f"update is mostly noise, and a larger batch makes progress in fewer updates"
        )


def _restarts(run: Profile) -> Iterator[str]:
    if run.recovery_s or run.lost_samples:
        yield (
            f"restarts took {took(run.recovery_s)}, and {count(run.lost_samples)} samples were trained on again: "
            f"a shorter checkpoint.every loses less"
        )


def _worlds(run: Profile) -> Iterator[str]:
    """Effect of the world size within one run."""
    if len(run.worlds) < 2:
        return
    (small, slow), (large, fast) = run.worlds[0], run.worlds[-1]
    kept = fast / large / (slow / small)
    yield (
        f"from {small} to {large} workers samples/s went from {rate(slow)} to {rate(fast)}: {_percent(kept)} of what "
        f"each worker did is kept, {figure(run.stages.get('sync', 0.0))} ms of an update are exposed waiting"
    )
