"""Load this rank's micro-batches in timeline order and move them to its device.

One batch sampler serves the whole run. It follows the same timeline as the training loop, so neither loader processes
nor prefetching change which samples are consumed, and a restart needs only the position.
"""

from __future__ import annotations

import copy
import hashlib
import multiprocessing.context
import os
import random
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from torch.utils.data.dataloader import default_collate

from launcher.config.schema import DataConfig, RunConfig
from launcher.distributed.cleanup_process import use_private_temp_dir
from launcher.errors import UsageError
from launcher.plan.sample_order import SamplePermutation
from launcher.plan.timeline import Position, Timeline
from launcher.recipe import check_map_style
from launcher.run_dir.failures import describe_error
from launcher.system.processes import die_with_parent, read_cpu_seconds
from launcher.train.loader_errors import explained_loader_errors, send_errors_of_unsent_batches

__all__ = [
    "DATASET_STREAM",
    "LOSS_CHECK_STREAM",
    "MODEL_STREAM",
    "VALIDATION_STREAM",
    "MicroBatchLoader",
    "MicroBatchSampler",
    "SampleKey",
    "SeededDataset",
    "derive_seed",
    "get_dataset",
    "make_data_loader",
    "seed_host_generators",
    "to_device",
]

SampleKey = tuple[int, int]  # (epoch, sample)

#: First numbers of the addresses of random draws other than those of a sample or a training micro-batch.
MODEL_STREAM, COLLATE_STREAM, DATASET_STREAM, VALIDATION_STREAM, LOSS_CHECK_STREAM = -1, -2, -3, -4, -5


def derive_seed(*numbers: int) -> int:
    """Derive a seed from all the numbers: random state is a function of the position, never carried over."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_host_generators(seed: int) -> None:
    """Seed the global generators of random, torch (the CPU's) and, where it is imported, numpy."""
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed & 0xFFFFFFFF)


class SeededDataset(Dataset[Any]):
    """A dataset indexed and seeded by (epoch, sample): the same item in any process, at any time.

    A batch leaves the generators seeded for its collate function, which the loader calls next in the same process.
    """

    def __init__(self, items: Any, seed: int) -> None:
        self._items = items
        self._seed = seed
        self._deterministic = isinstance(items, TensorDataset) or bool(getattr(items, "deterministic", False))

    def __getitems__(self, keys: Sequence[SampleKey]) -> Any:
        if self._deterministic and hasattr(self._items, "__getitems__"):
            items = self._items.__getitems__([sample for _, sample in keys])
        else:
            items = [self[key] for key in keys]
        seed_host_generators(derive_seed(self._seed, COLLATE_STREAM, *keys[0], len(keys)))
        return items

    def __getitem__(self, key: SampleKey) -> Any:
        if not self._deterministic:
            seed_host_generators(derive_seed(self._seed, *key))
        try:
            return self._items[key[1]]
        except UsageError:
            raise
        except (Exception, SystemExit) as problem:
            kind, why = type(problem).__name__, describe_error(problem)
            raise UsageError(f"sample {key[1]} cannot be read: {kind}: {why}; fix or remove it") from problem


class MicroBatchSampler(Sampler[list[SampleKey]]):
    """Yields this rank's micro-batches from a position to the end of the run, as lists of (epoch, sample) keys."""

    def __init__(self, timeline: Timeline, seed: int, rank: int, position: Position) -> None:
        self._timeline = timeline
        self._seed = seed
        self._rank = rank
        self._position = position

    def __iter__(self) -> Iterator[list[SampleKey]]:
        orders: dict[int, SamplePermutation] = {}
        for update in self._timeline.iter_updates(self._position):
            for micro in update.micro_batches(self._rank):
                keys: list[SampleKey] = []
                for epoch, start, stop in micro.spans:
                    if epoch not in orders:
                        orders = {epoch: SamplePermutation(self._timeline.size, self._seed, epoch)}
                    keys += [(epoch, sample) for sample in orders[epoch][start:stop]]
                yield keys


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


def make_data_loader(
    items: Dataset[Any], batches: Iterable[list[Any]], data: DataConfig, collate: Callable[..., Any], pin: bool
) -> DataLoader[Any]:
    """Create a DataLoader over predefined batches, with the configured loader processes."""
    if data.num_workers:
        use_private_temp_dir()
    return DataLoader(
        items,
        batch_sampler=batches,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor if data.num_workers else None,
        persistent_workers=data.num_workers > 0,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=partial(prepare_loader_process, parent=os.getpid()) if data.num_workers else None,
        multiprocessing_context=LoaderContext() if data.num_workers else None,
    )


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


def get_collate_fn(recipe: Any) -> Callable[..., Any]:
    return getattr(recipe, "collate", None) or collate_or_passthrough


def collate_or_passthrough(items: Any) -> Any:
    """Apply torch's default_collate to a list of items; pass a batch that the dataset already collated through."""
    return default_collate(items) if isinstance(items, list) else items


def to_device(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move the tensors of a batch to the device, casting float32 ones to the parameters' dtype.

    Containers, also of subclasses, and dataclasses keep their type; another object with a method `to` moves itself.
    """
    if isinstance(batch, torch.Tensor):
        target_dtype = dtype if batch.dtype == torch.float32 else batch.dtype
        return batch.to(device=device, dtype=target_dtype, non_blocking=True)
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
        self._wall_s -= time.perf_counter()
        self._cpu_s -= time.thread_time()

    def __exit__(self, *_: object) -> None:
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
        with explained_loader_errors(), self.loading:
            return next(self.batches)

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
        sampler, dataset = MicroBatchSampler(timeline, config.seed, rank, position), SeededDataset(items, config.seed)
        batches = iter(make_data_loader(dataset, sampler, config.data, get_collate_fn(recipe), pin))
        return cls(batches, LoaderCpuUsage([process.pid for process in getattr(batches, "_workers", ())]))
