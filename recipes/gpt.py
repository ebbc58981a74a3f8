"""A GPT-2-shaped language model on bytes: Python's own library sources, or your text (`recipe.data=PATH`)."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.recipes.digits import Batches

from launcher.errors import RequestError
from launcher.recipe import Loss

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Gpt"]

SUFFIXES = (".md", ".py", ".txt")


@dataclass(frozen=True)
class Gpt:
    """Radford 2019; `layers=12 heads=12 width=768 block=1024` is GPT-2 small. A sample is a block of text."""

    layers: int = 2
    heads: int = 4
    width: int = 64
    block: int = 64
    vocabulary: int = 256
    dropout: float = 0.0
    data: str | None = None
    text_bytes: int = 300_000
    validation_split: float = 0.1

    @property
    def tokens_per_sample(self) -> int:
        return self.block

    def model(self) -> nn.Module:
        from launcher.recipes.gpt_model import GptModel

        return GptModel(self.layers, self.heads, self.width, self.block, self.vocabulary, self.dropout)

    def dataset(self, split: str) -> Batches:
        """Blocks of tokens (n, block) and the token that follows each of them."""
        import torch

        text = torch.frombuffer(bytearray(self._text()), dtype=torch.uint8).long()
        blocks = (len(text) - 1) // self.block
        inputs = text[: blocks * self.block].reshape(blocks, self.block)
        targets = text[1 : blocks * self.block + 1].reshape(blocks, self.block)
        train = self._train_blocks(blocks)
        chosen = slice(train, blocks) if split == "val" else slice(0, train)
        return Batches(inputs[chosen], targets[chosen])

    def size(self, split: str) -> int:
        blocks = (len(self._text()) - 1) // self.block
        train = self._train_blocks(blocks)
        return blocks - train if split == "val" else train

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        from torch.nn.functional import cross_entropy

        tokens, following = batch
        logits = model(tokens)
        total = cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum")
        return Loss(total, following.numel(), {"accuracy": (logits.argmax(-1) == following).sum()})

    def _train_blocks(self, blocks: int) -> int:
        return blocks - int(blocks * self.validation_split + 0.5)

    def _text(self) -> bytes:
        """The first `text_bytes` of the files, in the order of their paths.

        Raises:
            RequestError: there is no such text, or too little for two blocks.
        """
        if self.vocabulary < 256:
            raise RequestError(f"recipe.vocabulary={self.vocabulary} is too small for bytes: type 256 or more")
        root = Path(self.data or sysconfig.get_paths()["stdlib"])
        if not root.exists():
            raise RequestError(f"recipe.data={self.data} is not there: name a text file or a folder of them")
        files = [root] if root.is_file() else sorted(p for p in root.glob("*") if p.suffix in SUFFIXES and p.is_file())
        text = b""
        for file in files:
            text += file.read_bytes()[: self.text_bytes - len(text)]
            if len(text) >= self.text_bytes:
                break
        if len(text) <= 2 * self.block:
            raise RequestError(
                f"recipe.data={root} holds {len(text)} bytes of text, too little for two blocks of {self.block}"
            )
        return text
