"""`launcher plan batch.global=divisible`: the batch that most of the world sizes divide, and which."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from launcher.config.schema import BatchConfig, ElasticConfig, LrConfig, PlanConfig, RunConfig
from launcher.errors import UsageError
from launcher.plan.plan_table import format_plan_table, make_plan_document
from launcher.plan.training_plan import DatasetSizes

SIZES = DatasetSizes(train=5000, val=100)
DIVISIBLE = RunConfig(
    optimizer={"_target_": "torch.optim.SGD"},
    lr=LrConfig(base=0.1, base_batch=256),
    batch=BatchConfig(policy="hold", global_batch="divisible", max_global=1000, per_device=48),
    plan=PlanConfig(world_sizes=(1, 2, 3, 4, 5, 6, 7, 8, 12, 16)),
)


def with_batch(**keys: int | str | None) -> RunConfig:
    return replace(DIVISIBLE, batch=replace(DIVISIBLE.batch, **keys))


def test_document_has_the_batch_and_which_world_sizes_divide_it() -> None:
    document = make_plan_document(DIVISIBLE, SIZES)
    assert json.loads(json.dumps(document))["divisible"] == {
        "global": 960,
        "max_global": 1000,
        "world_sizes": [1, 2, 3, 4, 5, 6, 8, 12, 16],
        "of": [1, 2, 3, 4, 5, 6, 7, 8, 12, 16],
    }
    assert {row["global"] for row in document["plans"]} == {960}
    even = [row["world"] for row in document["plans"] if len(set(row["shares"])) == 1]
    assert even == document["divisible"]["world_sizes"]


def test_plan_is_that_of_the_number_which_the_user_types_next() -> None:
    document = make_plan_document(DIVISIBLE, SIZES)
    typed = make_plan_document(with_batch(global_batch=960, max_global=None), SIZES)
    assert {**typed, "divisible": document["divisible"]} == document
    assert "divisible" not in typed


def test_table_names_the_batch_and_its_world_sizes() -> None:
    lines = format_plan_table(make_plan_document(DIVISIBLE, SIZES)).splitlines()
    assert "batch.global=960 is the batch of at most 1,000 samples that most world sizes" in lines
    assert "divide, 9 of 10: 1-6, 8, 12, 16" in lines


def test_batch_never_exceeds_the_training_set() -> None:
    document = make_plan_document(with_batch(max_global=10**6), replace(SIZES, train=100), [3, 7, 9])
    assert document["divisible"] == {"global": 63, "max_global": 100, "world_sizes": [3, 7, 9], "of": [3, 7, 9]}


def test_only_world_sizes_that_the_job_accepts_count() -> None:
    accepted = replace(DIVISIBLE, elastic=ElasticConfig(min_workers=5, max_workers=7))
    assert make_plan_document(accepted, SIZES)["divisible"]["of"] == [5, 6, 7]


def test_every_listed_world_size_divides_the_batch() -> None:
    row = make_plan_document(with_batch(max_global=10**5), DatasetSizes(10**6, 10), range(1, 65))["divisible"]
    assert row["global"] <= 10**5
    assert all(row["global"] % size == 0 for size in row["world_sizes"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_batch(max_global=None), "batch.global=divisible needs an upper limit: type batch.max_global=4096"),
        (with_batch(min_global=8), "batch.min_global=8 has no effect with batch.global=divisible: remove it"),
        (
            replace(with_batch(max_global=3), plan=PlanConfig(world_sizes=(8, 4))),
            "batch.max_global=3 is below the smallest world size, 4: type",
        ),
        (
            with_batch(policy="bounded"),
            "batch.global=divisible does not work with batch.policy=bounded: type batch=hold",
        ),
    ],
)
def test_request_without_an_answer_is_refused(config: RunConfig, message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        make_plan_document(config, SIZES)
    assert str(refusal.value).startswith(message)
