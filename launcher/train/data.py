"""Load this rank's micro-batches in timeline order and move them to its device.

One batch sampler serves the whole run. It follows the same timeline as the training loop, so neither loader processes
nor prefetching change which samples are consumed, and a restart needs only the position.
"""

from __future__ import annotations

import copy
import multiprocessing.context
import os
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, Sampler

from launcher.config.schema import DataConfig, RunConfig
from launcher.distributed.cleanup_process import use_private_temp_dir
from launcher.errors import UsageError
from launcher.plan.sample_order import SamplePermutation, permute_spans
from launcher.plan.timeline import Position, Span, Timeline
from launcher.recipe import check_map_style
from launcher.system.processes import die_with_parent, read_cpu_seconds
from launcher.train.loader_errors import raise_explained, send_errors_of_unsent_batches
from launcher.train.seeded_dataset import EpochSamples, SeededDataset, get_collate_fn

__all__ = [
    "MicroBatchLoader",
    "MicroBatchSampler",
    "get_dataset",
    "make_data_loader",
    "to_device",
]


class MicroBatchSampler(Sampler[list[EpochSamples]]):
    """Yields this rank's micro-batches from a position to the end of the run, as lists of (epoch, samples).

    The order of the samples is computed ahead for about `LOOK_AHEAD` samples, since many at a time are faster.
    """

    LOOK_AHEAD = 4096

    def __init__(self, timeline: Timeline, seed: int, rank: int, position: Position) -> None:
        self._timeline = timeline
        self._seed = seed
        self._rank = rank
        self._position = position

    def __iter__(self) -> Iterator[list[EpochSamples]]:
        batches: list[tuple[Span, ...]] = []
        samples = 0
        for update in self._timeline.iter_updates(self._position):
            for micro in update.micro_batches(self._rank):
                batches.append(micro.spans)
                samples += update.plan.per_device
            if samples >= self.LOOK_AHEAD:
                yield from self._order(batches)
                batches, samples = [], 0
        yield from self._order(batches)

    def _order(self, batches: list[tuple[Span, ...]]) -> Iterator[list[EpochSamples]]:
        """The samples at the positions of each batch."""
        spans_by_epoch: dict[int, list[tuple[int, int]]] = {}
        for epoch, start, stop in chain.from_iterable(batches):
            earlier = spans_by_epoch.setdefault(epoch, [])
            if earlier and earlier[-1][1] == start:
                start = earlier.pop()[0]
            earlier.append((start, stop))
        orders = [SamplePermutation(self._timeline.size, self._seed, epoch) for epoch in spans_by_epoch]
        samples = dict(zip(spans_by_epoch, permute_spans(orders, [*spans_by_epoch.values()]), strict=True))
        ends = dict.fromkeys(samples, 0)
        for spans in batches:
            parts: list[EpochSamples] = []
            for epoch, start, stop in spans:
                begin = ends[epoch]
                ends[epoch] = end = begin + stop - start
                parts.append((epoch, samples[epoch][begin:end]))
            yield parts


class LoaderProcess(multiprocessing.context.ForkProcess):
    """A loader process, which ignores SIGTERM: it is ended by SIGKILL."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  multiprocessing's name; at exit it terminates through this
        popen = multiprocessing.context.ForkProcess._Popen(process_obj)  # type: ignore[attr-defined]
        popen.terminate = popen.kill  # type: ignore[method-assign]
        return popen


class LoaderContext(multiprocessing.context.ForkContext):
    """The `fork` context of multiprocessing with `LoaderProcess`."""

    Process = LoaderProcess  # type: ignore[assignment]


def prepare_loader_process(_: int, parent: int) -> None:
    """Make a loader process exit with its rank, and ignore signals to the whole job, which the rank handles.

    The rank may still need it to save after SIGTERM. Programs that the dataset starts do not inherit these settings.
    """
    import signal

    die_with_parent(parent)
    send_errors_of_unsent_batches()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, lambda *_: None)


class InProcessLoader:
    """What a DataLoader without loader processes yields, with a tenth of its own time per batch."""

    def __init__(self, batches: SeededDataset, sampler: Iterable[list[Any]]) -> None:
        self._batches = batches
        self._sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        return map(self._batches.__getitems__, self._sampler)


def make_data_loader(
    batches: SeededDataset, sampler: Iterable[list[Any]], data: DataConfig, pin: bool
) -> DataLoader[Any] | InProcessLoader:
    """Create the loader of the batches that the sampler yields, with the configured loader processes."""
    if not data.num_workers and not pin:
        return InProcessLoader(batches, sampler)
    if data.num_workers:
        use_private_temp_dir()
    return DataLoader(
        batches,
        batch_sampler=sampler,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor if data.num_workers else None,
        persistent_workers=data.num_workers > 0,
        collate_fn=return_unchanged,
        pin_memory=pin,
        worker_init_fn=partial(prepare_loader_process, parent=os.getpid()) if data.num_workers else None,
        multiprocessing_context=LoaderContext() if data.num_workers else None,
    )


def return_unchanged(batch: Any) -> Any:
    return batch


def get_dataset(recipe: Any, split: str, source: str) -> Any:
    """The recipe's dataset, or synthetic data of the same shapes that costs nothing to read (`data.source=synthetic`).

    Raises:
        UsageError: the dataset lacks `__len__` or `__getitem__`.
    """
    own_synthetic = source == "synthetic" and hasattr(recipe, "synthetic")
    items = recipe.synthetic(split) if own_synthetic else recipe.dataset(split)
    check_map_style(recipe, split, items)
    return RepeatedSample(items[0], len(items)) if source == "synthetic" and not own_synthetic else items


class RepeatedSample(Dataset[Any]):
    """A dataset that repeats one item."""

    deterministic = True

    def __init__(self, item: Any, length: int) -> None:
        self._item = item
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._item


def to_device(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move the tensors of a batch to the device, casting float32 ones to the parameters' dtype.

    Containers, also of subclasses, and dataclasses keep their type; another object with a method `to` moves itself.
    """
    if isinstance(batch, torch.Tensor):
        target_dtype = dtype if batch.dtype == torch.float32 else batch.dtype
        if batch.is_cpu and device.type == "cpu" and batch.dtype == target_dtype:
            return batch
        return batch.to(device=device, dtype=target_dtype, non_blocking=True)
    if type(batch) is list or type(batch) is tuple:  # the usual case, without the slow checks for other kinds
        return type(batch)([to_device(value, device, dtype) for value in batch])
    if isinstance(batch, PackedSequence):  # its batch_sizes stay on the CPU
        moved = batch.to(device, non_blocking=True)  # type: ignore[arg-type]
        return moved._replace(data=to_device(moved.data, device, dtype))
    if isinstance(batch, Mapping):
        return rebuild_mapping(batch, {name: to_device(value, device, dtype) for name, value in batch.items()})
    if isinstance(batch, list | tuple):
        return rebuild_sequence(batch, [to_device(value, device, dtype) for value in batch])
    if isinstance(batch, type):
        return batch
    if callable(getattr(batch, "to", None)):
        moved = batch.to(device)
        batch = batch if moved is None else moved
    if is_dataclass(batch):
        return rebuild_dataclass(
            batch, {each.name: to_device(getattr(batch, each.name), device, dtype) for each in fields(batch)}
        )
    return batch


