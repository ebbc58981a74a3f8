"""Rescale Adam's second moment when the batch changes: it estimates E[g²], which a larger batch makes smaller.

E[g²] is proportional to 1 + phi/B, with phi the noise scale (McCandlish 2018, arXiv 1812.06162). Without rescaling the
estimate would need 1/(1 - beta2) updates to adapt, with steps of the wrong length until then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.plan.lr_schedule import noise_gain

__all__ = ["SecondMomentScale"]


@dataclass(frozen=True)
class SecondMomentScale:
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

    def start_transition(self, target: int, noise: float | None) -> SecondMomentScale:
        """Start a transition to the batch `target` with this noise scale; no change if it is already the target."""
        if target == self.target:
            return self
        return (
            SecondMomentScale(self.batch, target, 0.0, noise)
            if noise is not None
            else SecondMomentScale(target, target)
        )

    def advance(self, done: float) -> SecondMomentScale:
        """Advance the transition to `done`, in step with the learning rate's ramp; it never goes backwards."""
        return self if done <= self.done else replace(self, done=done)

    def compute_factor(self, after: SecondMomentScale) -> float:
        """Factor on the second moment to reach `after`: (1 + noise/after.batch) / (1 + noise/self.batch)."""
        return 1.0 if after.noise is None else noise_gain(self.batch, after.batch, after.noise)

    def to_facts(self) -> dict[str, Any]:
        return vars(self).copy()

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> SecondMomentScale:
        return cls(**facts)
