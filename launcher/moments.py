"""Rescale Adam's second moment when the batch changes: it estimates E[g²], which a larger batch makes smaller.

E[g²] is proportional to 1 + phi/B, with phi the noise scale (McCandlish 2018, arXiv 1812.06162). Without rescaling the
estimate would need 1/(1 - beta2) updates to adapt, with steps of the wrong length until then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.schedule import gain

__all__ = ["Moments"]


@dataclass(frozen=True)
class Moments:
    """The batch that the second moment corresponds to, during a transition from `start` to `target`.

    `done` is the completed part of the transition, 0 to 1. `noise` is the noise scale in samples known when the
    transition began; it stays fixed until the end. If it is None, it was unknown and the moment was not rescaled.
    """

    start: float
    target: int
    done: float = 1.0
    noise: float | None = None

    @property
    def batch(self) -> float:
        return self.start + (self.target - self.start) * self.done

    def toward(self, target: int, noise: float | None) -> Moments:
        """Start a transition to the batch `target` with this noise scale; no change if it is already the target."""
        if target == self.target:
            return self
        return Moments(self.batch, target, 0.0, noise) if noise is not None else Moments(target, target)

    def reached(self, done: float) -> Moments:
        """Advance the transition to `done`, in step with the learning rate's ramp; it never goes backwards."""
        return self if done <= self.done else replace(self, done=done)

    def factor(self, after: Moments) -> float:
        """Factor on the second moment to reach `after`: (1 + noise/after.batch) / (1 + noise/self.batch)."""
        return 1.0 if after.noise is None else gain(self.batch, after.batch, after.noise)

    def to_facts(self) -> dict[str, Any]:
        return vars(self).copy()

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Moments:
        return cls(**facts)
