"""Tuning advice for one run, derived from its measured metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from launcher.sinks.text import count, figure, rate, took

if TYPE_CHECKING:
    from launcher.explain import Profile

__all__ = ["STAGE_WORDS", "advice"]

#: A stage below this share of the wall time gets no advice unless it is the largest one.
WORTH = 0.15
#: The device counts as idle if its utilization is below this fraction of the share of forward and backward.
BUSY = 0.7
#: CPU utilization of data loading: from the first value up decoding is the limit, from the second down storage is.
COMPUTES, WAITS = 0.7, 0.4
#: Major page faults per update from which memory counts as full; with enough memory there are none after warmup.
THRASHES = 1.0
#: Stragglers are reported if the slowest rank takes longer than the fastest by this share of the update.
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
    """Yield advice on the largest stages first, then on stragglers, memory, noise, restarts and scaling."""
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
    """Samples/s the run could reach if the stage took no time."""
    return rate(run.samples_per_s * run.wall_ms / max(run.wall_ms - run.stages[stage], 1e-9))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _data(run: Profile) -> Iterator[str]:
    yield (
        f"each update waits {figure(run.stages['data'])} ms for data; without that wait throughput could reach "
        f"{_without(run, 'data')} samples/s: {_loaders(run.loader_cpu)}; run with data.source=synthetic to measure "
        f"training without data loading"
    )


def _loaders(busy: float | None) -> str:
    """Advice for slow loading, by whether it is limited by the CPU or by storage."""
    if busy is None or WAITS < busy < COMPUTES:
        return "raise data.workers"
    if busy >= COMPUTES:
        return (
            f"loading uses the CPU for {_percent(busy)} of its time (decoding, augmentation), so raise data.workers up "
            f"to one per free core, or preprocess the data"
        )
    return (
        f"loading uses the CPU for {_percent(busy)} of its time and waits for storage otherwise: use a local disk, "
        f"fewer and larger files, or more data.workers to overlap the waits"
    )


def _transfer(run: Profile) -> Iterator[str]:
    yield (
        f"batches take {figure(run.stages['transfer'])} ms to reach the device: return smaller dtypes (uint8 images, "
        f"scaled on the device), and set data.workers=1 or more, which uses pinned memory"
    )


def _compute(run: Profile) -> Iterator[str]:
    part = run.share("forward") + run.share("backward")
    spent = f"forward and backward take {_percent(part)} of the time"
    if run.utilization is not None and run.utilization < BUSY * part:
        yield (
            f"{spent}, but the device is busy for only {_percent(run.utilization)} of the time: overhead per "
            f"micro-batch, or other programs on the machine; larger micro-batches (measure them with launcher tune) "
            f"or train.compile=true reduce the overhead"
        )
        return
    limits = ": compute is the bottleneck" if run.bottleneck in ("forward", "backward") else ""
    yield (
        f"{spent}, {figure((run.stages['forward'] + run.stages['backward']) / run.samples * 1e3)} us per sample"
        f"{limits}; to reduce it, set train.compile=true, on a GPU train.precision=bf16, or use more workers"
    )


def _sync(run: Profile) -> Iterator[str]:
    yield (
        f"each update waits {figure(run.stages['sync'])} ms for other workers, not overlapped with the backward pass: "
        f"batch.accumulation=2 halves the number of all-reduces per sample, at twice the batch size"
    )


def _optimizer(run: Profile) -> Iterator[str]:
    yield (
        f"the optimizer's step takes {figure(run.stages['optimizer'])} ms, independent of the batch size "
        f"({count(run.batch)}): more samples per update (batch.per_device, batch.accumulation) reduce its cost "
        f"per sample"
    )


def _checkpoint(run: Profile) -> Iterator[str]:
    yield f"saving takes {_percent(run.share('checkpoint'))} of the time: raise checkpoint.every to save less often"


def _other(run: Profile) -> Iterator[str]:
    yield (
        f"{_percent(run.share('other'))} of the time is spent outside the stages, mostly validation: "
        f"raise train.validate_every to validate less often"
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
            f"the others wait for rank {run.slow_rank}: its {stage} takes {figure(slow)} ms, the fastest rank's "
            f"{figure(quick)} ms; check that machine, or set elastic.balance=true to give it fewer samples"
        )


def _memory(run: Profile) -> Iterator[str]:
    if run.alloc_retries > 0:
        yield (
            f"the CUDA allocator ran out of memory and retried {count(run.alloc_retries)} times: lower "
            f"batch.per_device, and raise batch.accumulation to keep the batch size"
        )
    if run.major_faults >= THRASHES:
        yield (
            f"each update reads {count(run.major_faults)} pages from disk: the machine's memory is full, or data is "
            f"read through mmap; lower batch.per_device, or request more memory"
        )


def _noise(run: Profile) -> Iterator[str]:
    if run.noise is None:
        return
    swing = f"; the loss varies by {figure(run.loss[1])} around {figure(run.loss[0])}" if run.loss else ""
    if run.noise > 1:
        yield (
            f"the gradient noise scale is at least {run.noise:.3g} times the batch size of {count(run.batch)}{swing}: "
            f"gradients are mostly noise, so a larger batch needs fewer updates"
        )


def _restarts(run: Profile) -> Iterator[str]:
    if run.recovery_s or run.lost_samples:
        yield (
            f"restarts took {took(run.recovery_s)}, and {count(run.lost_samples)} samples were trained on again: "
            f"lower checkpoint.every to lose less work"
        )


def _worlds(run: Profile) -> Iterator[str]:
    """Scaling efficiency between the smallest and the largest world size of one run."""
    if len(run.worlds) < 2:
        return
    (small, slow), (large, fast) = run.worlds[0], run.worlds[-1]
    kept = fast / large / (slow / small)
    yield (
        f"from {small} to {large} workers, samples/s went from {rate(slow)} to {rate(fast)}: scaling efficiency "
        f"{_percent(kept)}, {figure(run.stages.get('sync', 0.0))} ms of waiting for other workers per update"
    )
