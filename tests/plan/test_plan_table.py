"""`launcher plan`: one plan for every world size, as JSON and as a table."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from launcher.config.schema import BatchConfig, ElasticConfig, LrConfig, PlanConfig, RunConfig, ScheduleConfig
from launcher.errors import UsageError
from launcher.plan.plan_table import format_plan_table, make_plan_document
from launcher.plan.training_plan import DatasetSizes

SIZES = DatasetSizes(train=1437, val=360)
HOLD_CONFIG = RunConfig(
    optimizer={"_target_": "torch.optim.SGD"},
    lr=LrConfig(base=0.1, base_batch=256),
    batch=BatchConfig(policy="hold", global_batch=256, per_device=48),
    schedule=ScheduleConfig(decay="cosine", warmup="0.1dur"),
)
SCALE_CONFIG = replace(HOLD_CONFIG, batch=BatchConfig(per_device=64))


def test_document_holds_the_plan_of_a_job() -> None:
    (plan,) = make_plan_document(HOLD_CONFIG, SIZES, [3])["plans"]
    assert plan == {
        "world": 3,
        "feasible": True,
        "global": 256,
        "shares": [86, 85, 85],
        "per_device": 43,
        "accumulation": 2,
        "lr": 0.1,
        "lr_scale": 1.0,
        "warmup_samples": 1437,
        "updates_per_epoch": 1437 / 256,
        "advice": [],
    }


def test_lr_is_the_peak_after_warmup() -> None:
    rows = make_plan_document(SCALE_CONFIG, SIZES, [1, 3, 8])["plans"]
    assert [(row["global"], row["lr"], row["lr_scale"]) for row in rows] == [
        (64, 0.025, 0.25),
        (192, pytest.approx(0.075), 0.75),
        (512, 0.2, 2.0),
    ]


def test_world_sizes_follow_the_request() -> None:
    assert [row["world"] for row in make_plan_document(HOLD_CONFIG, SIZES)["plans"]] == list(range(1, 65))
    config = replace(HOLD_CONFIG, plan=PlanConfig(world_sizes=(1, 2, 8, 512)))
    assert [row["world"] for row in make_plan_document(config, SIZES)["plans"]] == [1, 2, 8, 512]


def test_infeasible_world_size_has_a_reason() -> None:
    few = replace(HOLD_CONFIG, batch=BatchConfig(policy="hold", global_batch=8), elastic=ElasticConfig(min_workers=2))
    rows = make_plan_document(few, SIZES, [1, 8, 9])["plans"]
    assert [row["feasible"] for row in rows] == [False, True, False]
    assert rows[0]["why"].startswith("elastic.min_workers=2")
    assert rows[2] == {
        "world": 9,
        "feasible": False,
        "why": "batch.global=8 is below 9 workers: type batch.global=9 or more, or elastic.allow_idle=true",
    }


def test_request_infeasible_at_every_size_fails() -> None:
    with pytest.raises(UsageError, match=r"batch\.global=5000 exceeds the 1437"):
        make_plan_document(replace(HOLD_CONFIG, batch=BatchConfig(policy="hold", global_batch=5000)), SIZES)


def test_schedule_uses_smallest_feasible_world_size() -> None:
    ramped = BatchConfig(per_device=64, ramp=(("0dur", 0.25), ("0.1dur", 0.5), ("0.2dur", 1)))
    elastic = ElasticConfig(min_workers=2)
    document = make_plan_document(
        replace(SCALE_CONFIG, batch=ramped, elastic=elastic), DatasetSizes(100_000, 1000), [8, 1, 2]
    )
    points = document["schedule"]
    assert {point["world"] for point in points} == {2}
    assert [point["at"] for point in points] == ["start", "after warmup", "25 %", "50 %", "75 %", "100 %"]
    assert [point["samples"] for point in points] == [0, 100_000, 250_000, 500_000, 750_000, 1_000_000]
    assert [point["global"] for point in points] == [32, 64, 128, 128, 128, 128]
    lrs = [point["lr"] for point in points]
    assert lrs == [0, pytest.approx(0.0125), *lrs[2:5], 0]  # the ramp to twice the scale starts as the warmup ends
    assert lrs[2] > lrs[3] > lrs[4] > 0


def test_no_feasible_world_size_gives_empty_schedule() -> None:
    document = make_plan_document(replace(HOLD_CONFIG, elastic=ElasticConfig(min_workers=9)), SIZES, [1, 2])
    assert document["schedule"] == []
    assert "1-2  no plan: elastic.min_workers=9" in format_plan_table(document)


def test_document_is_strict_json() -> None:
    document = make_plan_document(HOLD_CONFIG, SIZES)
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_table_matches_expected_text() -> None:
    table = format_plan_table(
        make_plan_document(replace(HOLD_CONFIG, elastic=ElasticConfig(max_workers=3)), SIZES, [1, 3, 4, 5])
    )
    assert table == TABLE


TABLE = """\
1,437 training samples, batch.policy=hold, lr.rule=linear
lr.base=0.1 at lr.base_batch=256

  world  shares                   micro  accum    global         lr  updates/ep
      1  256                         43      6       256        0.1         5.6
      3  86, 85x2                    43      2       256        0.1         5.6
    4-5  no plan: elastic.max_workers=3 but this job has 4: start 3 workers or
         fewer, or type elastic.max_workers=4

