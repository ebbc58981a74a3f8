"""A byte-level GPT-2 language model on Python's standard library sources, or on your text (`recipe.data=PATH`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.recipes.text import Blocks, Text

from launcher.errors import UsageError
from launcher.recipe import Loss

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Gpt"]


@dataclass(frozen=True)
class Gpt:
    """GPT-2 (Radford 2019); `layers=12 heads=12 width=768 block=1024` is GPT-2 small. A sample is a block of text."""

    layers: int = 2
    heads: int = 4
    width: int = 64
    block: int = 64
    vocabulary: int = 256
    dropout: float = 0.0
    data: str | None = field(default=None, metadata={"learned": False})
    text_bytes: int = 300_000
    validation_split: float = 0.1

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise UsageError(f"recipe.width={self.width} is not a multiple of recipe.heads={self.heads}: type one")
        if self.vocabulary < 256:
            raise UsageError(f"recipe.vocabulary={self.vocabulary} is too small for bytes: type 256 or more")
        if self.block < 1:
            raise UsageError(f"recipe.block={self.block} is below 1: type recipe.block=64")
        if not 0 <= self.validation_split < 1:
            raise UsageError(f"recipe.validation_split={self.validation_split} is not a share below 1: type e.g. 0.1")

    @property
    def tokens_per_sample(self) -> int:
        return self.block

    def model(self) -> nn.Module:
        from launcher.recipes.gpt_model import GptModel

        return GptModel(self.layers, self.heads, self.width, self.block, self.vocabulary, self.dropout)

    def dataset(self, split: str) -> Blocks:
        return self._make_text().blocks(split)

    def size(self, split: str) -> int:
        return self._make_text().size(split)

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        from torch.nn.functional import cross_entropy

        tokens, following = batch
        logits = model(tokens)
        total = cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum")
        return Loss(total, following.numel(), {"accuracy": (logits.argmax(-1) == following).sum()})

    def count(self, batch: Any) -> int:
        return batch[1].numel()

    def _make_text(self) -> Text:
        return Text(self.block, self.text_bytes, self.data, self.validation_split)
