"""scikit-learn's digits: 1,797 images of 8 x 8 pixels, read from its package. Nothing is downloaded."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError
from launcher.plan.sample_order import SamplePermutation

if TYPE_CHECKING:
    import torch

__all__ = ["Batches", "Digits"]

IMAGES = 1797
PIXEL_MEAN, PIXEL_STD = 4.884, 6.017


@lru_cache(maxsize=1)
def load_table() -> Any:
    """All rows: 64 pixels from 0 to 16, and the label. Read without importing scikit-learn, which would take 1.5 s."""
    import numpy

    spec = find_spec("sklearn")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0]) / "datasets" / "data" / "digits.csv.gz" if folders else None
    if path is None or not path.exists():
        raise UsageError("the digits data set needs scikit-learn: pip install scikit-learn")
    with gzip.open(path, "rt") as file:
        return numpy.loadtxt(file, delimiter=",", dtype=numpy.float32)


class Batches:
    """In-memory samples returned as whole batches: no collating, and no seeding since nothing is random."""

    deterministic = True

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A complete batch, which the loader passes on without collating."""
        return self.inputs[list(indices)], self.targets[list(indices)]


@dataclass(frozen=True)
class Digits:
    """Selection of the digits: the first `classes` of them, split by `split_seed`, the first `subset` for training."""

    validation_split: float = 0.2
    split_seed: int = 0
    classes: int = 10
    subset: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.validation_split < 1:
            raise UsageError(f"recipe.validation_split={self.validation_split} is not a share below 1: type e.g. 0.2")
        if not 2 <= self.classes <= 10:
            raise UsageError(f"recipe.classes={self.classes}: the digits have 10: type recipe.classes=10, or 2 to 9")
        if self.subset is not None and self.subset < 1:
            raise UsageError(f"recipe.subset={self.subset} leaves no training samples: type 1 or more, or null")

    def rows(self, split: str) -> list[int]:
        """Row numbers of `train` or `val`; the same on every machine."""
        labels = load_table()[:, 64]
        shuffled = [row for row in SamplePermutation(IMAGES, self.split_seed, 0)[:] if labels[row] < self.classes]
        held_out = self._num_held_out(len(shuffled))
        train = len(shuffled) - held_out
        return shuffled[train:] if split == "val" else shuffled[:train][: self.subset]

    def size(self, split: str) -> int:
        if self.classes == 10:  # the labels need not be read
            held_out = self._num_held_out(IMAGES)
            train = IMAGES - held_out
            return held_out if split == "val" else min(train, train if self.subset is None else self.subset)
        return len(self.rows(split))

    def dataset(self, split: str) -> Batches:
        """Images of shape (n, 1, 8, 8), centred and scaled, and their labels."""
        import torch

        rows = torch.from_numpy(load_table()[self.rows(split)])
        images = (rows[:, :64] - PIXEL_MEAN) / PIXEL_STD
        return Batches(images.reshape(-1, 1, 8, 8), rows[:, 64].long())

    def _num_held_out(self, rows: int) -> int:
        return ceil(rows * self.validation_split)
