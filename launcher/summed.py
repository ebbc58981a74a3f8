"""Whether a recipe's loss is a sum, as it has to be: looked at once, on the first samples that are trained.

A mean is divided by the number of samples once more, and trains at a rate that many times too small without a word.
`launcher verify` shows more, and exactly; this costs three passes over two samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from launcher.data import mapped
from launcher.recipe import Loss

__all__ = ["Watched", "doubt"]

CLOSE = 0.02  # as near as two passes in half precision may be


class Watched:
    """A recipe whose first loss in training is looked at. What it gives is the recipe's own, and untouched by that.

    `model` is the one that every pass may be made with alone, without the other ranks; `tell` is called with a doubt.
    """

    def __init__(self, recipe: Any, model: nn.Module, tell: Callable[[str], None]) -> None:
        self._recipe = recipe
        self._model = model
        self._tell = tell
        self._looked = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recipe, name)

    def loss(self, model: Any, batch: Any) -> Loss:
        found: Loss = self._recipe.loss(model, batch)
        if not self._looked:
            self._looked = True
            why = doubt(self._recipe, self._model, batch)
            if why is not None:
                self._tell(why)
        return found


def doubt(recipe: Any, model: nn.Module, batch: Any) -> str | None:
    """Why the loss is no sum over samples: two of them come to what they are on average. None where nothing says so.

    Nothing is said either of a batch that has fewer samples, whose tensors do not all have a row for each, or that the
    loss cannot be had of by ones and twos.
    """
    if rows_of(batch) < 2:
        return None
    model.eval()
    try:
        with torch.no_grad():
            first, second, both = (
                float(recipe.loss(model, cut(batch, start, stop)).total) for start, stop in ((0, 1), (1, 2), (0, 2))
            )
    except Exception:  # a look must not end what would have trained
        return None
    finally:
        model.train()
    if not math.isfinite(both) or not first + second or abs(both / (first + second) - 0.5) > CLOSE:
        return None
    return (
        f"loss() of {type(recipe).__name__} is no sum over samples: two have {both:.4g}, by themselves {first:.4g} and "
        f"{second:.4g}: return sums, not means (reduction='sum'), or the rate is too small by the size of the batch"
    )


def rows_of(batch: Any) -> int:
    """How many samples a batch has; 0 where its tensors disagree."""
    lengths: set[int] = set()

    def count(tensor: torch.Tensor) -> torch.Tensor:
        lengths.add(len(tensor) if tensor.dim() else 0)
        return tensor

    mapped(count, batch)
    return lengths.pop() if len(lengths) == 1 else 0


def cut(batch: Any, start: int, stop: int) -> Any:
    return mapped(lambda tensor: tensor[start:stop], batch)
