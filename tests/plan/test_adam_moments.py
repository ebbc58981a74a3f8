"""Adam's second moment is rescaled with the batch: by a known noise scale, in step with the lr, only once."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.plan.adam_moments import SecondMomentScale

PHI = 100.0


def test_factor_is_the_ratio_of_expected_squares() -> None:
    """1 + 100/400 over 1 + 100/100."""
    before = SecondMomentScale(100, 100)
    after = before.start_transition(400, PHI).advance(1.0)
    assert before.compute_factor(after) == pytest.approx(1.25 / 2)


@given(st.lists(st.floats(0, 1), max_size=20), st.integers(1, 5000), st.integers(1, 5000), st.floats(0.1, 1e6))
def test_many_steps_multiply_to_one_step(steps: list[float], old: int, new: int, noise: float) -> None:
    here, product = SecondMomentScale(old, old), 1.0
    for done in [*sorted(steps), 1.0]:
        there = here.start_transition(new, noise).advance(done)
        here, product = there, product * here.compute_factor(there)
    assert product == pytest.approx((1 + noise / new) / (1 + noise / old), rel=1e-9)
    assert here.batch == pytest.approx(new)


def test_unknown_noise_scale_keeps_the_moment() -> None:
    left = SecondMomentScale(100, 100).start_transition(400, None).advance(0.2)
    assert (left.batch, SecondMomentScale(100, 100).compute_factor(left)) == (400, 1.0)
    later = left.start_transition(400, PHI).advance(0.6)
    assert left.compute_factor(later) == 1.0


def test_transition_never_goes_backwards() -> None:
    transition = SecondMomentScale(100, 100).start_transition(400, PHI).advance(0.5)
    assert transition.advance(0.1) is transition


def test_change_during_transition_starts_at_current_batch() -> None:
    half = SecondMomentScale(100, 100).start_transition(400, PHI).advance(0.5)
    assert (half.batch, half.start_transition(50, PHI).batch) == (250, 250)


def test_transition_survives_checkpoint_round_trip() -> None:
    half = SecondMomentScale(100, 100).start_transition(400, PHI).advance(0.5)
    assert SecondMomentScale.from_facts(json.loads(json.dumps(half.to_facts()))) == half
