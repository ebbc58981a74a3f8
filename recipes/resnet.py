"""A ResNet on scikit-learn's digits, or on your own folder of images (`recipe.data=PATH`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from launcher.recipes.digits import Batches, Digits
from launcher.recipes.images import ImageFolder, Images

from launcher.errors import UsageError
from launcher.recipe import Loss

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ResNet"]


@dataclass(frozen=True)
class ResNet:
    """ResNet-18, 34 or 50 (He 2015) for images of any size; its fields are the `recipe.` keys."""

    depth: Literal[18, 34, 50] = 18
    width: int = 16
    norm: Literal["batch", "group"] = "batch"
    stem: Literal["auto", "small", "large"] = "auto"
    data: str | None = field(default=None, metadata={"learned": False})
    image_size: int | tuple[int, int] | None = None
    augment: Literal["auto", "none"] = "auto"
    validation_split: float = 0.2
    split_seed: int = 0
    classes: int = 10
    subset: int | None = None

    def __post_init__(self) -> None:
        self._make_digits()  # validates the fields before anything starts
        if min(self._get_image_size()) < 1:
            raise UsageError(f"recipe.image_size={self.image_size} is not a size: type pixels, or [height,width]")
        if self.width < 1 or (self.norm == "group" and self.width % 8):
            raise UsageError(f"recipe.width={self.width} is out of range: type 16, or another multiple of 8")

    def model(self) -> nn.Module:
        from launcher.recipes.resnet_model import resnet

        channels, classes = (1, self.classes) if self.data is None else (3, len(self._make_folder().classes()))
        return resnet(self.depth, self.width, channels, classes, self.norm, large=self._has_large_stem())

    def dataset(self, split: str) -> Any:
        if self.data is None:
            return self._resize(self._make_digits().dataset(split))
        augment = split == "train" and self.augment != "none"
        return Images(self._make_folder().files(split), self._get_image_size(), augment)

    def size(self, split: str) -> int:
        return self._make_digits().size(split) if self.data is None else len(self._make_folder().files(split))

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        from torch.nn.functional import cross_entropy

        images, labels = batch
        logits = model(images)
        correct = (logits.argmax(1) == labels).sum()
        return Loss(cross_entropy(logits, labels, reduction="sum"), len(labels), {"accuracy": correct})

    def synthetic(self, split: str) -> Batches:
        """Data of the same shapes that repeats one random image; no files are read."""
        import torch

        channels = 1 if self.data is None else 3
        size = self.size(split)
        image = torch.randn(1, channels, *self._get_image_size(), generator=torch.Generator().manual_seed(0))
        return Batches(image.expand(size, -1, -1, -1), torch.zeros(size, dtype=torch.long))

    def _make_digits(self) -> Digits:
        return Digits(self.validation_split, self.split_seed, self.classes, self.subset)

    def _make_folder(self) -> ImageFolder:
        return ImageFolder(str(self.data), self.validation_split, self.split_seed)

    def _get_image_size(self) -> tuple[int, int]:
        size = (8 if self.data is None else 64) if self.image_size is None else self.image_size
        return (size, size) if isinstance(size, int) else size

    def _has_large_stem(self) -> bool:
        return self.stem == "large" or (self.stem == "auto" and min(self._get_image_size()) > 64)

    def _resize(self, digits: Batches) -> Batches:
        from torch.nn.functional import interpolate

        if self._get_image_size() == (8, 8):
            return digits
        return Batches(interpolate(digits.inputs, self._get_image_size(), mode="bilinear"), digits.targets)
