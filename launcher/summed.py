"""Whether a recipe's loss is a sum, as it has to be: seen once, in what autograd recorded of the first one.

A mean is divided by the number of samples once more, and trains at a rate that many times too small without a word.
Nothing is computed for this, and loss() is not called again. `launcher verify` finds also what this does not see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launcher.recipe import Loss

__all__ = ["Watched", "doubt"]

#: What may lie between a mean and the loss without making a sum of it.
PASSING = ("AddBackward", "ToCopyBackward", "AliasBackward", "ViewBackward", "SqueezeBackward", "NegBackward")
MEAN = 1  # as torch's losses number their reductions: none, mean, sum


class Watched:
    """A recipe whose first loss in training is looked at; all that it gives is the recipe's own.

    `tell` is called with what is wrong with it, if anything is.
    """

    def __init__(self, recipe: Any, tell: Callable[[str], None]) -> None:
        self._recipe = recipe
        self._tell: Callable[[str], None] | None = tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recipe, name)

    def loss(self, model: Any, batch: Any) -> Loss:
        found: Loss = self._recipe.loss(model, batch)
        if self._tell is not None:
            tell, self._tell = self._tell, None
            why = doubt(found)
            if why is not None:
                tell(f"loss() of {type(self._recipe).__name__} {why}")
        return found


def doubt(loss: Loss) -> str | None:
    """What makes a mean of it, as the end of a sentence; None where nothing does, or it counts a single sample.

    A mean times the number of samples is a sum. So is one over what belongs to a sample, summed over samples.
    """
    count = float(loss.count)
    by = mean_in(getattr(loss.total, "grad_fn", None), count) if count > 1 else None
    if by is None:
        return None
    return (
        f"returns a mean ({by}) and counts {count:g}: return sums, not means (reduction='sum'), or the gradient is "
        "too small by that count; launcher verify shows it"
    )


def mean_in(node: Any, count: float) -> str | None:
    """The name of the operation that takes the mean last, none where something else comes after it."""
    if node is None:
        return None
    name, before = node.name(), [part for part, _ in node.next_functions if part is not None]
    if name.startswith("MeanBackward"):  # over what is left where the samples are added up already, it makes no mean
        return None if any(map(adds_samples, before)) else str(name)
    if getattr(node, "_saved_reduction", None) == MEAN:
        return str(name)
    if name.startswith("DivBackward"):
        divisor = getattr(node, "_saved_other", None)
        alike = divisor is not None and divisor.numel() == 1 and float(divisor) == count
        alike = alike and count > 2  # half the squares is no mean, though there be two of them
        return f"{name} by {count:g}" if alike else None
    if not name.startswith(PASSING):
        return None
    parts = [mean_in(part, count) for part in before]
    return parts[0] if parts and all(parts) else None


def adds_samples(node: Any) -> bool:
    """Whether it is a sum over everything, or over the first dimension."""
    return bool(node.name() == "SumBackward0" or 0 in getattr(node, "_saved_dim", ()))
