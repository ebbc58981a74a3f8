"""Validation over all ranks: every sample is counted exactly once, at any world size and remainder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler

from launcher.config.schema import DataConfig
from launcher.strategies.interface import ReplicaProtocol
from launcher.strategies.precision import Precision
from launcher.train.data import SampleKey, SeededDataset, get_collate_fn, make_data_loader, to_device

__all__ = ["Validator"]


class ValidationSampler(Sampler[list[SampleKey]]):
    """This rank's contiguous chunks of the validation set in batches, none of which spans two chunks.

    `chunks` holds the chunk of each batch, None for a padding batch of one sample, which is not counted. A rank without
    samples has one padding batch; with `even`, ranks are padded to the same number of batches.
    """

    def __init__(self, size: int, rank: int, world: int, chunks: int, batch: int, *, even: bool = False) -> None:
        cuts = [make_batch_ranges(size, one, world, chunks, batch) for one in range(world)]
        pads = max(1, max(map(len, cuts)) if even else 0) - len(cuts[rank])
        self.chunks: list[int | None] = [chunk for chunk, _, _ in cuts[rank]] + [None] * pads
        self._batches = [(start, stop) for _, start, stop in cuts[rank]] + [(0, 1)] * pads

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for start, stop in self._batches:
            yield [(0, sample) for sample in range(start, stop)]


def make_batch_ranges(size: int, rank: int, world: int, chunks: int, batch: int) -> list[tuple[int, int, int]]:
    """Return (chunk, start, stop) of each batch of a rank."""
    own = range(chunks)[chunks * rank // world : chunks * (rank + 1) // world]
    ends = [(chunk, size * chunk // chunks, size * (chunk + 1) // chunks) for chunk in own]
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
        *,
        rank: int,
        world: int,
        chunks: int,
        batch: int,
        seed: int,
        data: DataConfig,
        precision: Precision,
        even: bool = False,
    ) -> None:
        self._recipe = recipe
        self._world = world
        self._precision = precision
        self._chunks = chunks
        self._slice = ValidationSampler(len(items), rank, world, chunks, batch, even=even)
        self._batches: DataLoader[Any] = make_data_loader(
            SeededDataset(items, seed), self._slice, data, get_collate_fn(recipe), precision.device.type == "cuda"
        )

    @torch.no_grad()
    def run(self, replica: ReplicaProtocol) -> dict[str, float]:
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
        found = {name: sum(row) for name, row in zip(names, table.tolist(), strict=True)}
        count = found.pop("count")
        return {f"val/{name}": value / count for name, value in found.items()}

    def _compute_sums(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The per-chunk sums of each value, with zeros for the chunks of other ranks."""
        sums: dict[str, torch.Tensor] = {}
        for chunk, batch in zip(self._slice.chunks, self._batches, strict=True):
            batch = to_device(batch, self._precision.device, self._precision.dtype)
            with self._precision.autocast():
                loss = self._recipe.loss(model, batch)
            for name, value in {"loss": loss.total, "count": loss.count, **loss.metrics}.items():
                number = torch.as_tensor(value, device=self._precision.device).detach().double()
                row = sums.setdefault(name, number.new_zeros(self._chunks))
                if chunk is not None:
                    row[chunk] += number
        return sums
