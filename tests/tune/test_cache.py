"""Cached measurements: keyed by everything they depend on, and ignored where that cannot be determined."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.keys import flatten, from_mapping, to_mapping
from launcher.config.schema import BatchConfig, DataConfig, RunConfig, StrategyConfig, TrainConfig, TuneConfig
from launcher.tune.cache import (
    CachedProfile,
    MeasurementEnv,
    all_profiles,
    get_config_fields,
    lookup,
    make_cache_key,
    store,
)
from launcher.tune.session import describe_sample, describe_unreliable_speed

RUN = RunConfig(
    recipe={"_target_": "launcher.recipes.mlp.Mlp", "width": 64, "trust": ["mine"]},
    optimizer={"_target_": "torch.optim.SGD", "momentum": 0.9},
)
ENV = MeasurementEnv(
    world=2,
    nodes=1,
    local_world=2,
    device="cpu (x86_64)",
    cores=2,
    threads=1,
    code="0123",
    shape=[[[64], "torch.float32"], [[], "torch.int64"]],
    train_samples=1437,
    versions={"torch": "2.13.0", "the launcher": "1.0", "python": "3.11.2"},
)
FOUND: dict[str, Any] = {
    "recommended": 24,
    "world": 2,
    "accumulation": 1,
    "points": [{"per_device": 24, "samples_per_s": 100.0, "low": 90.0, "high": 110.0, "memory_bytes": 1000}],
}
PROFILE = CachedProfile(make_cache_key(RUN, ENV), "2026-11-21T16:40:00+00:00", FOUND)

OTHER_ENVS = {
    "world": 3,
    "nodes": 2,
    "local_world": 1,
    "device": "NVIDIA H200",
    "cores": 4,
    "threads": 2,
    "code": "4567",
    "shape": [[[64], "torch.float64"], [[], "torch.int64"]],
    "train_samples": 1438,
    "versions": {**ENV.versions, "torch": "2.14.0"},
}
OTHER_CONFIGS = {
    "recipe": {**RUN.recipe, "width": 128},
    "optimizer": {**RUN.optimizer, "momentum": 0.0},
    "strategy": StrategyConfig(name="fsdp"),
    "train": TrainConfig(precision="bf16"),
    "data": DataConfig(num_workers=1),
    "batch": BatchConfig(accumulation=2),
    "tune": TuneConfig(max=64),
}


# --- the key ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", OTHER_ENVS)
def test_environment_fields_change_the_key(field: str) -> None:
    assert make_cache_key(RUN, replace(ENV, **{field: OTHER_ENVS[field]})) != PROFILE.key


@pytest.mark.parametrize("part", OTHER_CONFIGS)
def test_performance_options_change_the_key(part: str) -> None:
    assert make_cache_key(replace(RUN, **{part: OTHER_CONFIGS[part]}), ENV) != PROFILE.key  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [{"seed": 5}, {"batch": BatchConfig(per_device=7)}, {"tune": TuneConfig(budget_s=3.0)}, {"resume": "never"}],
    ids=str,
)
def test_other_options_keep_the_key(change: dict[str, Any]) -> None:
    assert make_cache_key(replace(RUN, **change), ENV) == PROFILE.key


def test_key_excludes_trust_and_secrets() -> None:
    secret = replace(RUN, recipe={**RUN.recipe, "data": "https://me:hidden@host/data"})
    values = get_config_fields(secret)
    assert "recipe.trust" not in values
    assert "hidden" not in json.dumps(values)


@given(st.sampled_from(sorted(PROFILE.key)), st.one_of(st.integers(), st.text(), st.none(), st.lists(st.integers())))
def test_different_keys_have_different_paths(name: str, value: Any) -> None:
    folder = Path("/nowhere")
    other = {**PROFILE.key, name: value}
    is_same = json.dumps(other, sort_keys=True) == json.dumps(PROFILE.key, sort_keys=True)  # unlike ==, 0 is not False
    assert is_same == (profile_path(other, folder) == profile_path(PROFILE.key, folder))


def profile_path(key: dict[str, Any] | Any, folder: Path) -> Path:
    from launcher.tune.cache import make_profile_path

    return make_profile_path(key if key.get("recipe._target_") else {**key, "recipe._target_": "x.Y"}, folder)


def test_key_fields_are_config_keys() -> None:
    """The keys of the recipe, the optimizer and the strategy are part of the cache key, and so are these."""
    named = {
        name for name in get_config_fields(RUN) if name.partition(".")[0] not in ("optimizer", "recipe", "strategy")
    }
    assert named < set(flatten(from_mapping(to_mapping(RUN))))
    assert {"train.precision", "data.num_workers", "batch.accumulation"} < named


def test_sample_description_lists_shapes_and_dtypes() -> None:
    sample = (torch.zeros(3, 4), {"label": 1, "mask": torch.ones(2, dtype=torch.bool)})
    assert describe_sample(sample) == [[[3, 4], "torch.float32"], {"label": "int", "mask": [[2], "torch.bool"]}]


# --- the files ----------------------------------------------------------------------------------------------------


def test_stored_profile_is_found(tmp_path: Path) -> None:
    store(PROFILE, tmp_path)
    assert lookup(PROFILE.key, tmp_path).profile == PROFILE
    assert lookup(PROFILE.key, tmp_path).notes == ()
    assert list(all_profiles(tmp_path)) == [PROFILE]


def test_unreliable_throughput_is_reported() -> None:
    """As when threads wait for cores used by other programs: a factor of a hundred between measurements."""
    assert describe_unreliable_speed(FOUND) == []
    noisy = {**FOUND, "points": [{**FOUND["points"][0], "low": 0.664, "high": 66.1}]}
    (line,) = describe_unreliable_speed(noisy)
    assert line.startswith("throughput at 24 is unreliable (0.664 to 66.1 samples/s): set launch.threads=1, ")
    untimed = {**FOUND, "points": [{**FOUND["points"][0], "per_device": 16}]}
    assert describe_unreliable_speed(untimed) == [], "the largest size that works may be known by its memory alone"


def test_empty_cache_has_no_notes(tmp_path: Path) -> None:
    assert lookup(PROFILE.key, tmp_path / "none") == lookup(PROFILE.key, tmp_path)
    assert lookup(PROFILE.key, tmp_path).notes == ()


def test_newer_profile_replaces_older(tmp_path: Path) -> None:
    store(PROFILE, tmp_path)
    newer = replace(PROFILE, document={**FOUND, "recommended": 32})
    store(newer, tmp_path)
    assert lookup(PROFILE.key, tmp_path).profile == newer
    assert len(list(tmp_path.iterdir())) == 1


def test_stale_profile_is_reported_and_not_used(tmp_path: Path) -> None:
    store(PROFILE, tmp_path)
    result = lookup(make_cache_key(RUN, replace(ENV, versions=OTHER_ENVS["versions"], world=3)), tmp_path)  # type: ignore[arg-type]
    assert result.profile is None
    assert result.notes == (
        "the profile of 2026-11-21 16:40 UTC is not used: version of torch was 2.13.0, is now 2.14.0; "
        "world was 2, is now 3",
    )


def test_other_recipe_has_no_notes(tmp_path: Path) -> None:
    store(PROFILE, tmp_path)
    other = replace(RUN, recipe={"_target_": "launcher.recipes.resnet.Resnet"})
    assert lookup(make_cache_key(other, ENV), tmp_path).notes == ()


def damaged_texts() -> dict[str, str]:
    text = PROFILE.to_text()
    lying = replace(PROFILE, document={**FOUND, "recommended": "24"}).to_text()
    return {
        "cut off": text[: len(text) // 2],
        "empty": "",
        "another number": text.replace('"recommended": 24', '"recommended": 48'),
        "no mapping": "[1, 2]",
        "of another version": text.replace('"format": 1', '"format": 2'),
        "hashed, but no sense": lying,
        "no points": replace(PROFILE, document={**FOUND, "points": []}).to_text(),
        "no date": replace(PROFILE, measured="yesterday").to_text(),
        "endless": replace(
            PROFILE, document={**FOUND, "points": [{**FOUND["points"][0], "low": float("inf")}]}
        ).to_text(),
    }


@pytest.mark.parametrize("kind", damaged_texts())
def test_damaged_profile_is_reported_and_not_used(tmp_path: Path, kind: str) -> None:
    file = store(PROFILE, tmp_path)
    file.write_text(damaged_texts()[kind])
    result = lookup(PROFILE.key, tmp_path)
    assert result.profile is None
    assert result.notes[0].startswith(f"{file} cannot be trusted (")
    assert result.notes[0].endswith("): not used")
    assert list(all_profiles(tmp_path)) == []


def test_binary_file_or_folder_is_not_trusted(tmp_path: Path) -> None:
    file = store(PROFILE, tmp_path)
    file.write_bytes(b"\xff\xfe\x00")
    assert "cannot be trusted" in lookup(PROFILE.key, tmp_path).notes[0]
    file.unlink()
    file.mkdir()
    assert "cannot be trusted" in lookup(PROFILE.key, tmp_path).notes[0]


def test_profile_with_other_key_is_not_used(tmp_path: Path) -> None:
    other = replace(PROFILE, key={**PROFILE.key, "world": 3})
    store(PROFILE, tmp_path).write_text(other.to_text())
    result = lookup(PROFILE.key, tmp_path)
    assert result.profile is None
    assert "has a different key: not used" in result.notes[0]


@given(st.binary(max_size=60), st.integers(0, 2000))
def test_overwritten_bytes_are_never_trusted(tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int) -> None:
    folder = tmp_path_factory.mktemp("profiles")
    file = store(PROFILE, folder)
    whole = file.read_bytes()
    spoilt = whole[:at] + junk + whole[at + len(junk) :]
    file.write_bytes(spoilt)
    profile = lookup(PROFILE.key, folder).profile
    assert profile is None or profile == PROFILE
