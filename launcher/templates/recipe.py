"""A recipe of one's own: what to train, on what. It trains as it is; change one thing after the other.

launcher --config-dir mine recipe=my_recipe launch.workers=2    # its values: mine/recipe/my_recipe.yaml
launcher verify --config-dir mine recipe=my_recipe              # does splitting the batch change nothing?
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from launcher.recipe import Loss


@dataclass(frozen=True)
class MyRecipe:
    """Its fields are its configuration: `recipe.hidden=128`."""

    hidden: int = 64
    samples: int = 4000

    def model(self) -> nn.Module:
        """Made on every worker; the parameters of the first one count. Nothing is moved to a device here."""
        return nn.Sequential(nn.Linear(2, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 2))

    def dataset(self, split: str) -> Dataset[Any]:
        """`split` is "train" or "val". Anything with len() and [i], the same on every worker."""
        samples, seed = (self.samples, 0) if split == "train" else (800, 1)
        points = torch.rand(samples, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        inside = (points.norm(dim=1) < 0.8).long()  # a disc: is the point on it?
        return TensorDataset(points, inside)

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        """Sums over the samples, never means: the launcher divides, once. `batch` is a batch of the data set's items.

        A metric is a sum too; divided by the count of the whole validation set it is `val/accuracy`.
        """
        points, inside = batch
        outputs = model(points)
        total = nn.functional.cross_entropy(outputs, inside, reduction="sum")
        return Loss(total, len(inside), {"accuracy": (outputs.argmax(1) == inside).sum()})

    # What a recipe may have as well: take the # away from what you need.

    # def size(self, split: str) -> int:  # where opening the data takes long: `launcher plan` then need not
    #     return self.samples if split == "train" else 800

    # tokens_per_sample = 1024  # for language models: train.duration=1e9tok, and tokens per second

    # def count(self, batch: Any) -> int:  # where Loss counts anything but samples and strategy=deepspeed: its count
    #     return int((batch[1] >= 0).sum())

    # def collate(self, items: list[Any]) -> Any:  # where torch's default_collate cannot make a batch: other lengths
    #     return torch.utils.data.default_collate(items)

    # def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:  # where parameters want other rates or decays
    #     return [{"params": list(model.parameters()), "weight_decay": 0.0}]

    # def synthetic(self, split: str) -> Dataset[Any]:  # for data.source=synthetic: else its first item, repeated
    #     return self.dataset(split)
