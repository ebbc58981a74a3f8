"""A small MLP on scikit-learn's digits, fast enough for full-batch training, batch size 1 and sweeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.recipes.digits import Batches, Digits

from launcher.recipe import Loss

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Mlp"]


@dataclass(frozen=True)
class Mlp:
    """`depth` hidden layers of `hidden` units, without normalisation; used to show full-batch training with Rprop."""

    hidden: int = 64
    depth: int = 2
    validation_split: float = 0.2
    split_seed: int = 0
    classes: int = 10
    subset: int | None = None

    def __post_init__(self) -> None:
        self._make_digits()  # validates the fields before anything starts

    def model(self) -> nn.Module:
        from torch import nn

        layers: list[nn.Module] = [nn.Flatten()]
        inputs = 64
        for _ in range(self.depth):
            layers += [nn.Linear(inputs, self.hidden), nn.ReLU()]
            inputs = self.hidden
        return nn.Sequential(*layers, nn.Linear(inputs, self.classes))

    def dataset(self, split: str) -> Batches:
        return self._make_digits().dataset(split)

    def size(self, split: str) -> int:
        return self._make_digits().size(split)

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        from torch.nn.functional import cross_entropy

        images, labels = batch
        logits = model(images)
        correct = (logits.argmax(1) == labels).sum()
        return Loss(cross_entropy(logits, labels, reduction="sum"), len(labels), {"accuracy": correct})

    def _make_digits(self) -> Digits:
        return Digits(self.validation_split, self.split_seed, self.classes, self.subset)
