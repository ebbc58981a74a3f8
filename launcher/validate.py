"""Validation over all ranks: every sample once, whatever the number of workers or the remainder."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler

from launcher.data import Address, AddressedDataset, collate_of, loader, transfer
from launcher.optim import Precision
from launcher.settings import DataSettings
from launcher.strategies import Replica

__all__ = ["Validation"]


class Slice(Sampler[list[Address]]):
    """This rank's contiguous share of the validation set in batches; a rank without samples gets one, not counted."""

    def __init__(self, size: int, rank: int, world: int, batch: int) -> None:
        self.start, self.stop = size * rank // world, size * (rank + 1) // world
        self._batch = batch

    @property
    def counts(self) -> bool:
        return self.stop > self.start

    def __iter__(self) -> Any:
        stop = self.stop if self.counts else self.start + 1
        for start in range(self.start, stop, self._batch):
            yield [(0, sample) for sample in range(start, min(start + self._batch, stop))]


class Validation:
    """`measure` gives `val/loss` and one `val/<name>` per metric of the recipe: sums over ranks, divided once."""

    def __init__(
        self,
        items: Any,
        recipe: Any,
        *,
        rank: int,
        world: int,
        batch: int,
        seed: int,
        data: DataSettings,
        precision: Precision,
    ) -> None:
        self._recipe = recipe
        self._world = world
        self._precision = precision
        self._slice = Slice(len(items), rank, world, batch)
        self._batches: DataLoader[Any] = loader(
            AddressedDataset(items, seed), self._slice, data, collate_of(recipe), precision.device.type == "cuda"
        )

    @torch.no_grad()
    def measure(self, replica: Replica) -> dict[str, float]:
        replica.settle_buffers()
        model = replica.bare
        model.eval()
        try:
            sums = self._sums(model)
        finally:
            model.train()
        names = sorted(sums)
        totals = torch.stack([sums[name] for name in names])
        if self._world > 1:
            dist.all_reduce(totals)
        found = dict(zip(names, totals.tolist(), strict=True))
        count = found.pop("count")
        return {f"val/{name}": value / count for name, value in found.items()}

    def _sums(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        sums: dict[str, torch.Tensor] = {}
        for batch in self._batches:
            batch = transfer(batch, self._precision.device, self._precision.dtype)
            with self._precision.autocast():
                loss = self._recipe.loss(model, batch)
            for name, value in {"loss": loss.total, "count": loss.count, **loss.metrics}.items():
                number = torch.as_tensor(value, device=self._precision.device).detach().double()
                sums[name] = sums.get(name, torch.zeros_like(number)) + (number if self._slice.counts else 0.0)
        return sums
