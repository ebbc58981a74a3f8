"""tune -m without measuring: one table of all points, one JSON document, and memory over image sizes."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.schema import RunConfig
from launcher.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, UsageError
from launcher.goodput.auto_batch import MeasurementError
from launcher.tune.measurements import Measurement
from launcher.tune.report.document import make_tune_document as found_by_tune
from launcher.tune.report.image_memory import ImageMemoryModel, PeakMemory
from launcher.tune.report.sweep_table import MeasuredPoint, format_points_table, make_points_document
from launcher.tune.tune_sweep import get_image_size, parse_point_values, tune_sweep
from tests.tune.test_tune import FACTS, TRACE, ledger, visited

# --- memory over images of several sizes --------------------------------------------------------------------------

FIXED_BYTES, PIXEL_BYTES = 310e6, 1900.0


def peaks(*sizes: tuple[int, int], off: Callable[[], float] = lambda: 0.0) -> list[PeakMemory]:
    """Memory of 310 MB + 1.9 kB x per_device x pixels, each with a relative error."""
    return [
        PeakMemory(h, w, m, round((FIXED_BYTES + PIXEL_BYTES * m * h * w) * (1 + off())))
        for h, w in sizes
        for m in (8, 16, 32)
    ]


def test_fixed_memory_and_that_of_a_pixel_are_told_apart_by_two_sizes() -> None:
    found = ImageMemoryModel.from_peaks(peaks((32, 32), (64, 48)))
    assert found is not None
    assert found.fixed_bytes.value == pytest.approx(FIXED_BYTES)
    assert found.pixel_bytes.value == pytest.approx(PIXEL_BYTES)
    assert found.within < 1e-6
    assert found.sizes == ((32, 32), (64, 48))
    assert found.describe() == (
        "A worker's memory is about 310 MB + 1.9 kB x per_device x height x width, within 1 % of what was measured at "
        "recipe.image_size=32,[64,48]."
    )


@given(fixed=st.floats(1e6, 1e10), each=st.floats(100, 1e5), large=st.integers(33, 512))
def test_any_exact_values_are_found(fixed: float, each: float, large: int) -> None:
    found = ImageMemoryModel.from_peaks(
        [PeakMemory(s, s, m, round(fixed + each * m * s * s)) for s in (32, large) for m in (2, 64)]
    )
    assert found is not None
    assert found.fixed_bytes.value == pytest.approx(fixed, rel=1e-3)
    assert found.pixel_bytes.value == pytest.approx(each, rel=1e-3)


def test_noise_of_three_percent_is_told_and_leaves_the_values_near() -> None:
    noise = random.Random(0)
    found = ImageMemoryModel.from_peaks(peaks((32, 32), (64, 64), (96, 96), off=lambda: noise.uniform(-0.03, 0.03)))
    assert found is not None
    assert found.fixed_bytes.low < FIXED_BYTES < found.fixed_bytes.high
    assert found.pixel_bytes.low < PIXEL_BYTES < found.pixel_bytes.high
    assert found.pixel_bytes.value == pytest.approx(PIXEL_BYTES, rel=0.05)
    assert 0.01 < found.within < 0.05
    assert f"within {int(100 * found.within) + 1} % of" in found.describe()


def test_memory_that_does_not_grow_is_said_so() -> None:
    found = ImageMemoryModel.from_peaks([PeakMemory(s, s, m, 300_000_000) for s in (8, 16) for m in (4, 8)])
    assert found is not None
    assert found.describe().startswith("A worker's memory is about 300 MB regardless of per_device and image size")
    assert found.to_facts()["pixel_bytes"]["value"] == 0.0


@pytest.mark.parametrize(
    "measured",
    [
        [],
        peaks((32, 32)),
        peaks((32, 64), (64, 32)),  # as many pixels: c height width stays one unknown
        [PeakMemory(8, 8, 4, 10**8), PeakMemory(16, 16, 4, 2 * 10**8)],  # any two lie on a line
        [PeakMemory(8, 8, 4, 10**8), PeakMemory(8, 8, 8, 10**8), PeakMemory(16, 16, 1, 2 * 10**8)],  # 4 x 64 = 1 x 256
    ],
)
def test_from_less_nothing_is_said(measured: list[PeakMemory]) -> None:
    assert ImageMemoryModel.from_peaks(measured) is None


# --- one table, one document --------------------------------------------------------------------------------------


def tuned(scale: float = 1.0) -> dict[str, Any]:
    """The known trace, at `scale` of its samples/s."""
    return found_by_tune(ledger(*(visited(m, scale * rate) for m, rate in TRACE.items())), FACTS)


def with_memory(height: int, width: int) -> dict[str, Any]:
    found = tuned()
    for point in found["points"]:
        point["memory_bytes"] = round(FIXED_BYTES + PIXEL_BYTES * point["per_device"] * height * width)
    return found


def point(*words: str, found: Mapping[str, Any] | None = None, **more: Any) -> MeasuredPoint:
    asked = ("recipe=resnet", *words)
    return MeasuredPoint(asked, parse_point_values(asked), found, **more)


def of_image(size: int) -> MeasuredPoint:
    return point(f"recipe.image_size={size}", found=with_memory(size, size), image=(size, size))


FAILED = "rank 0 failed in forward: RuntimeError: shapes do not go together at s3://u:hunter2@h, and more of it to say"


def test_a_line_for_each_point_with_what_was_swept_and_why_one_failed() -> None:
    failed = point("recipe.image_size=64", status=EXIT_FAILED, error=FAILED)
    shown = format_points_table([of_image(32), failed, of_image(96)])
    assert shown.splitlines() == [
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


def test_what_is_swept_goes_below_where_it_does_not_fit_beside() -> None:
    words = [f"recipe.data=a/place/that/is/rather/long/{n}" for n in (1, 2)]
    shown = format_points_table([point(word, "seed=1", found=tuned()) for word in words]).splitlines()
    assert max(map(len, shown)) <= 80
    assert [line.strip() for line in shown[3::2]] == words


def test_conditions_that_differ_are_not_in_the_headline() -> None:
    other = {**tuned(2.0), "world": 1, "spent_s": 70.0}
    shown = format_points_table(
        [point("launch.workers=2", found=tuned()), point("launch.workers=1", found=other)]
    ).splitlines()
    assert shown[0] == "Mlp, cpu (x86_64), fp32, 2 points; 1:22"
    assert [line.split()[2] for line in shown[2:4]] == ["32.9", "65.8"]


def test_a_point_where_nothing_fits_has_no_size_and_says_why() -> None:
    nothing = found_by_tune(ledger(Measurement(8, where="forward")), FACTS)
    shown = format_points_table([point("seed=1", found=nothing), point("seed=2", found=tuned())]).splitlines()
    assert shown[2].split() == ["0", "-", "-", "-", "-", "memory", "1"]
    assert shown[4].startswith("point 0: no size fits into memory: try smaller tune.sizes, ")


def test_the_document_has_what_was_asked_and_what_was_found_or_the_error() -> None:
    made = make_points_document(
        [of_image(32), point("recipe.image_size=[64,48]", status=EXIT_FAILED, error=FAILED), of_image(96)]
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


def test_memory_is_not_fitted_where_another_key_may_have_moved_it() -> None:
    both = [
        point(f"recipe.image_size={size}", f"recipe.depth={depth}", found=with_memory(size, size), image=(size, size))
        for size in (32, 96)
        for depth in (18, 34)
    ]
    assert make_points_document(both)["memory"] is None
    assert "A worker's memory" not in format_points_table(both)
    assert make_points_document([of_image(32), of_image(32)])["memory"] is None


@pytest.mark.parametrize(("asked", "size"), [(32, (32, 32)), ([48, 64], (48, 64)), (None, None), ("large", None)])
def test_an_image_is_one_number_of_pixels_or_height_and_width(asked: Any, size: Any) -> None:
    assert get_image_size(RunConfig(recipe={"_target_": "x", "image_size": asked})) == size


# --- from the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recorded(seen: list[Any], fail_at: int | None = None, error: Exception | None = None) -> Callable[[RunConfig], Any]:
    def measure(config: RunConfig) -> dict[str, Any]:
        size = int(config.recipe["image_size"])
        seen.append(size)
        if size == fail_at and error is not None:
            raise error
        return {**with_memory(size, size), "said": [], "cached": False}

    return measure


SWEPT = ("-m", "recipe=resnet", "recipe.image_size=32,64,96")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (MeasurementError("rank 0 was killed by SIGKILL: out of memory?"), EXIT_FAILED, "rank 0 was killed"),
        (UsageError("recipe.image_size=64 is no size"), EXIT_USAGE, "recipe.image_size=64 is no size"),
        (OSError("no disk at s3://u:hunter2@h"), EXIT_FAILED, "OSError: no disk at s3://u:***@h"),
    ],
)
def test_a_failed_point_is_told_and_the_others_are_measured(
    here: Path, capsys: pytest.CaptureFixture[str], error: Exception, status: int, said: str
) -> None:
    seen: list[Any] = []
    assert tune_sweep([*SWEPT], recorded(seen, 64, error)) == status
    assert seen == [32, 64, 96]
    told = capsys.readouterr()
    assert f"error: {said}" in told.err
    assert f"  1  failed ({status}) " in told.out
    assert f"point 1: {said}" in told.out
    assert "point 2: recipe=resnet recipe.image_size=96\n" in told.err
    assert list(here.iterdir()) == []


def test_one_json_document_alone_is_on_stdout(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune_sweep([*SWEPT, "format=json", "batch.global=64"], recorded([])) == EXIT_OK
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert [one["overrides"]["recipe.image_size"] for one in found["points"]] == [32, 64, 96]
    assert "format" not in found["points"][0]["overrides"]
    assert found["points"][0]["found"]["goodput"] is None
    assert told.err.count("note: batch.global=64 selects batch=hold") == 3


def test_tune_out_holds_the_document_and_a_page_for_each_point_that_has_one(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune_sweep([*SWEPT, "tune.out=out", "run.name=s"], recorded([], 64, OSError("no disk")))
    assert sorted(str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()) == [
        "out/0/tune.html",
        "out/2/tune.html",
        "out/tune.json",
    ]
    found = json.loads(Path("out/tune.json").read_text())
    assert [one["error"] for one in found["points"]] == [None, "OSError: no disk", None]
    assert "written: out/tune.json, out/0/tune.html, out/2/tune.html" in capsys.readouterr().err


def test_sigterm_between_two_points_or_in_one_ends_all_of_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    def measure(config: RunConfig) -> dict[str, Any]:
        seen.append(config)
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        tune_sweep([*SWEPT], measure)
    assert len(seen) == 1
    assert capsys.readouterr().out == ""
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch.per_device=8,x"], "batch.per_device=x: expected a whole number"),
        (["seed=1,2", "tune.size=[8]"], "tune.size is not a key: did you mean tune.sizes?"),
        (["format=json,text"], "format can't be swept over, as all points go into one table"),
        (["tune.out=a,b"], "tune.out can't be swept over"),
        (["run.name=a,b"], "run.name can't be swept over"),
        (
            ["sweep.max_parallel=2"],
            "sweep.max_parallel=2 is only for training: tune measures the listed points one after",
        ),
        (["sweep.trials=4", "lr.base=interval(0.1,1)"], "sweep.trials=4 is only for training"),
        (["--shard=0/4"], "--shard=0/4 is only for training"),
    ],
)
def test_a_wrong_request_is_found_before_the_first_is_measured(here: Path, words: list[str], said: str) -> None:
    seen: list[Any] = []
    with pytest.raises(UsageError) as caught:
        tune_sweep([*SWEPT, *words], recorded(seen))
    assert said in str(caught.value)
    assert seen == []
    assert list(here.iterdir()) == []


def test_a_dry_start_prints_each_points_command_and_measures_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune_sweep(["-m", "recipe=mlp", "launch.workers=1,2", "launch.dry_run=true"], recorded([])) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert [f"--nproc-per-node={n}" in line for n, line in enumerate(lines, 1)] == [True, True]