def rebuild_mapping(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """A mapping like `batch` with new values. A copy keeps what a constructor would lose, e.g. a default factory."""
    if type(batch) is dict:
        return values
    if not isinstance(batch, MutableMapping):
        return type(batch)(values)  # type: ignore[call-arg]
    moved = copy.copy(batch)
    moved.update(values)
    return moved


def rebuild_sequence(batch: list[Any] | tuple[Any, ...], values: list[Any]) -> Any:
    if isinstance(batch, tuple):
        return tuple.__new__(type(batch), values)
    if type(batch) is list:
        return values
    moved = copy.copy(batch)
    moved[:] = values
    return moved


def rebuild_dataclass(batch: Any, values: Mapping[str, Any]) -> Any:
    moved = copy.copy(batch)
    for name, value in values.items():
        object.__setattr__(moved, name, value)  # it may be frozen
    return moved


class LoaderCpuUsage:
    """CPU utilisation of data loading, in the loader processes or (data.num_workers=0) in this thread.

    A loader that computes (decodes, augments) has a share near 1, one that waits for storage a share near 0.
    """

    def __init__(self, processes: Sequence[int] = ()) -> None:
        self._processes = tuple(processes)
        self._cpu_s = self._wall_s = 0.0
        self._last_times = self._read_times()

    def __enter__(self) -> None:
        if not self._processes:
            self._wall_s -= time.perf_counter()
            self._cpu_s -= time.thread_time()

    def __exit__(self, *_: object) -> None:
        if not self._processes:
            self._wall_s += time.perf_counter()
            self._cpu_s += time.thread_time()

    def measure_share(self) -> float | None:
        """CPU time over elapsed time since the last call; None if nothing was loaded or CPU times are unavailable."""
        previous, self._last_times = self._last_times, self._read_times()
        if previous is None or self._last_times is None or self._last_times[1] <= previous[1]:
            return None
        return min(1.0, max(0.0, (self._last_times[0] - previous[0]) / (self._last_times[1] - previous[1])))

    def _read_times(self) -> tuple[float, float] | None:
        if not self._processes:
            return self._cpu_s, self._wall_s
        cpu_seconds = [read_cpu_seconds(process) for process in self._processes]
        readable = [seconds for seconds in cpu_seconds if seconds is not None]
        return (sum(readable), time.perf_counter() * len(cpu_seconds)) if len(readable) == len(cpu_seconds) else None


@dataclass(frozen=True)
class MicroBatchLoader:
    """This rank's micro-batches in order; `next_batch` waits only for data."""

    batches: Iterator[Any]
    loading: LoaderCpuUsage = field(default_factory=LoaderCpuUsage)

    def next_batch(self) -> Any:
        """Return the next micro-batch, on the host.

        Raises:
            UsageError: a sample cannot be read, or shared memory is too small; the message names it.
        """
        try:
            with self.loading:
                return next(self.batches)
        except (UsageError, RuntimeError, OSError) as error:
            raise_explained(error)
            raise

    @classmethod
    def from_dataset(
        cls,
        items: Any,
        recipe: Any,
        timeline: Timeline,
        position: Position,
        config: RunConfig,
        *,
        rank: int,
        pin: bool,
    ) -> MicroBatchLoader:
        """Load from `items` in the order of the timeline, from `position` on; `pin` copies batches to pinned memory."""
        sampler = MicroBatchSampler(timeline, config.seed, rank, position)
        dataset = SeededDataset(items, config.seed, get_collate_fn(recipe))
        batches = iter(make_data_loader(dataset, sampler, config.data, pin))
        return cls(batches, LoaderCpuUsage([process.pid for process in getattr(batches, "_workers", ())]))
