"""Where the noise scale of a plan comes from: a number, a named run, or the newest run of the recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config.schema import PlanConfig, RunConfig
from launcher.errors import UsageError
from launcher.goodput.measured_noise import MeasuredNoise, find_noise_scale, resolve_initial_noise
from tests.helpers.update_times import RUN

MLP = str(RUN.recipe["_target_"])


def write_run(folder: Path, recipe: str, *later: Mapping[str, float], **values: float) -> None:
    folder.mkdir(parents=True)
    first = {"time": 1.0, "samples": 64, "update": 1, "epoch": 0, "world": 1, "generation": 1, **values}
    rows = (first, *({**first, "time": 2.0, "samples": 128, "update": 2, **row} for row in later))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(f"recipe:\n  _target_: {recipe}\n")


def test_noise_comes_from_newest_run_of_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_noise_scale(RUN) is None
    noise_values = {"noise/scale": 300.0, "noise/scale_low": 200.0, "noise/scale_high": 500.0}
    write_run(tmp_path / "runs" / "other", "launcher.recipes.resnet.Resnet", **noise_values)
    write_run(tmp_path / "runs" / "unknown", MLP)
    assert find_noise_scale(RUN) is None
    write_run(tmp_path / "runs" / "one", MLP, **noise_values)
    assert find_noise_scale(RUN) == MeasuredNoise(300.0, 200.0, 500.0, "one")


def test_run_without_rows_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that failed before its first update leaves an empty metrics.jsonl, newer than the others."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "one", MLP, **{"noise/scale": 300.0})
    write_run(tmp_path / "runs" / "two", MLP)
    (tmp_path / "runs" / "two" / "metrics.jsonl").write_text("")
    found = find_noise_scale(RUN)
    assert found is not None
    assert found.source == "one"
    with pytest.raises(UsageError, match=r"^plan\.noise=.*metrics.jsonl has no rows"):
        find_noise_scale(config_with_noise("two"))


def test_class_of_the_same_name_in_another_module_is_another_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "theirs", "theirs.Mlp", **{"noise/scale": 300.0})
    assert find_noise_scale(RUN) is None
    with pytest.raises(UsageError, match=r"^plan\.noise=theirs: that run trained theirs\.Mlp, not"):
        find_noise_scale(config_with_noise("theirs"))


def test_noise_option_takes_number_or_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_noise_scale(config_with_noise(500.0)) == MeasuredNoise(500.0, 500.0, 500.0, "plan.noise")
    write_run(tmp_path / "runs" / "unknown", MLP)
    with pytest.raises(UsageError, match=r"^plan\.noise=unknown: that run has measured no noise scale"):
        find_noise_scale(config_with_noise("unknown"))
    with pytest.raises(UsageError, match=r"^plan\.noise=-1.0 is not a noise scale"):
        find_noise_scale(config_with_noise(-1.0))
    with pytest.raises(
        UsageError, match=r"^plan\.noise=nosuch is not a run: the most recent are unknown; or type a number"
    ):
        find_noise_scale(config_with_noise("nosuch"))
    write_run(tmp_path / "runs" / "other", "launcher.recipes.resnet.Resnet", **{"noise/scale": 300.0})
    with pytest.raises(UsageError, match=r"^plan\.noise=other: that run trained launcher.recipes.resnet.Resnet, not"):
        find_noise_scale(config_with_noise("other"))


def test_initial_noise_is_first_scale_of_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """run.yaml stores the number, so the other run may be deleted. `plan` uses that run's final value."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "one", MLP, {"noise/scale": 300.0}, **{"noise/scale": 60.0})
    assert find_noise_scale(config_with_noise("one")) == MeasuredNoise(300.0, 300.0, 300.0, "one")
    assert resolve_initial_noise(config_with_noise("one")).plan.noise == 60.0
    assert resolve_initial_noise(config_with_noise(500.0)).plan.noise == 500.0
    assert resolve_initial_noise(RUN) == RUN
    fixed = replace(config_with_noise("one"), batch=replace(RUN.batch, policy="scale"))
    assert resolve_initial_noise(fixed) == fixed
    with pytest.raises(UsageError, match=r"^plan\.noise=-1.0 is not a noise scale"):
        resolve_initial_noise(config_with_noise(-1.0))


def config_with_noise(noise: float | str) -> RunConfig:
    return replace(RUN, plan=PlanConfig(noise=noise))
