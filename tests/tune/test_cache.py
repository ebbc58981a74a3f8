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
PLACE = MeasurementEnv(
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
PROFILE = CachedProfile(make_cache_key(RUN, PLACE), "2026-11-21T16:40:00+00:00", FOUND)

PLACES = {
    "world": 3,
    "nodes": 2,
    "local_world": 1,
    "device": "NVIDIA H200",
    "cores": 4,
    "threads": 2,
    "code": "4567",
    "shape": [[[64], "torch.float64"], [[], "torch.int64"]],
    "train_samples": 1438,
    "versions": {**PLACE.versions, "torch": "2.14.0"},
}
RUNS = {
    "recipe": {**RUN.recipe, "width": 128},
    "optimizer": {**RUN.optimizer, "momentum": 0.0},
    "strategy": StrategyConfig(name="fsdp"),
    "train": TrainConfig(precision="bf16"),
    "data": DataConfig(num_workers=1),
    "batch": BatchConfig(accumulation=2),
    "tune": TuneConfig(max=64),
}


# --- the key ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", PLACES)
def test_every_fact_of_the_place_matters(field: str) -> None:
    assert make_cache_key(RUN, replace(PLACE, **{field: PLACES[field]})) != PROFILE.key


@pytest.mark.parametrize("part", RUNS)
def test_what_changes_an_updates_time_or_memory_matters(part: str) -> None:
    assert make_cache_key(replace(RUN, **{part: RUNS[part]}), PLACE) != PROFILE.key  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [{"seed": 5}, {"batch": BatchConfig(per_device=7)}, {"tune": TuneConfig(budget_s=3.0)}, {"resume": "never"}],
    ids=str,
)
def test_what_changes_neither_does_not(change: dict[str, Any]) -> None:
    assert make_cache_key(replace(RUN, **change), PLACE) == PROFILE.key


def test_who_is_trusted_is_no_part_of_it_and_no_secret_is() -> None:
    secret = replace(RUN, recipe={**RUN.recipe, "data": "https://me:hidden@host/data"})
    values = get_config_fields(secret)
    assert "recipe.trust" not in values
    assert "hidden" not in json.dumps(values)


@given(st.sampled_from(sorted(PROFILE.key)), st.one_of(st.integers(), st.text(), st.none(), st.lists(st.integers())))
def test_any_field_that_differs_is_another_file(name: str, value: Any) -> None:
    folder = Path("/nowhere")
    other = {**PROFILE.key, name: value}
    assert (other == PROFILE.key) == (path(other, folder) == path(PROFILE.key, folder))


def path(key: dict[str, Any] | Any, folder: Path) -> Path:
    from launcher.tune.cache import make_profile_path

    return make_profile_path(key if key.get("recipe._target_") else {**key, "recipe._target_": "x.Y"}, folder)


def test_every_value_of_the_configuration_was_thought_of() -> None:
    """The keys of the recipe, the optimizer and the strategy are part of the cache key, and so are these."""
    named = {
        name for name in get_config_fields(RUN) if name.partition(".")[0] not in ("optimizer", "recipe", "strategy")
    }
    assert named < set(flatten(from_mapping(to_mapping(RUN))))
    assert {"train.precision", "data.num_workers", "batch.accumulation"} < named


def test_the_shape_of_a_sample() -> None:
    sample = (torch.zeros(3, 4), {"label": 1, "mask": torch.ones(2, dtype=torch.bool)})
    assert describe_sample(sample) == [[[3, 4], "torch.float32"], {"label": "int", "mask": [[2], "torch.bool"]}]


# --- the files ----------------------------------------------------------------------------------------------------


def test_what_was_kept_is_found(tmp_path: Path) -> None:
    store(PROFILE, tmp_path)
    assert lookup(PROFILE.key, tmp_path).profile == PROFILE
    assert lookup(PROFILE.key, tmp_path).said == ()
    assert list(all_profiles(tmp_path)) == [PROFILE]


def test_a_speed_that_is_hardly_known_is_said() -> None:
    """As when threads wait for cores used by other programs: a factor of a hundred between measurements."""
    assert describe_unreliable_speed(FOUND) == []
    noisy = {**FOUND, "points": [{**FOUND["points"][0], "low": 0.664, "high": 66.1}]}
    (line,) = describe_unreliable_speed(noisy)
    assert line.startswith("throughput at 24 is unreliable (0.664 to 66.1 samples/s): set launch.threads=1, ")
    untimed = {**FOUND, "points": [{**FOUND["points"][0], "per_device": 16}]}
    assert describe_unreliable_speed(untimed) == [], "the largest size that works may be known by its memory alone"


