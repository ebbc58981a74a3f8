"""Text as bytes: Python's standard library sources, or your own file or folder. Nothing is downloaded."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["Blocks", "Text"]

SUFFIXES = (".md", ".py", ".txt")


@dataclass(frozen=True)
class Text:
    """The first `limit` bytes of the files, cut into blocks of `block` + 1 bytes; the last blocks are held out."""

    block: int
    limit: int
    path: str | None = None
    validation_split: float = 0.1

    def size(self, split: str) -> int:
        """Number of blocks of `train` or `val`, computed from the file sizes.

        Raises:
            UsageError: the text does not exist, or is too short for a training and a validation block.
        """
        available = min(self.limit, sum(file.stat().st_size for file in self.files()))
        blocks = available // (self.block + 1)
        held_out = max(1, round(blocks * self.validation_split)) if self.validation_split else 0
        if blocks <= held_out:
            raise UsageError(
                f"recipe.data={self.root()} gives {available} bytes of text, too few for blocks of {self.block + 1}: "
                f"add more text, or type a smaller recipe.block"
            )
        return held_out if split == "val" else blocks - held_out

    def blocks(self, split: str) -> Blocks:
        import torch

        train, length = self.size("train"), self.block + 1
        chosen = slice(0, train) if split == "train" else slice(train, train + self.size("val"))
        text = bytearray(self.read())
        rows = torch.frombuffer(text, dtype=torch.uint8)[: len(text) // length * length].reshape(-1, length)
        return Blocks(rows[chosen].long())

    def read(self) -> bytes:
        text = bytearray()
        for file in self.files():
            with file.open("rb") as source:
                text += source.read(self.limit - len(text))
        return bytes(text)

    def root(self) -> Path:
        return Path(sysconfig.get_paths()["stdlib"] if self.path is None else self.path)

    def files(self) -> list[Path]:
        """The text files sorted by path; of a folder only its direct files, not those in subfolders."""
        root = self.root()
        if not root.is_file() and not root.is_dir():
            raise UsageError(f"recipe.data={self.path} does not exist: type a text file or a folder of text files")
        return [root] if root.is_file() else sorted(self._iter_text_files(root))

    def _iter_text_files(self, folder: Path) -> Iterator[Path]:
        for entry in folder.iterdir():
            if entry.suffix in (SUFFIXES if self.path is not None else (".py",)):
                if not entry.is_file():
                    raise UsageError(f"{entry} is not a regular file: replace it with the text, or remove it")
                yield entry


class Blocks:
    """In-memory blocks of bytes: (tokens, next tokens), both of shape (n, block)."""

    deterministic = True  # reading a block uses no random numbers

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = self.rows[index]
        return row[:-1], row[1:]

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A complete batch, which the loader passes on without collating."""
        rows = self.rows[list(indices)]
        return rows[:, :-1], rows[:, 1:]
