"""A folder of images with one subfolder per class, in `train` and `val` or split by a hash of each file's path."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["ImageFolder", "Images"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFolder:
    """Folder of images. The split of a file depends on its path alone, so adding files does not move others."""

    path: str
    validation_split: float = 0.2
    split_seed: int = 0

    def classes(self) -> tuple[str, ...]:
        """The names of the class folders.

        Raises:
            UsageError: the folder does not exist or has no class folders.
        """
        root = Path(self.path)
        if not root.is_dir():
            raise UsageError(f"recipe.data={self.path} is not a folder: type a folder with one subfolder per class")
        base = root / "train" if self._is_presplit() else root
        names = list_class_folders(base)
        if not names:
            raise UsageError(f"recipe.data={self.path} has no class folders in {base}: add one subfolder per class")
        return names

    def files(self, split: str) -> list[tuple[str, int]]:
        """(file, class) of `train` or `val`, sorted.

        Raises:
            UsageError: a class has no images, or an image is not a regular file.
        """
        names = self.classes()
        self._refuse_unknown_classes(names)
        labelled: list[tuple[str, int]] = []
        for label, name in enumerate(names):
            files = self._list_class_images(split, name)
            if not files and split == "train":
                raise UsageError(f"recipe.data={self.path}: class {name} has no training images: add some or remove it")
            labelled += [(file, label) for file in files]
        return labelled

    def _list_class_images(self, split: str, name: str) -> list[str]:
        if self._is_presplit():
            return list(list_images(os.path.join(self.path, split, name)))
        return [file for file in list_images(os.path.join(self.path, name)) if self._get_split(file) == split]

    def _get_split(self, file: str) -> str:
        path = Path(os.path.relpath(file, self.path)).as_posix()
        digest = hashlib.blake2b(f"{self.split_seed}/{path}".encode(errors="surrogateescape"), digest_size=8).digest()
        return "val" if int.from_bytes(digest, "little") < self.validation_split * 2**64 else "train"

    def _is_presplit(self) -> bool:
        return (Path(self.path) / "train").is_dir()

    def _refuse_unknown_classes(self, names: tuple[str, ...]) -> None:
        """Refuse classes that exist only in `val`, which could not be learned."""
        held_out = Path(self.path) / "val"
        has_own_val = self._is_presplit() and held_out.is_dir()
        unknown = sorted(set(list_class_folders(held_out)) - set(names)) if has_own_val else []
        if unknown:
            raise UsageError(f"{held_out / unknown[0]} is a class that train/ does not have: remove it or add images")


def list_class_folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


@cache
def list_images(folder: str) -> tuple[str, ...]:
    """The images below a class folder, sorted. Cached, since the model, sizes and data sets all need them."""
    return tuple(sorted(iter_images(folder))) if os.path.isdir(folder) else ()


def iter_images(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(SUFFIXES):
                if not entry.is_file():
                    raise UsageError(f"{entry.path} is not a regular file: replace it with the image, or remove it")
                yield entry.path
            elif entry.is_dir(follow_symlinks=False):  # links could form a cycle
                yield from iter_images(entry.path)


class Images:
    """The images of one split, decoded on access: float32 of shape (3, height, width) and the class."""

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, files: list[tuple[str, int]], size: tuple[int, int], augment: bool) -> None:
        self._files = files
        self._size = size
        self._augment = augment
        self.deterministic = not augment

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Decode one image.

        Raises:
            UsageError: the file cannot be read as an image.
        """
        import numpy
        import torch
        from PIL import Image

        path, label = self._files[index]
        height, width = self._size
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
            raise UsageError(f"{path} cannot be read as an image ({problem}): fix or remove it") from problem
        box = draw_crop_box(*image.size) if self._augment else None
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        pixels = torch.from_numpy(numpy.asarray(image, dtype=numpy.float32) / 255).permute(2, 0, 1)
        if self._augment and float(torch.rand(())) < 0.5:
            pixels = pixels.flip(2)
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (self.MEAN, self.STD))
        return (pixels - mean) / std, label


def draw_crop_box(width: int, height: int) -> tuple[float, float, float, float]:
    """A random crop box with 35 to 100 % of the area and an aspect ratio of 3/4 to 4/3."""
    import torch

    share, ratio, across, down = torch.rand(4).tolist()
    area, ratio = width * height * (0.35 + 0.65 * share), (3 / 4) * (16 / 9) ** ratio
    w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    left, top = across * (width - w), down * (height - h)
    return left, top, left + w, top + h
