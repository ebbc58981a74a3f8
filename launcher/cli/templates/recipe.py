"""A custom recipe: model, data and loss. It trains unchanged; adapt it step by step.

launcher --config-dir mine recipe=my_recipe launch.workers=2    # values: mine/recipe/my_recipe.yaml
launcher verify --config-dir mine recipe=my_recipe              # check that splitting the batch keeps the gradient
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
    """The fields are the configuration of the recipe, e.g. `recipe.hidden=128`.

    A run resumes only with the fields that it was started with. One that does not alter what is learned may change:
    `data: str = field(default="data", metadata={"learned": False})`.
    """

    hidden: int = 64
    samples: int = 4000

    def model(self) -> nn.Module:
        """Build the model on every worker; the parameters of rank 0 are used. Do not move it to a device here."""
        return nn.Sequential(nn.Linear(2, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 2))

    def dataset(self, split: str) -> Dataset[Any]:
        """Return the "train" or "val" split: anything with len() and [i], identical on every worker."""
        samples, seed = (self.samples, 0) if split == "train" else (800, 1)
        points = torch.rand(samples, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        inside = (points.norm(dim=1) < 0.8).long()  # class 1: the point lies inside a disc
        return TensorDataset(points, inside)

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        """Return sums over the samples, never means: the launcher divides once by the global count.

        `batch` holds collated items of the data set. Metrics are sums too: divided by the count of the whole validation
        set, this one is logged as `val/accuracy`.
        """
        points, inside = batch
        outputs = model(points)
        total = nn.functional.cross_entropy(outputs, inside, reduction="sum")
        return Loss(total, len(inside), {"accuracy": (outputs.argmax(1) == inside).sum()})

    # Optional members: uncomment what you need.

    # def size(self, split: str) -> int:  # if opening the data is slow: `launcher plan` then skips it
    #     return self.samples if split == "train" else 800

    # tokens_per_sample = 1024  # for language models: allows train.duration=1e9tok, logs tokens/s

    # def count(self, batch: Any) -> int:  # for strategy=deepspeed, if Loss counts anything but samples
    #     return int((batch[1] >= 0).sum())

    # def collate(self, items: list[Any]) -> Any:  # if default_collate cannot batch items, e.g. of different lengths
    #     return torch.utils.data.default_collate(items)

    # def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:  # for learning rates or weight decay per group
    #     return [{"params": list(model.parameters()), "weight_decay": 0.0}]

    # def synthetic(self, split: str) -> Dataset[Any]:  # for data.source=synthetic; default: the first item, repeated
    #     return self.dataset(split)
