"""The `plan` output of the goodput policy: the arithmetic of math.md on known update times."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from launcher.config.schema import PlanConfig
from launcher.goodput.measured_noise import MeasuredNoise
from launcher.goodput.plan_table import goodput_plan_document, goodput_plan_text
from tests.helpers.update_times import RUN, SIZES, compute_update_s, make_chooser

KNOWN = MeasuredNoise(500.0, 400.0, 650.0, "a run")


def test_plan_row_values_match_model() -> None:
    found = goodput_plan_document(make_chooser(), SIZES, KNOWN, "1, 2, 4 workers")
    row = found["plans"][1]
    assert (row["world"], row["feasible"]) == (2, True)
    assert row["samples_per_s"] == pytest.approx(
        row["global"] / compute_update_s(row["per_device"], 2, row["accumulation"]), rel=0.05
    )
    assert row["efficiency"] == pytest.approx((500 + 64) / (500 + row["global"]))
    assert row["goodput"] == pytest.approx(row["samples_per_s"] * row["efficiency"])
    assert row["seconds"] == pytest.approx(10 * SIZES.train / row["goodput"])
    assert row["device_hours"] == pytest.approx(2 * row["seconds"] / 3600)
    for name in ("", "goodput_", "seconds_", "device_hours_"):
        value = row["samples_per_s"] if not name else row[name.removesuffix("_")]
        assert row[f"{name}low"] < value < row[f"{name}high"]


def test_plan_ends_at_twice_measured_workers() -> None:
    found = goodput_plan_document(make_chooser(), SIZES, KNOWN, "")
    assert [row["world"] for row in found["plans"]] == list(range(1, 9))
    assert "nothing is predicted past 8 workers" in found["why"]
    config = replace(RUN, plan=PlanConfig(world_sizes=(8, 9)))
    rows = goodput_plan_document(make_chooser(config=config), SIZES, KNOWN, "")["plans"]
    assert [row["feasible"] for row in rows] == [True, False]
    assert "9 workers are beyond twice the 4 measured" in rows[1]["why"]


def test_plan_names_last_world_size_that_pays() -> None:
    """With a small noise scale a large batch gains nothing, and more workers only wait for each other."""
    few = goodput_plan_document(make_chooser(), SIZES, MeasuredNoise(5.0, 5.0, 5.0, "plan.noise"), "")
    assert few["pays_to"] < 8
    assert f"more than {few['pays_to']} workers do not pay off" in few["why"].replace("worker d", "workers d")
    goodputs = [row["goodput"] for row in few["plans"]]
    assert goodputs[few["pays_to"] - 1] >= 0.9 * max(goodputs)
    assert all(one < 0.9 * max(goodputs) for one in goodputs[: few["pays_to"] - 1])
    many = goodput_plan_document(make_chooser(), SIZES, MeasuredNoise(1e6, 1e6, 1e6, "plan.noise"), "")
    assert many["pays_to"] == 8
    assert many["why"].startswith("every worker up to 8 pays off")


def test_unknown_noise_is_stated_with_efficiency_one() -> None:
    found = goodput_plan_document(make_chooser(), SIZES, None, "")
    assert found["noise"] is None
    assert {row["efficiency"] for row in found["plans"]} == {1.0}
    assert "noise scale unknown" in goodput_plan_text(found)


def test_text_fits_80_columns() -> None:
    for noise in (None, KNOWN):
        text = goodput_plan_text(
            goodput_plan_document(make_chooser(), SIZES, noise, "1, 2, 4 workers on cpu, 2026-11-21 16:40 UTC")
        )
        assert max(map(len, text.splitlines())) <= 80
        json.dumps(goodput_plan_document(make_chooser(), SIZES, noise, ""))
