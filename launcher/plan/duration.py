"""Durations: a number and a unit, converted to samples once and counted in samples from then on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from launcher.errors import UsageError

__all__ = ["Duration", "Units"]

_FORMS = "10ep, 500ba, 50000sp, 1e9tok or 0.05dur"
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_UNITS = ("ep", "ba", "sp", "tok", "dur")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?inf(?:inity)?|[+-]?nan"
_TEXT = re.compile(rf"(?P<number>{_NUMBER}) ?(?P<unit>[a-z]*)", re.IGNORECASE)
_LARGEST_EXPONENT = 18  # larger numbers cannot be sample counts, and exact fractions would take too long


@dataclass(frozen=True)
class Units:
    """The size of each unit: samples per epoch, samples per base batch (`ba`), tokens per sample, samples of the run.

    `tokens_per_sample` is None if the recipe does not define it; `duration` is None while train.duration is read.
    """

    epoch: int
    base_batch: int
    tokens_per_sample: int | None = None
    duration: int | None = None


@dataclass(frozen=True)
class Duration:
    """An exact length of training: `value` in `unit`, one of ep, ba, sp, tok, dur or s (seconds)."""

    value: Fraction
    unit: str
    key: str = field(default="duration", compare=False)

    @classmethod
    def parse(cls, text: str, key: str, seconds: bool = False) -> Duration:
        """Parse `10ep`, `500ba`, `50000sp`, `1e9tok`, `0.05dur`; with `seconds` also `10s`, `10min`, `2h`.

        Raises UsageError naming `key` if the number is negative, infinite or NaN, or the unit is missing or unknown.
        """
        forms = f"{_FORMS}, or a time such as 10min" if seconds else _FORMS
        text = " ".join(str(text).split())  # an error message is one line
        match = _TEXT.fullmatch(text)
        if match is None:
            raise UsageError(f"{key}={text} is not a number and a unit: type {forms}")
        unit = match["unit"].lower()
        why = _describe_number_error(match["number"]) or _describe_unit_error(unit, seconds)
        if why:
            raise UsageError(f"{key}={text} {why}: type {forms}")
        value = Fraction(Decimal(match["number"]))
        if unit in _SECONDS:
            return cls(value * _SECONDS[unit], "s", key)
        return cls(value, unit, key)

    @property
    def seconds(self) -> float | None:
        """The duration in seconds if its unit is a time, otherwise None."""
        return float(self.value) if self.unit == "s" else None

    def samples(self, units: Units) -> int:
        """The duration in samples, rounded up, in exact arithmetic.

        Raises UsageError for `tok` if the recipe defines no tokens per sample, for `dur` in train.duration itself,
        and for a time, which cannot be converted to samples.
        """
        return math.ceil(self.value * self._compute_unit_samples(units))

    def _compute_unit_samples(self, units: Units) -> Fraction:
        if self.unit == "s":
            raise UsageError(f"{self} is a time, but this key is counted in samples: type {_FORMS}")
        if self.unit == "tok" and not units.tokens_per_sample:
            raise UsageError(f"{self} needs a recipe with tokens_per_sample: type epochs (10ep) or samples (50000sp)")
        if self.unit == "dur" and units.duration is None:
            raise UsageError(f"{self} would be a share of itself: type 10ep, 500ba, 50000sp or 1e9tok")
        worth = {"ep": units.epoch, "ba": units.base_batch, "sp": 1, "dur": units.duration or 0}
        return Fraction(1, units.tokens_per_sample or 1) if self.unit == "tok" else Fraction(worth[self.unit])

    def __str__(self) -> str:
        return f"{self.key}={float(self.value):g}{self.unit}"


def _describe_number_error(text: str) -> str:
    try:
        number = Decimal(text)
    except InvalidOperation:  # the exponent exceeds the range of Decimal
        return "is out of range"
    if not number.is_finite():
        return "is not finite"
    if number < 0:
        return "is negative"
    if number and abs(number.adjusted()) > _LARGEST_EXPONENT:
        return "is out of range"
    return ""


def _describe_unit_error(unit: str, seconds: bool) -> str:
    if not unit:
        return "has no unit"
    if unit in _SECONDS and not seconds:
        return "is a time, which only checkpoint.every accepts"
    if unit not in _UNITS and unit not in _SECONDS:
        return f"has the unknown unit {unit}"
    return ""
