"""One table and one document of all points of `tune -m`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from launcher.errors import EXIT_FAILED
from launcher.tune.measurements import Measurement
from launcher.tune.report.document import make_tune_document
from launcher.tune.report.sweep_table import MeasuredPoint, format_points_table, make_points_document
from launcher.tune.tune_sweep import parse_point_values
from tests.helpers.measured_sizes import (
    FACTS,
    FIXED_BYTES,
    PIXEL_BYTES,
    document_with_memory,
    make_measurements,
    tune_document,
)


def make_point(*overrides: str, found: Mapping[str, Any] | None = None, **more: Any) -> MeasuredPoint:
    all_overrides = ("recipe=resnet", *overrides)
    return MeasuredPoint(all_overrides, parse_point_values(all_overrides), found, **more)


def image_point(size: int) -> MeasuredPoint:
    return make_point(f"recipe.image_size={size}", found=document_with_memory(size, size), image=(size, size))


FAILED = "rank 0 failed in forward: RuntimeError: shapes do not go together at s3://u:hunter2@h, and more of it to say"


def test_table_has_a_line_per_point() -> None:
    failed = make_point("recipe.image_size=64", status=EXIT_FAILED, error=FAILED)
    table = format_points_table([image_point(32), failed, image_point(96)])
    assert table.splitlines() == [
        "Mlp, 2 workers, cpu (x86_64), fp32, 3 points; 24 s",
        "     per_device  samples/s  memory  memory_max  bottleneck  image_size",
        "  0          28       32.9  364 MB          80     forward          32",
        "  1  failed (1)          -       -           -           -          64",
        "  2          28       32.9  800 MB          80     forward          96",
        "point 1: rank 0 failed in forward: RuntimeError: shapes do not go together at",
        "s3://u:***@h, and more of it to say",
        "A worker's memory is about 310 MB + 1.9 kB x per_device x height x width, within",
        "1 % of what was measured at recipe.image_size=32,96.",
    ]


def test_long_overrides_wrap_below_their_point() -> None:
    overrides = [f"recipe.data=a/place/that/is/rather/long/{n}" for n in (1, 2)]
    table = format_points_table([make_point(word, "seed=1", found=tune_document()) for word in overrides]).splitlines()
    assert max(map(len, table)) <= 80
    assert [line.strip() for line in table[3::2]] == overrides


def test_headline_omits_differing_conditions() -> None:
    other = {**tune_document(2.0), "world": 1, "spent_s": 70.0}
    table = format_points_table(
        [make_point("launch.workers=2", found=tune_document()), make_point("launch.workers=1", found=other)]
    ).splitlines()
    assert table[0] == "Mlp, cpu (x86_64), fp32, 2 points; 1:22"
    assert [line.split()[2] for line in table[2:4]] == ["32.9", "65.8"]


def test_point_without_fitting_size_is_explained() -> None:
    nothing = make_tune_document(make_measurements(Measurement(8, where="forward")), FACTS)
    table = format_points_table(
        [make_point("seed=1", found=nothing), make_point("seed=2", found=tune_document())]
    ).splitlines()
    assert table[2].split() == ["0", "-", "-", "-", "-", "memory", "1"]
    assert table[4].startswith("point 0: no size fits into memory: try smaller tune.sizes, ")


def test_document_has_overrides_results_and_errors() -> None:
    made = make_points_document(
        [image_point(32), make_point("recipe.image_size=[64,48]", status=EXIT_FAILED, error=FAILED), image_point(96)]
    )
    assert json.loads(json.dumps(made)) == made
    assert [one["overrides"] for one in made["points"]] == [
        {"recipe": "resnet", "recipe.image_size": size} for size in (32, [64, 48], 96)
    ]
    assert [one["found"] and one["found"]["recommended"] for one in made["points"]] == [28, None, 28]
    assert [one["error"] for one in made["points"]] == [None, FAILED.replace("hunter2", "***"), None]
    assert made["memory"]["fixed_bytes"]["value"] == pytest.approx(FIXED_BYTES)
    assert made["memory"]["pixel_bytes"]["value"] == pytest.approx(PIXEL_BYTES)
    assert made["memory"]["sizes"] == [[32, 32], [96, 96]]


def test_memory_model_requires_only_image_size_swept() -> None:
    both = [
        make_point(
            f"recipe.image_size={size}",
            f"recipe.depth={depth}",
            found=document_with_memory(size, size),
            image=(size, size),
        )
        for size in (32, 96)
        for depth in (18, 34)
    ]
    assert make_points_document(both)["memory"] is None
    assert "A worker's memory" not in format_points_table(both)
    assert make_points_document([image_point(32), image_point(32)])["memory"] is None
