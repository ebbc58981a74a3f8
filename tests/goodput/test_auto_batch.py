"""batch.per_device=auto without measuring: the tuning configuration, how the result is used, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config.compose import to_yaml
from launcher.config.schema import BatchConfig, ElasticConfig, LrConfig, RunConfig, TuneConfig
from launcher.errors import UsageError
from launcher.goodput import auto_batch
from launcher.plan.training_plan import DatasetSizes, make_training_plan
from launcher.run_dir.open_run import resolve_directory, reuse_resolved_batch
from launcher.run_dir.run_directory import RunDirectory

RUN = RunConfig(
    recipe={"_target_": "launcher.recipes.mlp.Mlp"},
    batch=BatchConfig(per_device="auto"),
    lr=LrConfig(base=0.1, base_batch=64),
    optimizer={"_target_": "torch.optim.SGD"},
)
SIZES = DatasetSizes(1437, 360)
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


def test_only_auto_needs_measurement() -> None:
    assert auto_batch.needs_measurement(RUN)
    assert not auto_batch.needs_measurement(replace(RUN, batch=BatchConfig(per_device=24)))


def test_choice_is_explained_in_one_line() -> None:
    resolved = auto_batch.apply_tuning_result(RUN, FOUND, HERE)
    assert resolved.config.batch.per_device == 24
    assert resolved.why == (
        "batch.per_device=auto chose 24: 11,000 samples/s, 92 % of what 64 reaches on 2 workers, measured now in 12.3 s"
    )
    again = auto_batch.apply_tuning_result(RUN, {**FOUND, "cached": True, "world": 1}, HERE)
    assert again.why.endswith("on 1 worker, stored on 2026-11-21 16:40 UTC")


def test_tuning_result_changes_only_per_device() -> None:
    typed = replace(RUN, batch=BatchConfig(per_device=24))
    assert auto_batch.apply_tuning_result(RUN, FOUND, HERE).config == typed


def test_no_fitting_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^batch\.per_device=auto: no size fits into memory"):
        auto_batch.apply_tuning_result(
            RUN, {**FOUND, "recommended": None, "why": "no size fits into memory: a smaller model"}, HERE
        )


def test_default_tuning_budget_is_30_seconds() -> None:
    assert auto_batch.tuning_config(RUN).tune.budget_s == 30
    assert auto_batch.tuning_config(replace(RUN, tune=TuneConfig(budget_s=3.0))).tune.budget_s == 3


def test_tuning_config_drops_the_policy() -> None:
    held = replace(RUN, batch=BatchConfig(policy="hold", per_device="auto", global_batch=256, accumulation=4))
    assert auto_batch.tuning_config(held).batch == BatchConfig(policy="scale", per_device=1, accumulation="auto")
    scaled = replace(RUN, batch=BatchConfig(per_device="auto", accumulation=4))
    assert auto_batch.tuning_config(scaled).batch == BatchConfig(policy="scale", per_device=1, accumulation=4)


@pytest.mark.parametrize(
    "batch",
    [
        BatchConfig(per_device="auto"),
        BatchConfig(policy="hold", per_device="auto", global_batch=256, accumulation=4),
        BatchConfig(policy="bounded", per_device="auto", min_global=64, max_global=512),
    ],
    ids=lambda batch: batch.policy,
)
def test_placeholder_batch_passes_planning(batch: BatchConfig) -> None:
    config = replace(RUN, batch=batch)
    with pytest.raises(UsageError, match=r"^batch\.per_device=auto is only resolved when training starts"):
        make_training_plan(config, SIZES, 2)
    make_training_plan(auto_batch.with_placeholder_batch(config), SIZES, 2)


def test_auto_is_refused_with_exact_mode() -> None:
    exact = replace(RUN, elastic=ElasticConfig(exact=True))
    with pytest.raises(UsageError, match=r"^batch\.per_device=auto does not work with elastic\.exact=true"):
        auto_batch.with_placeholder_batch(exact)


# --- an existing run ----------------------------------------------------------------------------------------------


def test_existing_run_keeps_its_batch(tmp_path: Path) -> None:
    existing = replace(RUN, batch=BatchConfig(per_device=24))
    (tmp_path / "run.yaml").write_text(to_yaml(existing))
    (tmp_path / "checkpoints" / "update-00000001").mkdir(parents=True)
    assert reuse_resolved_batch(RUN, tmp_path).batch.per_device == 24
    assert resolve_directory(RUN, tmp_path)[0].batch.per_device == 24
    answer = auto_batch.from_existing_run(reuse_resolved_batch(RUN, tmp_path), tmp_path, 1, 1)
    assert answer is not None
    assert answer.config == existing
    assert answer.why == f"batch.per_device=auto is 24, read from {tmp_path}/run.yaml: nothing was measured"
    assert auto_batch.from_existing_run(RUN, tmp_path, 1, 1) is None


def test_new_run_does_not_reuse_batch(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(replace(RUN, batch=BatchConfig(per_device=24))))
    assert reuse_resolved_batch(replace(RUN, resume="never"), tmp_path).batch.per_device == "auto"
    assert reuse_resolved_batch(RUN, tmp_path / "none").batch.per_device == "auto"


# --- batch=goodput ------------------------------------------------------------------------------------------------

GOODPUT = replace(RUN, batch=BatchConfig(policy="goodput", per_device="auto"))


def make_tuning_result(world: int) -> dict[str, Any]:
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


def test_profile_is_stored_in_run_folder_and_reused(tmp_path: Path) -> None:
    answer = auto_batch.apply_tuning_result(GOODPUT, make_tuning_result(1), tmp_path)
    assert answer.config == GOODPUT
    assert (answer.profile or {})["cap"] == 32
    assert answer.why == "batch.policy=goodput: update times on 1 worker, measured now in 12.3 s"
    assert auto_batch.from_existing_run(answer.config, tmp_path, 1, 1) is None
    RunDirectory(tmp_path).profile_json.write_text(json.dumps(answer.profile))
    again = auto_batch.from_existing_run(answer.config, tmp_path, 1, 1)
    assert again is not None
    assert again.profile is not None
    assert json.dumps(again.profile) == json.dumps(answer.profile)


def test_larger_world_size_is_measured_and_merged(tmp_path: Path) -> None:
    first = auto_batch.apply_tuning_result(GOODPUT, make_tuning_result(1), tmp_path)
    RunDirectory(tmp_path).profile_json.write_text(json.dumps(first.profile))
    assert auto_batch.from_existing_run(first.config, tmp_path, 2, 1) is None
    both = auto_batch.apply_tuning_result(first.config, make_tuning_result(2), tmp_path)
    RunDirectory(tmp_path).profile_json.write_text(json.dumps(both.profile))
    assert auto_batch.from_existing_run(first.config, tmp_path, 4, 1) is not None
    assert auto_batch.from_existing_run(first.config, tmp_path, 5, 1) is None


def test_damaged_profile_is_measured_again(tmp_path: Path) -> None:
    answer = auto_batch.apply_tuning_result(GOODPUT, make_tuning_result(1), tmp_path)
    for text in ("", "{", "[]", json.dumps({**(answer.profile or {}), "cap": 0})):
        RunDirectory(tmp_path).profile_json.write_text(text)
        assert auto_batch.from_existing_run(answer.config, tmp_path, 1, 1) is None


def test_goodput_policy_starts_at_base_batch() -> None:
    training_plan = make_training_plan(GOODPUT, SIZES, 3)
    assert (training_plan.policy, training_plan.batch_plan.global_batch) == ("goodput", 64)
