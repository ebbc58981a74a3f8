"""Validation over all ranks: every sample is counted exactly once, at any world size and remainder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from launcher.errors import TrainingFailed
from launcher.plan.training_plan import TrainingPlan
from launcher.recipe import Loss
from launcher.strategies.interface import Replica
from launcher.strategies.precision import Precision
from launcher.topology import Topology
from launcher.train.data import make_data_loader, to_device
from launcher.train.loader_errors import iter_explaining_errors
from launcher.train.loss_values import get_metrics, read_scalar
from launcher.train.micro_batches import seed_generators
from launcher.train.modes import evaluation_mode
from launcher.train.seeded_dataset import EpochSamples, SeededDataset, get_collate_fn
from launcher.train.seeding import VALIDATION_STREAM, derive_seed

__all__ = ["ValidationResult", "Validator"]


class ValidationSampler(Sampler[list[EpochSamples]]):
    """This rank's contiguous chunks of the validation set in batches, none of which spans two chunks.

    `chunks` holds the chunk of each batch, None for a padding batch of one sample, which is not counted. A rank without
    samples has one padding batch; with `even`, ranks are padded to the same number of batches.
    """

    def __init__(self, size: int, rank: int, world: int, chunks: int, batch: int, *, even: bool = False) -> None:
        ranges = [make_batch_ranges(size, each_rank, world, chunks, batch) for each_rank in range(world)]
        pads = max(1, max(map(len, ranges)) if even else 0) - len(ranges[rank])
        self.chunks: list[int | None] = [chunk for chunk, _, _ in ranges[rank]] + [None] * pads
        self._batches = [(start, stop) for _, start, stop in ranges[rank]] + [(0, 1)] * pads

    def __iter__(self) -> Iterator[list[EpochSamples]]:
        for start, stop in self._batches:
            yield [(0, list(range(start, stop)))]


def make_batch_ranges(size: int, rank: int, world: int, chunks: int, batch: int) -> list[tuple[int, int, int]]:
    """Return (chunk, start, stop) of each batch of a rank."""
    chunk_range = range(chunks)[chunks * rank // world : chunks * (rank + 1) // world]
    ends = [(chunk, size * chunk // chunks, size * (chunk + 1) // chunks) for chunk in chunk_range]
    return [(chunk, at, min(at + batch, stop)) for chunk, start, stop in ends for at in range(start, stop, batch)]


@dataclass(frozen=True)
class ValidationResult:
    """`val/loss` and one `val/<name>` per metric of the recipe; all are NaN if `count`, the loss count, is 0."""

    metrics: Mapping[str, float]
    count: float


class Validator:
    """Computes `val/loss` and one `val/<name>` per metric of the recipe: sums over ranks, divided once by the count.

    Each of the dataset's `chunks` is summed separately in double precision, then all chunks in order. The world size
    only decides which rank sums a chunk: with a fixed number of chunks the result does not depend on it. A metric that
    some batches or ranks lack is 0 there.
    """

    def __init__(
        self,
        items: Any,
        recipe: Any,
        training_plan: TrainingPlan,
        topology: Topology,
        precision: Precision,
    ) -> None:
        config, world = training_plan.config, topology.world
        batch, even = training_plan.batch_plan.per_device, training_plan.timeline.even
        self._recipe = recipe
        self._seed = config.seed
        self._world = world
        self._precision = precision
        self._chunks = config.elastic.shards if config.elastic.exact else world
        self._sampler = ValidationSampler(len(items), topology.rank, world, self._chunks, batch, even=even)
        dataset, pin = SeededDataset(items, config.seed, get_collate_fn(recipe)), precision.device.type == "cuda"
        self._batches: Iterable[Any] = make_data_loader(dataset, self._sampler, config.data, pin)

    @torch.no_grad()
    def run(self, replica: Replica) -> ValidationResult:
        """Validate on all ranks; every rank must call this.

        Raises:
            TrainingFailed: the recipe returned a loss, a count or a metric that cannot be summed; the message names it.
        """
        replica.broadcast_buffers()
        with evaluation_mode(replica.module):
            sums = self._compute_sums(replica)
        names = self._gather_metric_names(sums.metrics)
        table = torch.stack([sums.count, sums.loss, *(sums.get_metric(name) for name in names)])
        if self._world > 1:
            dist.all_reduce(table)  # each chunk is nonzero on one rank only: exact in any order
        count, *totals = (sum(row) for row in table.tolist())
        if not 0 <= count < math.inf:
            raise TrainingFailed(f"recipe.loss counted {count:g} in validation: return the number of samples or tokens")
        means = [total / count if count else math.nan for total in totals]
        return ValidationResult(
            {f"val/{name}": mean for name, mean in zip(["loss", *names], means, strict=True)}, count
        )

    @torch.no_grad()
    def measure_names(self, replica: Replica) -> set[str]:
        """The names of the metrics that the first batch of each rank has; every rank must call this."""
        replica.broadcast_buffers()
        batch, parts = next(iter_explaining_errors(self._batches)), next(iter(self._sampler))
        with evaluation_mode(replica.module):
            loss = self._compute_loss(replica, parts, batch)
        is_padding = self._sampler.chunks[0] is None
        return {f"val/{name}" for name in ("loss", *self._gather_metric_names(() if is_padding else get_metrics(loss)))}

    def _gather_metric_names(self, own: Iterable[str]) -> list[str]:
        """The names of the metrics of all ranks, in the same order on every rank."""
        names: list[Any] = [sorted(own)] * self._world
        if self._world > 1:
            dist.all_gather_object(names, names[0])
        return sorted(set(chain.from_iterable(names)))

    def _compute_sums(self, replica: Replica) -> ChunkSums:
        """The per-chunk sums of each value, with zeros for the chunks of other ranks."""
        sums = ChunkSums(self._chunks, self._precision.device)
        batches = iter_explaining_errors(self._batches)
        for chunk, parts, batch in zip(self._sampler.chunks, self._sampler, batches, strict=True):
            loss = self._compute_loss(replica, parts, batch)
            if chunk is not None:
                sums.add(chunk, loss)
        return sums

    def _compute_loss(self, replica: Replica, parts: list[EpochSamples], batch: Any) -> Loss:
        batch = to_device(batch, self._precision.device, self._precision.dtype)
        [(_, samples)] = parts
        seed_generators(derive_seed(self._seed, VALIDATION_STREAM, samples[0], len(samples)), self._precision.device)
        with self._precision.autocast():
            loss: Loss = replica.compute_loss(self._recipe.loss, batch)
        return loss


class ChunkSums:
    """Sums the losses, counts and metrics of this rank's batches per chunk, in double precision on the device."""

    def __init__(self, chunks: int, device: torch.device) -> None:
        self._zeros = torch.zeros(chunks, dtype=torch.float64, device=device)
        self.count, self.loss = self._zeros.clone(), self._zeros.clone()
        self.metrics: dict[str, torch.Tensor] = {}

    def get_metric(self, name: str) -> torch.Tensor:
        return self.metrics.get(name, self._zeros)

    def add(self, chunk: int, loss: Loss) -> None:
        """Add a batch. A batch that counts nothing may divide by its count: its NaN belongs to no sample and is 0.

        Raises:
            TrainingFailed: a value is not a number, or a metric's name cannot be used.
        """
        count = read_scalar(loss.count, "count", self._zeros.device)
        self.count[chunk] += count
        self._add(self.loss, chunk, read_scalar(loss.total, "total", self._zeros.device), count)
        for name, value in get_metrics(loss).items():
            row = self.metrics.setdefault(name, self._zeros.clone())
            self._add(row, chunk, read_scalar(value, f"the metric {name!r}", self._zeros.device), count)

    def _add(self, row: torch.Tensor, chunk: int, value: torch.Tensor, count: torch.Tensor) -> None:
        row[chunk] += torch.where((count == 0) & ~torch.isfinite(value), 0.0, value)
