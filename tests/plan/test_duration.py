"""Durations: accepted syntax, conversion to samples, and refusals."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import UsageError
from launcher.plan.duration import Duration, Units

UNITS = Units(epoch=1000, base_batch=256, tokens_per_sample=128, duration=50_000)


@pytest.mark.parametrize(
    ("text", "samples"),
    [
        ("10ep", 10_000),
        ("500ba", 128_000),
        ("50000sp", 50_000),
        ("1e6tok", 7813),  # 7812.5 is rounded up to a whole sample
        ("0.05dur", 2500),
        ("0.1ep", 100),  # in floating point 0.1 is slightly more than a tenth, which would give 101
        ("0.7ep", 700),
        ("1.5 ep", 1500),
        ("1EP", 1000),
        (".5ep", 500),
        ("0ep", 0),
        ("0e999999999ep", 0),
        ("0.0001ep", 1),
    ],
)
def test_duration_converts_to_samples(text: str, samples: int) -> None:
    assert Duration.parse(text, "train.duration").samples(UNITS) == samples


@pytest.mark.parametrize(("text", "seconds"), [("10s", 10), ("10min", 600), ("2h", 7200), ("0.5h", 1800)])
def test_time_converts_to_seconds_where_allowed(text: str, seconds: float) -> None:
    duration = Duration.parse(text, "checkpoint.every", seconds=True)
    assert duration.seconds == seconds
    with pytest.raises(UsageError, match=r"checkpoint\.every=.*is a time"):
        duration.samples(UNITS)


def test_duration_in_epochs_has_no_seconds() -> None:
    assert Duration.parse("1ep", "checkpoint.every", seconds=True).seconds is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("-1ep", "is negative"),
        ("infep", "is not finite"),
        ("-infep", "is not finite"),
        ("nanep", "is not finite"),
        ("inf", "is not finite"),
        ("10", "has no unit"),
        ("10xx", "has the unknown unit xx"),
        ("10min", "is a time"),
        ("ep", "is not a number and a unit"),
        ("", "is not a number and a unit"),
        ("1 0ep", "is not a number and a unit"),
        ("1e999999999ep", "is out of range"),
        ("1e-999999999ep", "is out of range"),
        ("1e99999999999999999999ep", "is out of range"),
    ],
)
def test_invalid_duration_is_refused_with_fix(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        Duration.parse(text, "schedule.warmup")
    message = str(caught.value)
    assert message.startswith(f"schedule.warmup={text} {reason}")
    assert "type 10ep, 500ba, 50000sp, 1e9tok or 0.05dur" in message
    assert "\n" not in message


def test_tokens_need_tokens_per_sample() -> None:
    with pytest.raises(UsageError, match=r"train\.duration=1e\+09tok needs a recipe with tokens_per_sample"):
        Duration.parse("1e9tok", "train.duration").samples(Units(epoch=1000, base_batch=256))


def test_duration_in_its_own_unit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"train\.duration=0\.5dur would be a share of itself"):
        Duration.parse("0.5dur", "train.duration").samples(Units(epoch=1000, base_batch=256))


@given(st.integers(0, 10**9), st.integers(0, 6), st.integers(1, 10**9))
def test_decimal_epochs_convert_exactly(digits: int, places: int, epoch: int) -> None:
    text = f"{digits}e-{places}ep"
    samples = Duration.parse(text, "train.duration").samples(Units(epoch=epoch, base_batch=1))
    assert samples == math.ceil(Fraction(digits, 10**places) * epoch)


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_conversion_to_samples_is_monotonic(a: int, b: int) -> None:
    short, long = sorted((a, b))
    tokens = [Duration.parse(f"{n}tok", "train.duration").samples(UNITS) for n in (short, long)]
    assert tokens == sorted(tokens)


@given(st.text(max_size=12) | st.from_regex(r"[0-9.e+-]{0,9}[a-z]{0,3}", fullmatch=True))
def test_any_other_text_is_refused_in_one_line(text: str) -> None:
    refusal = get_refusal(text)
    assert refusal is None or (refusal.startswith("train.duration=") and len(refusal.splitlines()) == 1)


def get_refusal(text: str) -> str | None:
    try:
        Duration.parse(text, "train.duration")
    except UsageError as refusal:
        return str(refusal)
    return None
