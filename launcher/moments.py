"""Adam's second moment where the batch changes: it estimates E[g²], which a larger batch makes smaller.

E[g²] is proportional to 1 + phi/B, phi the noise scale (McCandlish 2018, arXiv 1812.06162). Left alone, the estimate
would need 1/(1 - beta2) updates to get there, with steps of the wrong length until then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.schedule import gain

__all__ = ["Moments"]


@dataclass(frozen=True)
class Moments:
    """The batch that the second moment stands for: on its way from `start` to `target`, `done` of the way, 0 to 1.

    `noise` is the noise scale in samples that was known when the way began, and holds to its end. None: it was not
    known, and the moment was left as it is.
    """

    start: float
    target: int
    done: float = 1.0
    noise: float | None = None

    @property
    def batch(self) -> float:
        return self.start + (self.target - self.start) * self.done

    def toward(self, target: int, noise: float | None) -> Moments:
        """On the way to another batch, by this noise scale; the same where it is no other."""
        if target == self.target:
            return self
        return Moments(self.batch, target, 0.0, noise) if noise is not None else Moments(target, target)

    def reached(self, done: float) -> Moments:
        """So much of the way, in step with the rate's ramp; never back."""
        return self if done <= self.done else replace(self, done=done)

    def factor(self, after: Moments) -> float:
        """What the moment is multiplied by to get to `after`: (1 + noise/batch there) / (1 + noise/batch here)."""
        return 1.0 if after.noise is None else gain(self.batch, after.batch, after.noise)

    def to_facts(self) -> dict[str, Any]:
        return vars(self).copy()

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Moments:
        return cls(**facts)
