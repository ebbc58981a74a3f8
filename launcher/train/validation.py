"""Validation over all ranks: every sample is counted exactly once, at any world size and remainder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler

from launcher.plan.training_plan import TrainingPlan
from launcher.strategies.interface import Replica
from launcher.strategies.precision import Precision
from launcher.topology import Topology
from launcher.train.data import SampleKey, SeededDataset, get_collate_fn, make_data_loader, to_device

__all__ = ["Validator"]


class ValidationSampler(Sampler[list[SampleKey]]):
    """This rank's contiguous chunks of the validation set in batches, none of which spans two chunks.

    `chunks` holds the chunk of each batch, None for a padding batch of one sample, which is not counted. A rank without
    samples has one padding batch; with `even`, ranks are padded to the same number of batches.
    """

    def __init__(self, size: int, rank: int, world: int, chunks: int, batch: int, *, even: bool = False) -> None:
        ranges = [make_batch_ranges(size, each_rank, world, chunks, batch) for each_rank in range(world)]
        pads = max(1, max(map(len, ranges)) if even else 0) - len(ranges[rank])
        self.chunks: list[int | None] = [chunk for chunk, _, _ in ranges[rank]] + [None] * pads
        self._batches = [(start, stop) for _, start, stop in ranges[rank]] + [(0, 1)] * pads

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for start, stop in self._batches:
            yield [(0, sample) for sample in range(start, stop)]


def make_batch_ranges(size: int, rank: int, world: int, chunks: int, batch: int) -> list[tuple[int, int, int]]:
    """Return (chunk, start, stop) of each batch of a rank."""
    chunk_range = range(chunks)[chunks * rank // world : chunks * (rank + 1) // world]
    ends = [(chunk, size * chunk // chunks, size * (chunk + 1) // chunks) for chunk in chunk_range]
    return [(chunk, at, min(at + batch, stop)) for chunk, start, stop in ends for at in range(start, stop, batch)]


class Validator:
    """Computes `val/loss` and one `val/<name>` per metric of the recipe: sums over ranks, divided once by the count.

    Each of the dataset's `chunks` is summed separately in double precision, then all chunks in order. The world size
    only decides which rank sums a chunk: with a fixed number of chunks the result does not depend on it.
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
        self._world = world
        self._precision = precision
        self._chunks = config.elastic.shards if config.elastic.exact else world
        self._sampler = ValidationSampler(len(items), topology.rank, world, self._chunks, batch, even=even)
        dataset, pin = SeededDataset(items, config.seed), precision.device.type == "cuda"
        self._batches: DataLoader[Any] = make_data_loader(
            dataset, self._sampler, config.data, get_collate_fn(recipe), pin
        )

    @torch.no_grad()
    def run(self, replica: Replica) -> dict[str, float]:
        replica.broadcast_buffers()
        model = replica.module
        model.eval()
        try:
            sums = self._compute_sums(model)
        finally:
            model.train()
        names = sorted(sums)
        table = torch.stack([sums[name] for name in names])
        if self._world > 1:
            dist.all_reduce(table)  # each chunk is nonzero on one rank only: exact in any order
        totals = {name: sum(row) for name, row in zip(names, table.tolist(), strict=True)}
        count = totals.pop("count")
        return {f"val/{name}": value / count for name, value in totals.items()}

    def _compute_sums(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The per-chunk sums of each value, with zeros for the chunks of other ranks."""
        sums: dict[str, torch.Tensor] = {}
        for chunk, batch in zip(self._sampler.chunks, self._batches, strict=True):
            batch = to_device(batch, self._precision.device, self._precision.dtype)
            with self._precision.autocast():
                loss = self._recipe.loss(model, batch)
            for name, value in {"loss": loss.total, "count": loss.count, **loss.metrics}.items():
                scalar = torch.as_tensor(value, device=self._precision.device).detach().double()
                row = sums.setdefault(name, scalar.new_zeros(self._chunks))
                if chunk is not None:
                    row[chunk] += scalar
        return sums