def test_nothing_kept_is_nothing_to_say(tmp_path: Path) -> None:
    assert lookup(PROFILE.key, tmp_path / "none") == lookup(PROFILE.key, tmp_path)
    assert lookup(PROFILE.key, tmp_path).said == ()


def test_the_newer_measurement_takes_the_place_of_the_older(tmp_path: Path) -> None:
    store(PROFILE, tmp_path)
    newer = replace(PROFILE, found={**FOUND, "recommended": 32})
    store(newer, tmp_path)
    assert lookup(PROFILE.key, tmp_path).profile == newer
    assert len(list(tmp_path.iterdir())) == 1


def test_a_stale_one_is_said_with_its_date_and_what_differs_and_is_not_used(tmp_path: Path) -> None:
    store(PROFILE, tmp_path)
    looked = lookup(make_cache_key(RUN, replace(PLACE, versions=PLACES["versions"], world=3)), tmp_path)  # type: ignore[arg-type]
    assert looked.profile is None
    assert looked.said == (
        "the profile of 2026-11-21 16:40 UTC is not used: version of torch was 2.13.0, is now 2.14.0; "
        "world was 2, is now 3",
    )


def test_of_another_recipe_nothing_is_said(tmp_path: Path) -> None:
    store(PROFILE, tmp_path)
    other = replace(RUN, recipe={"_target_": "launcher.recipes.resnet.Resnet"})
    assert lookup(make_cache_key(other, PLACE), tmp_path).said == ()


def damaged() -> dict[str, str]:
    text = PROFILE.to_text()
    lying = replace(PROFILE, found={**FOUND, "recommended": "24"}).to_text()
    return {
        "cut off": text[: len(text) // 2],
        "empty": "",
        "another number": text.replace('"recommended": 24', '"recommended": 48'),
        "no mapping": "[1, 2]",
        "of another version": text.replace('"format": 1', '"format": 2'),
        "hashed, but no sense": lying,
        "no points": replace(PROFILE, found={**FOUND, "points": []}).to_text(),
        "no date": replace(PROFILE, measured="yesterday").to_text(),
        "endless": replace(PROFILE, found={**FOUND, "points": [{**FOUND["points"][0], "low": float("inf")}]}).to_text(),
    }


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_one_is_said_and_not_used(tmp_path: Path, kind: str) -> None:
    file = store(PROFILE, tmp_path)
    file.write_text(damaged()[kind])
    looked = lookup(PROFILE.key, tmp_path)
    assert looked.profile is None
    assert looked.said[0].startswith(f"{file} cannot be trusted (")
    assert looked.said[0].endswith("): not used")
    assert list(all_profiles(tmp_path)) == []


def test_bytes_that_are_no_text_and_a_folder_in_its_place_crash_nothing(tmp_path: Path) -> None:
    file = store(PROFILE, tmp_path)
    file.write_bytes(b"\xff\xfe\x00")
    assert "cannot be trusted" in lookup(PROFILE.key, tmp_path).said[0]
    file.unlink()
    file.mkdir()
    assert "cannot be trusted" in lookup(PROFILE.key, tmp_path).said[0]


def test_one_under_the_name_of_another_key_is_not_used(tmp_path: Path) -> None:
    other = replace(PROFILE, key={**PROFILE.key, "world": 3})
    store(PROFILE, tmp_path).write_text(other.to_text())
    looked = lookup(PROFILE.key, tmp_path)
    assert looked.profile is None
    assert "has a different key: not used" in looked.said[0]


@given(st.binary(max_size=60), st.integers(0, 2000))
def test_no_bytes_written_over_it_are_ever_believed(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int
) -> None:
    folder = tmp_path_factory.mktemp("profiles")
    file = store(PROFILE, folder)
    whole = file.read_bytes()
    spoilt = whole[:at] + junk + whole[at + len(junk) :]
    file.write_bytes(spoilt)
    profile = lookup(PROFILE.key, folder).profile
    assert profile is None or profile == PROFILE
