"""Tuning advice for one run, derived from its measured metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from launcher.system.formatting import format_count, format_duration, format_number, format_rate

if TYPE_CHECKING:
    from launcher.analysis.run_profile import RunProfile

__all__ = ["STAGE_DESCRIPTIONS", "advise_on_run"]

#: A stage below this share of the wall time gets no advice unless it is the largest one.
MIN_STAGE_SHARE = 0.15
#: The device counts as idle if its utilization is below this fraction of the share of forward and backward.
MIN_DEVICE_BUSY_SHARE = 0.7
#: CPU utilization of data loading: from the first value up decoding is the limit, from the second down storage is.
CPU_BOUND_UTILIZATION, STORAGE_BOUND_UTILIZATION = 0.7, 0.4
#: Major page faults per update from which memory counts as full; with enough memory there are none after warmup.
MIN_MAJOR_FAULTS = 1.0
#: Stragglers are reported if the slowest rank takes longer than the fastest by this share of the update.
MIN_STRAGGLER_GAP = 0.15

STAGE_DESCRIPTIONS = {
    "data": "waiting for data",
    "transfer": "moving batches to the device",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "sync": "waiting for other workers",
    "optimizer": "the optimizer's step",
    "checkpoint": "saving",
    "other": "everything else (validation, logging)",
}


def advise_on_run(run: RunProfile) -> Iterator[str]:
    """Yield advice on the largest stages first, then on stragglers, memory, noise, restarts and scaling."""
    used = set()  # forward and backward share an adviser
    for stage in sorted(run.stages, key=run.stages.__getitem__, reverse=True):
        adviser = _ADVISERS_BY_STAGE[stage]
        if adviser not in used and (stage == run.bottleneck or run.share(stage) >= MIN_STAGE_SHARE):
            used.add(adviser)
            yield from adviser(run)
    yield from _advise_on_straggler(run)
    yield from _advise_on_memory(run)
    yield from _advise_on_noise(run)
    yield from _advise_on_restarts(run)
    yield from _advise_on_scaling(run)


def _format_rate_without(run: RunProfile, stage: str) -> str:
    """Samples/s the run could reach if the stage took no time."""
    return format_rate(run.samples_per_s * run.wall_ms / max(run.wall_ms - run.stages[stage], 1e-9))


def _format_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _advise_on_data(run: RunProfile) -> Iterator[str]:
    yield (
        f"each update waits {format_number(run.stages['data'])} ms for data; without that wait throughput could reach "
        f"{_format_rate_without(run, 'data')} samples/s: {_describe_loaders(run.loader_cpu)}; "
        f"run with data.source=synthetic to measure training without data loading"
    )


def _describe_loaders(cpu_share: float | None) -> str:
    """Advice for slow loading, by whether it is limited by the CPU or by storage."""
    if cpu_share is None or STORAGE_BOUND_UTILIZATION < cpu_share < CPU_BOUND_UTILIZATION:
        return "raise data.num_workers"
    if cpu_share >= CPU_BOUND_UTILIZATION:
        return (
            f"loading uses the CPU for {_format_percent(cpu_share)} of its time (decoding, augmentation), "
            f"so raise data.num_workers up to one per free core, or preprocess the data"
        )
    return (
        f"loading uses the CPU for {_format_percent(cpu_share)} of its time and waits for storage otherwise: "
        f"use a local disk, fewer and larger files, or more data.num_workers to overlap the waits"
    )


def _advise_on_transfer(run: RunProfile) -> Iterator[str]:
    yield (
        f"batches take {format_number(run.stages['transfer'])} ms to reach the device: return smaller dtypes "
        f"(uint8 images, scaled on the device), and set data.num_workers=1 or more, which uses pinned memory"
    )


def _advise_on_compute(run: RunProfile) -> Iterator[str]:
    share = run.share("forward") + run.share("backward")
    spent = f"forward and backward take {_format_percent(share)} of the time"
    if run.utilization is not None and run.utilization < MIN_DEVICE_BUSY_SHARE * share:
        yield (
            f"{spent}, but the device is busy for only {_format_percent(run.utilization)} of the time: overhead per "
            f"micro-batch, or other programs on the machine; larger micro-batches (measure them with launcher tune) "
            f"or train.compile=true reduce the overhead"
        )
        return
    microseconds = (run.stages["forward"] + run.stages["backward"]) / run.samples * 1e3
    verdict = ": compute is the bottleneck" if run.bottleneck in ("forward", "backward") else ""
    yield (
        f"{spent}, {format_number(microseconds)} us per sample{verdict}; to reduce it, set train.compile=true, "
        f"on a GPU train.precision=bf16{', or use more workers' if run.has_free_cores else ''}"
    )


def _advise_on_sync(run: RunProfile) -> Iterator[str]:
    yield (
        f"each update waits {format_number(run.stages['sync'])} ms for other workers, "
        f"not overlapped with the backward pass: batch.accumulation=2 halves the number of all-reduces per sample, "
        f"at twice the batch size"
    )


def _advise_on_optimizer(run: RunProfile) -> Iterator[str]:
    yield (
        f"the optimizer's step takes {format_number(run.stages['optimizer'])} ms, independent of the batch size "
        f"({format_count(run.batch)}): more samples per update (batch.per_device, batch.accumulation) reduce its cost "
        f"per sample"
    )


def _advise_on_checkpoint(run: RunProfile) -> Iterator[str]:
    share = _format_percent(run.share("checkpoint"))
    yield f"saving takes {share} of the time: raise checkpoint.every to save less often"


def _advise_on_other_time(run: RunProfile) -> Iterator[str]:
    yield (
        f"{_format_percent(run.share('other'))} of the time is spent outside the stages, mostly validation: "
        f"raise train.validate_every to validate less often"
    )


_ADVISERS_BY_STAGE: Mapping[str, Callable[[RunProfile], Iterator[str]]] = {
    "data": _advise_on_data,
    "transfer": _advise_on_transfer,
    "forward": _advise_on_compute,
    "backward": _advise_on_compute,
    "sync": _advise_on_sync,
    "optimizer": _advise_on_optimizer,
    "checkpoint": _advise_on_checkpoint,
    "other": _advise_on_other_time,
}


def _advise_on_straggler(run: RunProfile) -> Iterator[str]:
    local = {stage: gap for stage, gap in run.gaps.items() if stage in ("data", "transfer", "forward", "backward")}
    if run.slow_rank is None or not local:
        return
    stage = max(local, key=lambda name: local[name][0] - local[name][1])
    slowest, fastest = local[stage]
    if slowest - fastest > MIN_STRAGGLER_GAP * run.wall_ms:
        yield (
            f"the others wait for rank {run.slow_rank}: its {stage} takes {format_number(slowest)} ms, "
            f"the fastest rank's {format_number(fastest)} ms; check that machine, "
            f"or set elastic.balance=true to give it fewer samples"
        )


def _advise_on_memory(run: RunProfile) -> Iterator[str]:
    if run.alloc_retries > 0:
        yield (
            f"the CUDA allocator ran out of memory and retried {format_count(run.alloc_retries)} times: lower "
            f"batch.per_device, and raise batch.accumulation to keep the batch size"
        )
    if run.major_faults >= MIN_MAJOR_FAULTS:
        yield (
            f"each update reads {format_count(run.major_faults)} pages from disk: the machine's memory is full, "
            f"or data is read through mmap; lower batch.per_device, or request more memory"
        )


def _advise_on_noise(run: RunProfile) -> Iterator[str]:
    if run.noise is None:
        return
    spread = (
        f"; the loss varies by {format_number(run.loss[1])} around {format_number(run.loss[0])}" if run.loss else ""
    )
    if run.noise > 1:
        yield (
            f"the gradient noise scale is at least {run.noise:.3g} times the batch size of "
            f"{format_count(run.batch)}{spread}: gradients are mostly noise, so a larger batch needs fewer updates"
        )


def _advise_on_restarts(run: RunProfile) -> Iterator[str]:
    if run.recovery_s or run.lost_samples:
        yield (
            f"restarts took {format_duration(run.recovery_s)}, and {format_count(run.lost_samples)} samples were "
            f"trained on again: lower checkpoint.every to lose less work"
        )


def _advise_on_scaling(run: RunProfile) -> Iterator[str]:
    """Scaling efficiency between the smallest and the largest world size of one run."""
    if len(run.worlds) < 2:
        return
    (small, slow), (large, fast) = run.worlds[0], run.worlds[-1]
    efficiency = fast / large / (slow / small)
    yield (
        f"from {small} to {large} workers, samples/s went from {format_rate(slow)} to {format_rate(fast)}: "
        f"scaling efficiency {_format_percent(efficiency)}, "
        f"{format_number(run.stages.get('sync', 0.0))} ms of waiting for other workers per update"
    )