schedule=cosine at world size 1               samples    global         lr
  start                                             0       256          0
  after warmup                                  1,437       256        0.1
  25 %                                          3,592       256     0.0933
  50 %                                          7,185       256    0.05868
  75 %                                         10,777       256    0.01787
  100 %                                        14,370       256          0

world   scale       lr    hold       lr bounded       lr changes under hold
    1      48   0.0188     256      0.1     256      0.1
    3     144   0.0563     256      0.1     256      0.1 accumulation 6 -> 2,
                                                         shares uneven
    4       -        -       -        -       -        -
    5       -        -       -        -       -        -
  scale: workers x batch.per_device=48
  bounded: batch.min_global=256 (lr.base_batch), batch.max_global=1437 (training
  set size)
"""


def summarise_plans(found: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    """World size, batch, accumulation and largest share of each plan under one policy."""
    return [(row["world"], row["global"], row["accumulation"], row["share_max"]) for row in found["plans"]]


def test_request_is_planned_under_every_policy() -> None:
    """256 at 4 workers of 64: scale changes the batch, hold keeps it, and bounded never goes below it."""
    policies = make_plan_document(SCALE_CONFIG, SIZES, [1, 3, 4, 6, 8, 64])["policies"]
    assert {kind: found["asked"] for kind, found in policies.items()} == {
        "scale": True,
        "hold": False,
        "bounded": False,
    }
    assert summarise_plans({"plans": policies["scale"]["plans"][:-1]}) == [
        *((1, 64, 1, 64), (3, 192, 1, 64), (4, 256, 1, 64), (6, 384, 1, 64), (8, 512, 1, 64)),
    ]
    assert policies["scale"]["plans"][-1]["why"].startswith("batch.per_device=64 makes a global batch of 4096")
    assert summarise_plans(policies["hold"]) == [
        *((1, 256, 4, 256), (3, 256, 2, 86), (4, 256, 1, 64), (6, 256, 1, 43), (8, 256, 1, 32), (64, 256, 1, 4)),
    ]
    assert summarise_plans(policies["bounded"]) == [
        *((1, 256, 4, 256), (3, 256, 2, 86), (4, 256, 1, 64), (6, 384, 1, 64), (8, 512, 1, 64), (64, 1437, 1, 23)),
    ]
    lrs = {kind: [row.get("lr") for row in found["plans"]] for kind, found in policies.items()}
    assert lrs["scale"] == [0.025, pytest.approx(0.075), 0.1, pytest.approx(0.15), 0.2, None]
    assert lrs["hold"] == [0.1] * 6
    assert lrs["bounded"][:5] == [0.1, 0.1, 0.1, pytest.approx(0.15), 0.2]


def test_rows_list_changes_from_previous_world_size() -> None:
    policies = make_plan_document(SCALE_CONFIG, SIZES, [1, 2, 3, 4, 8])["policies"]
    assert [row["changes"] for row in policies["scale"]["plans"]] == [
        [],
        ["batch x2", "lr x2"],
        ["batch x1.5", "lr x1.5"],
        ["batch x1.33", "lr x1.33"],
        ["batch x2", "lr x2"],
    ]
    assert [row["changes"] for row in policies["hold"]["plans"]] == [
        [],
        ["accumulation 4 -> 2"],
        ["shares uneven"],
        ["accumulation 2 -> 1", "shares even"],
        [],
    ]


def test_derived_values_name_their_source() -> None:
    few = replace(SCALE_CONFIG, lr=LrConfig(base=0.1, base_batch=32))
    policies = make_plan_document(few, SIZES, [1])["policies"]
    assert {kind: found["derived"] for kind, found in policies.items()} == {
        "scale": "",
        "hold": "batch.global=32 (lr.base_batch)",
        "bounded": "batch.min_global=32 (lr.base_batch), batch.max_global=1024 (32 x lr.base_batch)",
    }
    batch = BatchConfig(policy="bounded", per_device=64, accumulation=2, min_global=128, max_global=512)
    policies = make_plan_document(replace(SCALE_CONFIG, batch=batch), SIZES, [1, 8])["policies"]
    assert [row["global"] for row in policies["bounded"]["plans"]] == [128, 512]
    assert policies["scale"]["derived"] == "workers x batch.per_device=64 x batch.accumulation=2"
    assert [row["global"] for row in policies["scale"]["plans"]] == [128, 1024]


def test_excluded_policy_has_a_reason() -> None:
    exact = replace(HOLD_CONFIG, elastic=ElasticConfig(exact=True))
    policies = make_plan_document(exact, SIZES, [1, 2])["policies"]
    assert [row["feasible"] for row in policies["hold"]["plans"]] == [True, True]
    assert all("batch.policy" in row["why"] for row in policies["scale"]["plans"])
    assert "no plan at world size 1-2: batch.policy=scale" in format_plan_table(
        make_plan_document(exact, SIZES, [1, 2])
    )


WIDE: list[tuple[dict[str, Any], DatasetSizes, list[int]]] = [
    ({}, SIZES, list(range(1, 65))),
    ({"batch": BatchConfig(policy="hold", global_batch="full")}, DatasetSizes(10**12, 100), [1, 3, 100_000]),
    ({"optimizer": {"_target_": "torch.optim.AdamW"}}, SIZES, [1, 2, 8, 512, 10_000]),
    ({"optimizer": {"_target_": "torch.optim.Adam"}, "batch": BatchConfig(per_device=999)}, SIZES, [1, 3, 5, 7]),
]


@pytest.mark.parametrize(("changes", "sizes", "world_sizes"), WIDE)
def test_table_fits_80_columns(changes: dict[str, Any], sizes: DatasetSizes, world_sizes: list[int]) -> None:
    table = format_plan_table(make_plan_document(replace(HOLD_CONFIG, **changes), sizes, world_sizes))
    assert max(map(len, table.splitlines())) <= 80


def test_advice_is_merged_over_world_sizes() -> None:
    far = replace(SCALE_CONFIG, lr=LrConfig(base=0.1, base_batch=16))
    table = format_plan_table(make_plan_document(far, SIZES, [8, 9, 10]))
    assert table.count("Advice") == 1
    assert "Advice at world size 9-10: the global batch is more than 32 x lr.base_batch=16" in table


def test_planning_64_world_sizes_is_fast() -> None:
    def seconds() -> float:
        started = time.process_time()
        make_plan_document(SCALE_CONFIG, DatasetSizes(10**6, 1000))
        return time.process_time() - started

    assert min(seconds() for _ in range(5)) < 0.1
