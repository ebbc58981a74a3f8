"""One axis of a search space: an override with an interval, a range or a choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["SearchAxis"]


@dataclass(frozen=True)
class SearchAxis:
    """One key to search over: either `choices` as typed, or a range from `low` to `high`, both included."""

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: int = 1
    whole: bool = False
    log: bool = False

    @property
    def name(self) -> str:
        """The key without the + prefix of an added key."""
        return self.key.lstrip("+")

    def format_override(self, value: Any) -> str:
        """The override for a value; floats are rounded to six significant digits."""
        return f"{self.key}={value:.6g}" if isinstance(value, float) else f"{self.key}={value}"

    def list_extremes(self) -> list[str]:
        """Overrides to validate the axis with: every choice, or both ends of the range."""
        ends = (int(self.low), int(self.high)) if self.whole else (self.low, self.high)
        return [self.format_override(value) for value in self.choices or ends]

    def make_distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=self.step)
        return FloatDistribution(self.low, self.high, log=self.log)
