"""batch.per_device=auto without measuring: the tuning configuration, how the result is used, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config import to_yaml
from launcher.errors import RequestError
from launcher.opening import decided, kept
from launcher.settings import BatchSettings, ElasticSettings, LrSettings, Run, TuneSettings
from launcher.study import Sizes, study
from launcher.tune import auto

RUN = Run(
    recipe={"_target_": "launcher.recipes.mlp.Mlp"},
    batch=BatchSettings(per_device="auto"),
    lr=LrSettings(base=0.1, base_batch=64),
    optimizer={"_target_": "torch.optim.SGD"},
)
SIZES = Sizes(1437, 360)
HERE = Path("nowhere")
FOUND: dict[str, Any] = {
    "recommended": 24,
    "why": "take batch.per_device=24: 11,000 samples/s, 92 % of what 64 reaches; the forward pass limits it",
    "world": 2,
    "spent_s": 12.3,
    "measured": "2026-11-21T16:40:00+00:00",
    "cached": False,
    "points": [{"per_device": 24}],
}


def test_only_auto_is_an_open_question() -> None:
    assert auto.is_open(RUN)
    assert not auto.is_open(replace(RUN, batch=BatchSettings(per_device=24)))


def test_one_line_says_what_was_taken_and_why() -> None:
    measured = auto.answered(RUN, FOUND, HERE)
    assert measured.run.batch.per_device == 24
    assert measured.why == (
        "batch.per_device=auto chose 24: 11,000 samples/s, 92 % of what 64 reaches on 2 workers, measured now in 12.3 s"
    )
    again = auto.answered(RUN, {**FOUND, "cached": True, "world": 1}, HERE)
    assert again.why.endswith("on 1 worker, stored on 2026-11-21 16:40 UTC")


def test_nothing_but_the_number_is_changed() -> None:
    typed = replace(RUN, batch=BatchSettings(per_device=24))
    assert auto.answered(RUN, FOUND, HERE).run == typed


def test_where_no_size_fits_it_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^batch\.per_device=auto: no size fits into memory"):
        auto.answered(RUN, {**FOUND, "recommended": None, "why": "no size fits into memory: a smaller model"}, HERE)


def test_measuring_takes_half_a_minute_unless_a_budget_is_given() -> None:
    assert auto.question(RUN).tune.budget_s == 30
    assert auto.question(replace(RUN, tune=TuneSettings(budget_s=3.0))).tune.budget_s == 3


def test_what_is_measured_knows_no_policy() -> None:
    held = replace(RUN, batch=BatchSettings(policy="hold", per_device="auto", global_batch=256, accumulation=4))
    assert auto.question(held).batch == BatchSettings(policy="scale", per_device=1, accumulation="auto")
    scaled = replace(RUN, batch=BatchSettings(per_device="auto", accumulation=4))
    assert auto.question(scaled).batch == BatchSettings(policy="scale", per_device=1, accumulation=4)


@pytest.mark.parametrize(
    "batch",
    [
        BatchSettings(per_device="auto"),
        BatchSettings(policy="hold", per_device="auto", global_batch=256, accumulation=4),
        BatchSettings(policy="bounded", per_device="auto", min_global=64, max_global=512),
    ],
    ids=lambda batch: batch.policy,
)
def test_a_number_stands_in_that_refuses_nothing_by_itself(batch: BatchSettings) -> None:
    run = replace(RUN, batch=batch)
    with pytest.raises(RequestError, match=r"^batch\.per_device=auto is only resolved when training starts"):
        study(run, SIZES, 2)
    study(auto.stood_in(run), SIZES, 2)


def test_shards_are_not_measured() -> None:
    exact = replace(RUN, elastic=ElasticSettings(exact=True))
    with pytest.raises(RequestError, match=r"^batch\.per_device=auto does not work with elastic\.exact=true"):
        auto.stood_in(exact)


# --- an existing run ----------------------------------------------------------------------------------------------


def test_a_run_that_has_a_number_keeps_it(tmp_path: Path) -> None:
    begun = replace(RUN, batch=BatchSettings(per_device=24))
    (tmp_path / "run.yaml").write_text(to_yaml(begun))
    assert kept(RUN, tmp_path).batch.per_device == 24
    assert decided(RUN, tmp_path)[0].batch.per_device == 24
    answer = auto.before(kept(RUN, tmp_path), tmp_path, 1, 1)
    assert answer is not None
    assert answer.run == begun
    assert answer.why == f"batch.per_device=auto is 24, read from {tmp_path}/run.yaml: nothing was measured"
    assert auto.before(RUN, tmp_path, 1, 1) is None


def test_a_new_run_beside_it_does_not(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(replace(RUN, batch=BatchSettings(per_device=24))))
    assert kept(replace(RUN, resume="never"), tmp_path).batch.per_device == "auto"
    assert kept(RUN, tmp_path / "none").batch.per_device == "auto"


# --- batch=goodput ------------------------------------------------------------------------------------------------

GOODPUT = replace(RUN, batch=BatchSettings(policy="goodput", per_device="auto"))


def measured(world: int) -> dict[str, Any]:
    points = [
        {
            "per_device": size,
            "samples_per_s": 100.0,
            "low": 99.0,
            "high": 101.0,
            "ms_per_update": 10.0 + size,
            "stages": {"sync": 1.0, "optimizer": 1.0, "other": 0.0},
            "label": "rising",
        }
        for size in (8, 16, 32)
    ]
    return {**FOUND, "world": world, "nodes": 1, "accumulation": 1, "points": points}


def test_what_was_measured_is_kept_in_the_runs_folder_and_asked_first(tmp_path: Path) -> None:
    answer = auto.answered(GOODPUT, measured(1), tmp_path)
    assert answer.run == GOODPUT
    assert (answer.profile or {})["cap"] == 32
    assert answer.why == "batch.policy=goodput: update times on 1 worker, measured now in 12.3 s"
    assert auto.before(answer.run, tmp_path, 1, 1) is None
    (tmp_path / auto.PROFILE).write_text(json.dumps(answer.profile))
    again = auto.before(answer.run, tmp_path, 1, 1)
    assert again is not None
    assert again.profile is not None
    assert json.dumps(again.profile) == json.dumps(answer.profile)


def test_more_workers_than_were_measured_for_are_measured_and_added(tmp_path: Path) -> None:
    first = auto.answered(GOODPUT, measured(1), tmp_path)
    (tmp_path / auto.PROFILE).write_text(json.dumps(first.profile))
    assert auto.before(first.run, tmp_path, 2, 1) is None
    both = auto.answered(first.run, measured(2), tmp_path)
    (tmp_path / auto.PROFILE).write_text(json.dumps(both.profile))
    assert auto.before(first.run, tmp_path, 4, 1) is not None
    assert auto.before(first.run, tmp_path, 5, 1) is None


def test_a_damaged_profile_of_a_run_is_measured_anew(tmp_path: Path) -> None:
    answer = auto.answered(GOODPUT, measured(1), tmp_path)
    for text in ("", "{", "[]", json.dumps({**(answer.profile or {}), "cap": 0})):
        (tmp_path / auto.PROFILE).write_text(text)
        assert auto.before(answer.run, tmp_path, 1, 1) is None


def test_before_the_first_choice_it_is_the_base_batch() -> None:
    planned = study(GOODPUT, SIZES, 3)
    assert (planned.policy, planned.plan.global_batch) == ("goodput", 64)
